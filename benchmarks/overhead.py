"""Time that calls take on tiny inputs, where little but the overhead of Python, autograd and the dispatcher counts.

Ten boxes, or the heads of a pyramid with two levels (2 x 2 and 1 x 1 cells, one anchor in each cell, three classes).
The rows "torchvision" call torchvision's function for the same result. The whole loss is matching, both losses and the
gradients of the heads' tensors. A round is 5 calls, and the minimum over the rounds is least disturbed by other
processes.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import retinanet_ops as ops
from retinanet_ops import AnchorGrid, reference

CLASSES = 3
VARIANTS = ("generalized_box_iou", "distance_box_iou", "complete_box_iou")
#: Functions of two lists of boxes.
OF_TWO_LISTS = ("box_iou", *VARIANTS, *(f"{name}_loss" for name in VARIANTS))


class Inputs:
    """The inputs of every case."""

    def __init__(self, device: torch.device) -> None:
        """Create the inputs on the device."""
        torch.manual_seed(0)
        boxes = [random_boxes(10).to(device) for _ in range(2)]
        self.a, self.b = boxes
        self.a_grad, self.b_grad = (b.clone().requires_grad_() for b in boxes)
        self.scores, self.classes = torch.rand(10, device=device), torch.randint(0, 3, (10,), device=device)
        self.grid = AnchorGrid.torchvision(((2, 2), (1, 1)), (16, 16), ((8,), (16,)), ((1.0,), (1.0,)), device=device)
        self.anchors = self.grid.boxes()
        self.sizes = torch.tensor([[16.0, 16.0]], device=device)
        self.gt_boxes, self.gt_labels = random_boxes(1, 2).to(device), torch.tensor([[0, 2]], device=device)
        self.gt_count = torch.tensor([2], device=device)
        self.logits = [torch.randn(1, CLASSES, side, side, device=device).requires_grad_() for side in (2, 1)]
        self.deltas = [torch.randn(1, 4, side, side, device=device).requires_grad_() for side in (2, 1)]
        self.targets = ops.assign_targets(self.grid, self.gt_boxes, self.gt_labels, self.gt_count)
        self.losses = torch.rand(1, len(self.anchors), device=device)
        self.rows = torch.randn(len(self.anchors), 4, device=device)
        self.rows_grad = self.rows.clone().requires_grad_()
        self.x = torch.randn(10, CLASSES, device=device)
        self.x_grad, self.dense = self.x.clone().requires_grad_(), torch.rand_like(self.x)
        self.index = torch.tensor([[0, 3, 4]], device=device)


def random_boxes(*shape: int) -> Tensor:
    """Return valid boxes within an image of 16 x 16 pixels."""
    corner = torch.rand(*shape, 2) * 8
    return torch.cat((corner, corner + 1 + torch.rand(*shape, 2) * 7), dim=-1)


def gradient(result: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Return the gradients of the sum of the result."""
    return torch.autograd.grad(result.sum(), inputs)


def whole_loss(library: Any, i: Inputs) -> tuple[Tensor, ...]:
    """Return the gradients of the loss of a training step."""
    targets = library.assign_targets(i.grid, i.gt_boxes, i.gt_labels, i.gt_count)
    focal = library.dense_focal_loss(i.logits, targets.labels, CLASSES)
    box = library.dense_box_loss(i.deltas, i.grid, i.gt_boxes, targets.matches)
    loss = ((focal + box) / targets.num_positive.clamp(min=1)).mean()
    return torch.autograd.grad(loss, (*i.logits, *i.deltas))


def coder() -> Any:
    """Return torchvision's box coder."""
    from torchvision.models.detection._utils import BoxCoder

    return BoxCoder((1.0, 1.0, 1.0, 1.0))


#: A call of `retinanet_ops` or its reference, and torchvision's call for the same result.
Case = tuple[Callable[[Any, Inputs], Any], Callable[[Any, Inputs], Any] | None]

