"""Box loss of a COCO image's 201,600 anchors, and the whole loss of two images: matching, focal loss and box loss.

torchvision's rows run torchvision's code on the permuted and concatenated outputs of the heads. The row "floor" of the
whole loss computes no loss. It runs `x.sum(); x * 2` on each level, which reads the logits twice and writes as many
bytes as their gradients have.
"""

from collections.abc import Callable, Sequence
from types import SimpleNamespace

import pytest
import torch
from focal_loss import with_gradients
from harness import COCO_GRIDS, coco_anchors, coco_heads, ground_truth
from torch import Tensor

import retinanet_ops as ops
from retinanet_ops import reference
from retinanet_ops.reference._rows import rows_of

TORCHVISION_CLASSES = 91
IOU_LOSSES = {
    "giou": "generalized_box_iou_loss",
    "diou": "distance_box_iou_loss",
    "ciou": "complete_box_iou_loss",
}


@pytest.mark.parametrize("row", ("ours", "torchvision", "reference compiled"))
@pytest.mark.parametrize("kind", ("l1", "giou", pytest.param("ciou", marks=pytest.mark.full)))
def test_box_loss(compare, device, kind, row):
    grid = coco_anchors(device)
    anchors = grid.boxes()
    _, deltas = coco_heads(1, 1, device, 0.0)
    boxes, count = ground_truth(50, device)[None], torch.tensor([50], device=device)
    matches = ops.match_anchors(grid, boxes, count)

    def ours(*levels: Tensor) -> Tensor:
        return ops.dense_box_loss(levels, grid, boxes, matches, kind=kind).sum()

    def plain(*levels: Tensor) -> Tensor:
        return reference.dense_box_loss(levels, anchors, boxes, matches, kind=kind).sum()

    def torchvision_loss(*levels: Tensor) -> Tensor:
        import torchvision
        from torchvision.models.detection._utils import BoxCoder

        coder = BoxCoder((1.0, 1.0, 1.0, 1.0))
        rows, positive = rows_of(levels, 4)[0], torch.where(matches[0] >= 0)[0]
        matched = boxes[0, matches[0, positive].long()]
        if kind == "l1":
            return (rows[positive] - coder.encode_single(matched, anchors[positive])).abs().sum()
        predicted = coder.decode_single(rows[positive], anchors[positive])
        return getattr(torchvision.ops, IOU_LOSSES[kind])(predicted, matched, reduction="sum")

    if row == "torchvision":
        pytest.importorskip("torchvision")
    losses = {"ours": ours, "torchvision": torchvision_loss, "reference compiled": torch.compile(plain)}
    size = sum(level.numel() * level.element_size() for level in deltas)
    compare(
        row,
        lambda: with_gradients(losses[row], deltas),
        with_gradients(plain, deltas),
        check=lambda actual, expected: torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-5),
        bytes_moved=size + 2 * 4 * grid.num_anchors,
        group=f"box loss, forward + backward, {grid.num_anchors:,} anchors, {kind}, float32",
    )


@pytest.mark.parametrize("row", ("ours", "torchvision", "floor"))
@pytest.mark.parametrize("num_gt", (50, 200))
def test_whole_loss(compare, device, num_gt, row):
    if row == "torchvision":
        pytest.importorskip("torchvision")
    images, classes = 2, TORCHVISION_CLASSES
    grid = coco_anchors(device)
    logits, deltas = coco_heads(images, classes, device, -4.6)
    boxes = torch.stack([ground_truth(num_gt, device) for _ in range(images)])
    labels = torch.randint(1, classes, (images, num_gt)).to(device)
    count = torch.full((images,), num_gt, device=device)
    levels = len(COCO_GRIDS)

    def ours(*outputs: Tensor) -> Tensor:
        targets = ops.assign_targets(grid, boxes, labels, count)
        focal = ops.dense_focal_loss(outputs[:levels], targets.labels, classes)
        box = ops.dense_box_loss(outputs[levels:], grid, boxes, targets.matches)
        return ((focal + box) / targets.num_positive.clamp(min=1)).mean()

    loss = ours if row == "ours" else torchvision_loss(grid.boxes(), boxes, labels)
    outputs = [*logits, *deltas]

    def floor() -> list[Tensor]:
        return [level.sum() for level in logits] + [torch.mul(level, 2) for level in logits]

    def check(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
        if row != "floor":
            torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-6)

    compare(
        row,
        floor if row == "floor" else lambda: with_gradients(loss, outputs),
        with_gradients(reference_loss(grid.boxes(), boxes, labels, count), outputs) if row != "floor" else None,
        check=check,
        bytes_moved=3 * sum(level.numel() * level.element_size() for level in logits),
        group=f"whole loss, forward + backward, {images} x {grid.num_anchors:,} x {classes}, {num_gt} ground truths",
    )


def torchvision_loss(anchors: Tensor, boxes: Tensor, labels: Tensor) -> Callable[..., Tensor]:
    """Return the loss of torchvision's RetinaNet, as a function of the heads' tensors."""

    def loss(*outputs: Tensor) -> Tensor:
        from torchvision.models.detection._utils import Matcher
        from torchvision.models.detection.retinanet import RetinaNet, RetinaNetHead

        levels = len(outputs) // 2
        model = SimpleNamespace(
            head=RetinaNetHead(1, 9, TORCHVISION_CLASSES, norm_layer=torch.nn.Identity),
            proposal_matcher=Matcher(0.5, 0.4, allow_low_quality_matches=True),
        )
        head_outputs = {
            "cls_logits": rows_of(outputs[:levels], TORCHVISION_CLASSES),
            "bbox_regression": rows_of(outputs[levels:], 4),
        }
        targets = [{"boxes": b, "labels": c} for b, c in zip(boxes, labels, strict=True)]
        losses = RetinaNet.compute_loss(model, targets, head_outputs, [anchors] * len(boxes))
        return losses["classification"] + losses["bbox_regression"]

    return loss


def reference_loss(anchors: Tensor, boxes: Tensor, labels: Tensor, count: Tensor) -> Callable[..., Tensor]:
    """Return the loss of our references, as a function of the heads' tensors."""

    def loss(*outputs: Tensor) -> Tensor:
        levels = len(outputs) // 2
        targets = reference.assign_targets(anchors, boxes, labels, count)
        focal = reference.dense_focal_loss(outputs[:levels], targets.labels, TORCHVISION_CLASSES)
        box = reference.dense_box_loss(outputs[levels:], anchors, boxes, targets.matches)
        return ((focal + box) / targets.num_positive.clamp(min=1)).mean()

    return loss
