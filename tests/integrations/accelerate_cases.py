"""torchvision RetinaNets, batches for them, and comparisons of any accelerated model with torchvision's own."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torchvision.models import mobilenet_v2
from torchvision.models.detection import RetinaNet, retinanet_resnet50_fpn, retinanet_resnet50_fpn_v2
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from retinanet_ops.integrations.torchvision import accelerate

CLASSES = 6
SIZES = dict(min_size=96, max_size=150)
Batch = tuple[list[Tensor], list[dict[str, Tensor]]]


class Pyramid(nn.Module):
    """A backbone of three small levels, for tests that do not depend on the backbone."""

    out_channels = 16

    def __init__(self) -> None:
        super().__init__()
        self.levels = nn.ModuleList([nn.Conv2d(3, 16, 3, stride, 1) for stride in (8, 16, 32)])

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps: dict[str, Tensor] = {}
        for i, level in enumerate(self.levels):
            maps[str(i)] = level(x).relu()
        return maps


SMALL_ANCHORS = ((16, 24), (32, 48), (64, 96)), ((0.5, 1.0, 2.0),) * 3


def plain_model(cls: type[RetinaNet] = RetinaNet, **options: object) -> RetinaNet:
    """Return a small model as it is after initialisation, for tests that compare no numbers."""
    options = {"anchor_generator": AnchorGenerator(*SMALL_ANCHORS), **SIZES, **options}
    return cls(Pyramid(), CLASSES, **options)


def small_model(cls: type[RetinaNet] = RetinaNet, **options: object) -> RetinaNet:
    return spread(plain_model(cls, **options))


def resnet18_model() -> RetinaNet:
    backbone = resnet_fpn_backbone(
        backbone_name="resnet18",
        weights=None,
        trainable_layers=5,
        returned_layers=[2, 3, 4],
        extra_blocks=LastLevelP6P7(256, 256),
    )
    return spread(RetinaNet(backbone, CLASSES, **SIZES))


def single_map_model() -> RetinaNet:
    backbone = mobilenet_v2(weights=None).features[:14]
    backbone.out_channels = 96
    generator = AnchorGenerator(((32, 64, 128),), ((0.5, 1.0, 2.0),))
    return spread(RetinaNet(backbone, CLASSES, anchor_generator=generator, **SIZES))


def resnet50_model(build: Callable[..., RetinaNet]) -> Callable[[], RetinaNet]:
    return lambda: spread(build(weights=None, weights_backbone=None, num_classes=CLASSES, **SIZES))


MODELS = {
    "v1": resnet50_model(retinanet_resnet50_fpn),
    "v2": resnet50_model(retinanet_resnet50_fpn_v2),
    "resnet18": resnet18_model,
    "single map": single_map_model,
    "small": small_model,
}


def spread(model: RetinaNet) -> RetinaNet:
    """Spread logits and deltas, because after initialisation every score is 0.01 and nothing is detected."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # cumulative mean: one pass in training mode sets the statistics
    with torch.no_grad():
        model(*random_batch())
        features = model.eval().backbone(torch.rand(1, 3, 96, 96))
        features = [features] if isinstance(features, Tensor) else list(features.values())
        outputs = RetinaNetHead.forward(model.head, features)
        classification, regression = model.head.classification_head.cls_logits, model.head.regression_head.bbox_reg
        classification.weight.div_(outputs["cls_logits"].std())
        classification.bias.fill_(-3.0)
        regression.weight.div_(outputs["bbox_regression"].std() * 3)
    return model.train()


def pair(model: RetinaNet) -> tuple[RetinaNet, RetinaNet]:
    """Return the model itself and an accelerated copy."""
    return model, accelerate(copy.deepcopy(model))


def random_batch(counts: tuple[int, ...] = (5, 0, 30), first_class: int = 0) -> Batch:
    sizes = [(110, 150), (120, 90), (140, 140)][: len(counts)]
    images = [torch.rand(3, *size) for size in sizes]
    targets = []
    for count, (height, width) in zip(counts, sizes, strict=True):
        corner = torch.rand(count, 2) * torch.tensor([width, height]) * 0.7
        side = 4 + torch.rand(count, 2) * torch.tensor([width, height]) * 0.25
        labels = torch.randint(first_class, CLASSES, (count,))
        targets.append({"boxes": torch.cat((corner, corner + side), 1), "labels": labels})
    return images, targets


def assert_same_losses(theirs: RetinaNet, ours: RetinaNet, batch: Batch) -> None:
    expected, got = theirs(*batch), ours(*batch)
    assert list(got) == list(expected)
    for name, value in expected.items():
        assert value > 0
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=0)


def assert_same_gradients(theirs: RetinaNet, ours: RetinaNet, batch: Batch) -> None:
    """Compare every gradient with torchvision's in float64.

    Allowed is twice the error of torchvision's own float32 gradient, or 1e-4 of the norm.
    """
    images, targets = batch
    exact = copy.deepcopy(theirs).double()
    for model, dtype in ((exact, torch.float64), (theirs, torch.float32), (ours, torch.float32)):
        model.zero_grad()
        sum(model([image.to(dtype) for image in images], targets).values()).backward()
    expected, rounded = dict(exact.named_parameters()), dict(theirs.named_parameters())
    assert any(parameter.grad.norm() > 0 for parameter in expected.values())
    for name, parameter in ours.named_parameters():
        grad = expected[name].grad
        difference, of_theirs = (parameter.grad - grad).norm(), (rounded[name].grad - grad).norm()
        assert difference <= max(1e-4 * grad.norm(), 2 * of_theirs), name


def assert_same_detections(theirs: RetinaNet, ours: RetinaNet, images: list[Tensor], least: int = 20) -> None:
    with torch.no_grad():
        expected, got = theirs.eval()(images), ours.eval()(images)
    assert len(got) == len(expected)
    for e, g in zip(expected, got, strict=True):
        assert list(g) == list(e) and {k: v.dtype for k, v in g.items()} == {k: v.dtype for k, v in e.items()}
        assert len(g["scores"]) == len(e["scores"]) >= least
        assert len(g["labels"].unique()) > 1 or least < 20
        # Both lists are sorted by score, so only detections whose scores are almost equal may be in another order.
        assert (g["scores"].diff() <= 0).all()
        same = (g["scores"][:, None] - e["scores"]).abs() <= 1e-6
        same &= g["labels"][:, None] == e["labels"]
        same &= (g["boxes"][:, None] - e["boxes"]).abs().amax(-1) <= 1e-3
        assert same.any(0).all() and same.any(1).all()