CASES: dict[str, Case] = {
    "nms": (lambda o, i: o.nms(i.a, i.scores, 0.5), lambda v, i: v.ops.nms(i.a, i.scores, 0.5)),
    "batched_nms": (
        lambda o, i: o.batched_nms(i.a, i.scores, i.classes, 0.5),
        lambda v, i: v.ops.batched_nms(i.a, i.scores, i.classes, 0.5),
    ),
    "batched_nms_padded": (
        lambda o, i: o.batched_nms_padded(
            i.a[None], i.scores[None], i.classes[None], iou_threshold=0.5, max_detections=5
        ),
        None,
    ),
    "soft_nms": (lambda o, i: o.soft_nms(i.a[None], i.scores[None], i.classes[None], max_detections=5), None),
    **{
        name: (
            lambda o, i, name=name: getattr(o, name)(i.a, i.b),
            lambda v, i, name=name: getattr(v.ops, name)(i.a, i.b),
        )
        for name in OF_TWO_LISTS
    },
    **{
        f"{name}, with gradients": (
            lambda o, i, name=name: gradient(getattr(o, name)(i.a_grad, i.b_grad), i.a_grad, i.b_grad),
            lambda v, i, name=name: gradient(getattr(v.ops, name)(i.a_grad, i.b_grad), i.a_grad, i.b_grad),
        )
        for name in OF_TWO_LISTS
    },
    "match_anchors": (lambda o, i: o.match_anchors(i.grid, i.gt_boxes, i.gt_count), None),
    "assign_targets": (lambda o, i: o.assign_targets(i.grid, i.gt_boxes, i.gt_labels, i.gt_count), None),
    "match_statistics": (lambda o, i: o.match_statistics(i.grid, i.gt_boxes, i.gt_count), None),
    "encode_boxes": (
        lambda o, i: o.encode_boxes(i.anchors + 1, i.anchors),
        lambda v, i: coder().encode_single(i.anchors + 1, i.anchors),
    ),
    "decode_boxes": (
        lambda o, i: o.decode_boxes(i.rows, i.anchors),
        lambda v, i: coder().decode_single(i.rows, i.anchors),
    ),
    "decode_boxes, with gradients": (
        lambda o, i: gradient(o.decode_boxes(i.rows_grad, i.anchors), i.rows_grad),
        lambda v, i: gradient(coder().decode_single(i.rows_grad, i.anchors), i.rows_grad),
    ),
    "clip_boxes": (
        lambda o, i: o.clip_boxes(i.a, (9, 9)),
        lambda v, i: v.ops.clip_boxes_to_image(i.a, (9, 9)),
    ),
    "sigmoid_focal_loss": (
        lambda o, i: o.sigmoid_focal_loss(i.x, i.dense),
        lambda v, i: v.ops.sigmoid_focal_loss(i.x, i.dense),
    ),
    "sigmoid_focal_loss, with gradients": (
        lambda o, i: gradient(o.sigmoid_focal_loss(i.x_grad, i.dense, reduction="sum"), i.x_grad),
        lambda v, i: gradient(v.ops.sigmoid_focal_loss(i.x_grad, i.dense, reduction="sum"), i.x_grad),
    ),
    "dense_focal_loss": (lambda o, i: o.dense_focal_loss(i.logits, i.targets.labels, CLASSES), None),
    "dense_focal_loss, with gradients": (
        lambda o, i: gradient(o.dense_focal_loss(i.logits, i.targets.labels, CLASSES), *i.logits),
        None,
    ),
    "dense_box_loss": (lambda o, i: o.dense_box_loss(i.deltas, i.grid, i.gt_boxes, i.targets.matches), None),
    "dense_box_loss, with gradients": (
        lambda o, i: gradient(o.dense_box_loss(i.deltas, i.grid, i.gt_boxes, i.targets.matches), *i.deltas),
        None,
    ),
    "whole loss, with gradients": (whole_loss, None),
    "hard_negative_mask": (lambda o, i: o.hard_negative_mask(i.losses, i.targets.labels), None),
    "gather_class_scores": (lambda o, i: o.gather_class_scores(i.logits, i.index, CLASSES), None),
    "detect": (lambda o, i: o.detect(i.logits, i.deltas, i.grid, i.sizes, max_detections=5), None),
}


@pytest.mark.parametrize(
    ("case", "row"),
    [
        pytest.param(name, row, id=f"{name}-{row}")
        for name, (_, theirs) in CASES.items()
        for row in ("ours", "torchvision")
        if row == "ours" or theirs
    ],
)
def test_overhead(compare, device, case, row):
    inputs = Inputs(device)
    call, torchvision_call = CASES[case]
    ours = lambda: call(ops, inputs)  # noqa: E731
    theirs = None
    if torchvision_call:
        torchvision = pytest.importorskip("torchvision")
        theirs = lambda: torchvision_call(torchvision, inputs)  # noqa: E731
    function, rival = (ours, theirs) if row == "ours" else (theirs, None)
    compare(
        row,
        function,
        call(reference, inputs),
        check=lambda actual, expected: torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4),
        group=f"overhead, {case}",
        rival=rival,
        calls_per_round=5,
    )
