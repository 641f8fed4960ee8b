"""An accelerated R-CNN has the assignments, proposals, losses, gradients and detections of torchvision's own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate_cases import CLASSES, SMALL_ANCHORS, Pyramid
from rcnn_cases import (
    MODELS,
    assert_same_detections,
    assert_same_training,
    break_ties,
    keypoint_rcnn,
    mask_rcnn,
    pair,
    random_batch,
    run,
    small_rcnn,
)
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler, BoxCoder, Matcher
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RPNHead

import retinanet_ops as ops
from retinanet_ops.integrations.torchvision import accelerate


class TestResults:
    # Batch norm over a map of few cells makes gradients of float32 differ by more than 1e-4 of their norm.
    @pytest.mark.parametrize(
        ("name", "dtype"), [("resnet18", torch.float32), ("single map", torch.float64), ("small", torch.float32)]
    )
    def test_training_and_detections_equal_torchvisions(self, name: str, dtype: torch.dtype) -> None:
        theirs, ours = pair(MODELS[name]().to(dtype))
        for counts in ((5, 0, 30), (1, 12)):
            assert_same_training(theirs, ours, random_batch(counts, dtype))
        assert_same_detections(theirs, ours, random_batch((1, 1, 1), dtype)[0])

    @pytest.mark.parametrize("seed", range(6))
    def test_random_batches(self, seed: int) -> None:
        torch.manual_seed(seed)
        theirs, ours = pair(small_rcnn())
        batch = random_batch(tuple(torch.randint(0, 101, (3,)).tolist()))
        assert_same_training(theirs, ours, batch, seed)
        assert_same_detections(theirs, ours, batch[0])

    def test_batch_without_boxes(self) -> None:
        assert_same_training(*pair(small_rcnn()), random_batch((0, 0)))

    @pytest.mark.parametrize("seed", range(6))
    def test_options_of_proposals(self, seed: int) -> None:
        torch.manual_seed(seed)
        theirs, ours = pair(small_rcnn())
        for model in (theirs, ours):
            rpn = model.rpn
            rpn._pre_nms_top_n["training"] = (2000, 50, 10**9, 3, 200, 10)[seed]
            rpn._pre_nms_top_n["testing"] = (1000, 30, 7, 400, 3, 9)[seed]
            rpn._post_nms_top_n["training"] = (2000, 7, 10**9, 40, 1, 3)[seed]
            rpn._post_nms_top_n["testing"] = (3, 1000, 9, 100, 1, 8)[seed]
            rpn.nms_thresh = (0.7, 0.05, 0.3, 0.9, 1.0, 0.5)[seed]
            rpn.score_thresh = (0.0, 0.5, 0.1, 0.7, 0.0, 0.3)[seed]
            rpn.min_size = (1e-3, 4.0, 20.0, 0.0, 10.0, 1.0)[seed]
        batch = random_batch()
        assert_same_training(theirs, ours, batch)
        assert_same_detections(theirs, ours, batch[0], least=1)

    def test_least_objectness(self) -> None:
        theirs, ours = pair(small_rcnn(rpn_score_thresh=0.6))
        batch = random_batch()
        assert_same_training(theirs, ours, batch)
        assert_same_detections(theirs, ours, batch[0])

    def test_order_of_proposals_with_almost_equal_objectness(self) -> None:
        # Different logits have the same score in float32, also on different levels.
        theirs = small_rcnn()
        theirs.rpn.head.register_forward_hook(lambda module, args, out: ([x * 1e-4 for x in out[0]], out[1]))
        assert_same_training(*pair(theirs), random_batch())

    @pytest.mark.parametrize("seed", range(6))
    def test_options_of_detections(self, seed: int) -> None:
        torch.manual_seed(seed)
        theirs, ours = pair(small_rcnn())
        for model in (theirs, ours):
            model.roi_heads.score_thresh = (0.05, 0.0, 0.01, 0.3, 0.5, 0.1)[seed]
            model.roi_heads.nms_thresh = (0.5, 0.05, 0.3, 0.7, 0.9, 1.0)[seed]
            model.roi_heads.detections_per_img = (100, 7, None, 40, 3, 10**12)[seed]
        assert_same_detections(theirs, ours, random_batch((1, 1, 1))[0], least=3)

    def test_coders_and_matchers(self) -> None:
        theirs, ours = pair(small_rcnn())
        for model in (theirs, ours):
            model.rpn.box_coder = BoxCoder((2.0, 3.0, 1.5, 0.5), 0.2)
            model.roi_heads.box_coder = BoxCoder((5.0, 10.0, 4.0, 3.0), 0.3)
            model.rpn.proposal_matcher = Matcher(0.5, 0.4)
            model.roi_heads.proposal_matcher = Matcher(0.6, 0.3, allow_low_quality_matches=True)
        batch = random_batch()
        assert_same_training(theirs, ours, batch)
        assert_same_detections(theirs, ours, batch[0])

    def test_no_proposals(self) -> None:
        theirs, ours = pair(small_rcnn(rpn_score_thresh=1.1))
        for counts in ((5, 0, 30), (4, 1)):
            assert_same_training(theirs, ours, random_batch(counts))
        assert_same_detections(theirs, ours, random_batch()[0], least=0)

    def test_no_detections(self) -> None:
        theirs, ours = pair(small_rcnn(box_score_thresh=1.0))
        assert_same_detections(theirs, ours, random_batch((1, 1))[0], least=0)
        assert ours(random_batch((1,))[0])[0]["boxes"].shape == (0, 4)

    def test_train_and_eval_alternate(self) -> None:
        theirs, ours = pair(small_rcnn())
        batch = random_batch()
        for _ in range(2):
            assert_same_training(theirs.train(), ours.train(), batch)
            assert_same_detections(theirs, ours, batch[0])

    def test_detections_have_torchvisions_gradient(self) -> None:
        gradients = []
        images = random_batch()[0]
        for model in pair(small_rcnn()):
            detections = run(model.eval(), images)
            sum((image["boxes"].sum() + image["scores"].sum() * 100) for image in detections).backward()
            gradients.append([parameter.grad for parameter in model.roi_heads.parameters()])
        assert any(gradient.norm() > 0 for gradient in gradients[0])
        for theirs, ours in zip(*gradients, strict=True):
            assert (ours - theirs).norm() <= 1e-4 * theirs.norm()


@pytest.mark.parametrize(("make", "name"), [(mask_rcnn, "masks"), (keypoint_rcnn, "keypoints")])
def test_masks_and_keypoints_equal_torchvisions(make: Callable[[], Any], name: str) -> None:
    theirs, ours = pair(make())
    batch = random_batch()
    assert_same_training(theirs, ours, batch)
    assert_same_detections(theirs, ours, batch[0], least=8)
    with torch.no_grad():
        for expected, got in zip(run(theirs, batch[0]), run(ours, batch[0]), strict=True):
            torch.testing.assert_close(got[name], expected[name], rtol=0, atol=1e-2)


class Convolution(nn.Module):
    """An RPN head of a client."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(Pyramid.out_channels, 6 * 5, 3, padding=1)

    def forward(self, levels: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        maps = [self.layer(level) for level in levels]
        return [x[:, :6] for x in maps], [x[:, 6:] for x in maps]


class Doubled(RoIHeads):
    """RoI heads whose `forward` a client has overridden."""

    def forward(self, *args: Any) -> Any:
        result, losses = super().forward(*args)
        return result, {name: loss * 2 for name, loss in losses.items()}


def own_sampler(labels: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Sample every third anchor, without chance."""
    chosen = [torch.arange(len(image)) % 3 == 0 for image in labels]
    pairs = list(zip(labels, chosen, strict=True))
    return [((x >= 1) & c).to(torch.uint8) for x, c in pairs], [((x == 0) & c).to(torch.uint8) for x, c in pairs]


class Centred(AnchorGenerator):
    def grid_anchors(self, grid_sizes: list[list[int]], strides: list[list[Tensor]]) -> list[Tensor]:
        anchors = super().grid_anchors(grid_sizes, strides)
        return [a + torch.stack((x, y, x, y)) / 2 for a, (y, x) in zip(anchors, strides, strict=True)]


def replace_predictor(model: FasterRCNN) -> None:
    # As the fine-tuning tutorial of PyTorch does.
    model.roi_heads.box_predictor = FastRCNNPredictor(model.roi_heads.box_predictor.cls_score.in_features, CLASSES + 2)
    nn.init.normal_(model.roi_heads.box_predictor.cls_score.weight, std=2.0)


def replace_rpn_head(model: FasterRCNN) -> None:
    model.rpn.head = Convolution()
    nn.init.normal_(model.rpn.head.layer.weight, std=0.05)
    break_ties(model)


def deepen_rpn_head(model: FasterRCNN) -> None:
    model.rpn.head = RPNHead(Pyramid.out_channels, 6, conv_depth=2)
    break_ties(model)


def override_forward(model: FasterRCNN) -> None:
    model.roi_heads.__class__ = Doubled


def replace_samplers(model: FasterRCNN) -> None:
    model.rpn.fg_bg_sampler = model.roi_heads.fg_bg_sampler = own_sampler


def shrink_samplers(model: FasterRCNN) -> None:
    model.rpn.fg_bg_sampler = BalancedPositiveNegativeSampler(20, 0.9)
    model.roi_heads.fg_bg_sampler = BalancedPositiveNegativeSampler(9, 0.1)


def replace_generator(model: FasterRCNN) -> None:
    model.rpn.anchor_generator = Centred(*SMALL_ANCHORS)


def hook_proposals(model: FasterRCNN) -> None:
    model.rpn.register_forward_hook(lambda module, args, output: ([boxes[::2] for boxes in output[0]], output[1]))


def hook_head(model: FasterRCNN) -> None:
    model.rpn.head.register_forward_hook(lambda module, args, output: ([x * 0.7 for x in output[0]], output[1]))


class TestReplacedParts:
    CHANGES = (
        replace_predictor,
        replace_rpn_head,
        deepen_rpn_head,
        override_forward,
        replace_samplers,
        shrink_samplers,
        replace_generator,
        hook_proposals,
        hook_head,
    )

    @pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
    def test_parts_of_clients_are_used(self, change: Callable[[FasterRCNN], None]) -> None:
        plain = small_rcnn()
        theirs = copy.deepcopy(plain)
        change(theirs)
        ours = accelerate(copy.deepcopy(theirs))
        batch = random_batch()
        assert_same_training(theirs, ours, batch)
        assert sum(run(ours, *batch).values()) != sum(run(plain, *batch).values())
        assert_same_detections(theirs, ours, batch[0], least=1)

    def test_predictor_replaced_after_accelerate(self) -> None:
        theirs, ours = pair(small_rcnn())
        replace_predictor(theirs)
        ours.roi_heads.box_predictor = copy.deepcopy(theirs.roi_heads.box_predictor)
        assert_same_training(theirs, ours, random_batch())

    def test_maps_of_the_head_reach_the_ops_uncopied(self, monkeypatch) -> None:
        seen, original = [], ops.dense_box_loss
        monkeypatch.setattr(ops, "dense_box_loss", lambda *args, **kw: seen.append(args) or original(*args, **kw))
        ours, maps = accelerate(small_rcnn()), []
        ours.rpn.head.register_forward_hook(lambda module, args, output: maps.extend(output[1]))
        ours(*random_batch())
        deltas, anchors = seen[0][:2]
        assert [level.data_ptr() for level in deltas] == [level.data_ptr() for level in maps]
        assert isinstance(anchors, ops.AnchorGrid)
