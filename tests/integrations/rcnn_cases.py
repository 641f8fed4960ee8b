"""Small torchvision R-CNNs, batches for them, and comparisons of an accelerated model with torchvision's own."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from accelerate_cases import CLASSES, SIZES, SMALL_ANCHORS, Batch, Pyramid
from accelerate_cases import random_batch as batch_of_class_0
from torch import Tensor, nn
from torchvision.models import mobilenet_v2
from torchvision.models.detection import FasterRCNN, KeypointRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads, KeypointRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import MultiScaleRoIAlign, boxes, nms

from retinanet_ops.integrations.torchvision import accelerate

POOL = dict(featmap_names=["0", "1", "2"], output_size=7, sampling_ratio=2)


def plain_rcnn(cls: type[FasterRCNN] = FasterRCNN, **options: Any) -> Any:
    """Return a small model as it is after initialisation, for tests that compare no numbers."""
    options = {
        "rpn_anchor_generator": AnchorGenerator(*SMALL_ANCHORS),
        "box_roi_pool": MultiScaleRoIAlign(**POOL),
        "box_head": TwoMLPHead(Pyramid.out_channels * 7 * 7, 32),
        "box_predictor": FastRCNNPredictor(32, CLASSES),
        **SIZES,
        **options,
    }
    return cls(Pyramid(), **options)


def small_rcnn(cls: type[FasterRCNN] = FasterRCNN, **options: Any) -> Any:
    return spread(plain_rcnn(cls, **options))


def resnet18_rcnn() -> FasterRCNN:
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None, trainable_layers=5)
    return spread(FasterRCNN(backbone, CLASSES, box_batch_size_per_image=64, rpn_post_nms_top_n_test=100, **SIZES))


def single_map_rcnn() -> FasterRCNN:
    backbone = mobilenet_v2(weights=None).features[:14]
    backbone.out_channels = 96
    generator = AnchorGenerator(((16, 32, 64, 128),), ((0.5, 1.0, 2.0),))
    head = dict(
        box_roi_pool=MultiScaleRoIAlign(featmap_names=["0"], output_size=7, sampling_ratio=2),
        box_head=TwoMLPHead(backbone.out_channels * 7 * 7, 32),
        box_predictor=FastRCNNPredictor(32, CLASSES),
    )
    return spread(FasterRCNN(backbone, rpn_anchor_generator=generator, **head, **SIZES))


#: Pooling and numbers of boxes for models with masks or keypoints, whose heads take most of the time.
FEW = dict(box_batch_size_per_image=16, rpn_post_nms_top_n_test=30, box_detections_per_img=8)


def mask_rcnn() -> MaskRCNN:
    pool, channels = MultiScaleRoIAlign(**{**POOL, "output_size": 14}), Pyramid.out_channels
    head, predictor = MaskRCNNHeads(channels, (16,), 1), MaskRCNNPredictor(16, 16, CLASSES)
    return small_rcnn(MaskRCNN, mask_roi_pool=pool, mask_head=head, mask_predictor=predictor, **FEW)


def keypoint_rcnn() -> KeypointRCNN:
    pool, channels = MultiScaleRoIAlign(**{**POOL, "output_size": 14}), Pyramid.out_channels
    head, predictor = KeypointRCNNHeads(channels, (16,)), KeypointRCNNPredictor(16, 3)
    return small_rcnn(KeypointRCNN, keypoint_roi_pool=pool, keypoint_head=head, keypoint_predictor=predictor, **FEW)


MODELS = {"resnet18": resnet18_rcnn, "single map": single_map_rcnn, "small": small_rcnn}


def break_ties(model: GeneralizedRCNN) -> None:
    """Give every anchor another objectness. All cells inside the padding of a batch have the same one otherwise.

    The order in which torchvision takes anchors of equal objectness is undefined.
    """

    def add_noise(module: nn.Module, args: Any, output: tuple[list[Tensor], list[Tensor]]) -> Any:
        generator = torch.Generator().manual_seed(0)
        noise = [torch.rand(level.shape, generator=generator).to(level) for level in output[0]]
        return [level + 0.01 * x for level, x in zip(output[0], noise, strict=True)], output[1]

    model.rpn.head.register_forward_hook(add_noise)


def spread(model: GeneralizedRCNN) -> GeneralizedRCNN:
    """Spread scores and deltas, because after initialisation all proposals are alike and nothing is detected."""
    break_ties(model)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # cumulative mean: one pass in training mode sets the statistics
    head, predictor = model.rpn.head, model.roi_heads.box_predictor
    outputs: dict[str, Tensor] = {}
    layers = (head.cls_logits, 1.0), (head.bbox_pred, 0.2), (predictor.cls_score, 2.0), (predictor.bbox_pred, 1.0)
    with torch.no_grad():
        for layer, deviation in layers:
            handle = layer.register_forward_hook(lambda module, args, output: outputs.update(last=output))
            model(*random_batch())
            handle.remove()
            layer.weight.mul_(deviation / outputs["last"].std())
            layer.bias.zero_()
    return model.train()


def pair(model: Any) -> tuple[Any, Any]:
    """Return the model itself and an accelerated copy."""
    return model, accelerate(copy.deepcopy(model))


def random_batch(counts: tuple[int, ...] = (5, 0, 30), dtype: torch.dtype = torch.float32) -> Batch:
    """Return images and targets that also have masks and keypoints."""
    images, targets = batch_of_class_0(counts)
    for image, target in zip(images, targets, strict=True):
        target["labels"].clamp_(min=1)  # class 0 is the background
        target["boxes"] = target["boxes"].to(dtype)
        boxes = target["boxes"].float()
        target["masks"] = torch.randint(0, 2, (len(boxes), *image.shape[-2:]), dtype=torch.uint8)
        points = torch.stack((boxes[:, :2], boxes[:, 2:], (boxes[:, :2] + boxes[:, 2:]) / 2), dim=1)
        target["keypoints"] = torch.cat((points, torch.ones(len(boxes), 3, 1)), dim=2)
    return [image.to(dtype) for image in images], targets


@contextlib.contextmanager
def exact_nms() -> Iterator[None]:
    """Make torchvision's NMS of levels and classes exact, and the order of equal scores defined.

    With few boxes it moves those of each class apart, which rounds their coordinates. With many, its sort is unstable.
    """
    replaced = {name: getattr(boxes, name) for name in ("_batched_nms_coordinate_trick", "_batched_nms_vanilla")}
    try:
        for name in replaced:
            setattr(boxes, name, nms_by_class)
        yield
    finally:
        for name, function in replaced.items():
            setattr(boxes, name, function)


def nms_by_class(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    kept = torch.zeros_like(scores, dtype=torch.bool)
    for idx in idxs.unique():
        members = torch.where(idxs == idx)[0]
        kept[members[nms(boxes[members], scores[members], iou_threshold)]] = True
    index = torch.where(kept)[0]
    return index[scores[index].sort(descending=True, stable=True)[1]]


class Trace:
    """What a model computes between its heads: the assigned labels and the proposals of each call."""

    def __init__(self, model: Any) -> None:
        """Watch the samplers, which get the labels of all anchors and proposals, and the proposals."""
        self.labels: list[Tensor] = []
        self.proposals: list[Tensor] = []
        for part in (model.rpn, model.roi_heads):
            part.fg_bg_sampler = self._watched(part.fg_bg_sampler)
        model.rpn.register_forward_hook(lambda module, args, output: self.proposals.extend(output[0]))

    def _watched(self, sampler: Any) -> Any:
        def sample(labels: list[Tensor]) -> Any:
            self.labels += labels
            return sampler(labels)

        return sample


def run(model: Any, *batch: Any, seed: int = 0) -> Any:
    """Call a model with a seed for its samplers."""
    torch.manual_seed(seed)
    with contextlib.ExitStack() as stack:
        if not any(type(module).__name__.startswith("Accelerated") for module in model.modules()):
            stack.enter_context(exact_nms())
        return model(*batch)


def assert_same_training(theirs: Any, ours: Any, batch: Batch, seed: int = 0) -> None:
    """Compare assignments, proposals, losses and gradients."""
    results = []
    for model in (theirs, ours):
        copied = copy.deepcopy(model)  # without the watched samplers of the last call
        trace, losses = Trace(copied), run(copied, *batch, seed=seed)
        sum(losses.values()).backward()
        results.append((trace, losses, dict(copied.named_parameters())))
    (expected, their_losses, their_parameters), (got, our_losses, our_parameters) = results
    assert_same_proposals(expected.proposals, got.proposals)
    assert len(got.labels) == 2 * len(batch[0])
    for e, g in zip(expected.labels, got.labels, strict=True):
        assert e.dtype == g.dtype and torch.equal(e, g)
    assert list(our_losses) == list(their_losses)
    # In a float64 model, the objectness loss of torchvision is float32.
    torch.testing.assert_close(our_losses, their_losses, rtol=1e-5, atol=1e-7, check_dtype=False)
    for name, parameter in our_parameters.items():
        grad = their_parameters[name].grad
        assert (parameter.grad - grad).norm() <= 1e-4 * grad.norm() + 1e-7, name


def assert_same_proposals(expected: list[Tensor], got: list[Tensor]) -> None:
    assert [len(image) for image in got] == [len(image) for image in expected]
    for e, g in zip(expected, got, strict=True):
        torch.testing.assert_close(g, e, rtol=0, atol=1e-3)


def assert_same_detections(theirs: Any, ours: Any, images: list[Tensor], least: int = 20) -> None:
    with torch.no_grad():
        expected, got = run(theirs.eval(), images), run(ours.eval(), images)
    assert len(got) == len(expected) == len(images)
    for e, g in zip(expected, got, strict=True):
        assert list(g) == list(e) and {k: v.dtype for k, v in g.items()} == {k: v.dtype for k, v in e.items()}
        assert len(g["scores"]) == len(e["scores"]) >= least
        # Both lists are sorted by score, so only detections whose scores are almost equal may be in another order. The
        # network of the RoI heads magnifies the rounding of the proposals.
        assert (g["scores"].diff() <= 0).all()
        same = (g["scores"][:, None] - e["scores"]).abs() <= 1e-5
        same &= g["labels"][:, None] == e["labels"]
        same &= (g["boxes"][:, None] - e["boxes"]).abs().amax(-1) <= 1e-3
        assert same.any(0).all() and same.any(1).all()
