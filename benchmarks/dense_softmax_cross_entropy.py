"""Softmax cross-entropy of SSD's default boxes, of which hard negative mining counts few."""

import pytest
import torch
import torch.nn.functional as F

import retinanet_ops as ops
from retinanet_ops import reference
from retinanet_ops.reference._rows import rows_of

IMAGES, CLASSES = 8, 91
#: Anchors of a cell, and side, of each map of SSD300.
LEVELS = ((4, 38), (6, 19), (6, 10), (6, 5), (4, 3), (4, 1))
ANCHORS = sum(per_cell * side**2 for per_cell, side in LEVELS)


@pytest.mark.parametrize("row", ("ours", "torch", "torch.compile"))
@pytest.mark.parametrize(
    "dtype",
    (torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.full)),
    ids=lambda dtype: str(dtype).removeprefix("torch."),
)
def test_dense_softmax_cross_entropy(compare, device, dtype, row):
    maps = [torch.randn(IMAGES, a * CLASSES, side, side) * 1.5 for a, side in LEVELS]
    logits = [level.to(device, dtype).requires_grad_() for level in maps]
    targets = torch.randint(0, CLASSES, (IMAGES, ANCHORS), dtype=torch.int32).to(device)
    counted = (torch.rand(IMAGES, ANCHORS) < 0.08).to(device)

    def torch_loss(logits, targets, num_classes):
        rows = rows_of(logits, num_classes).flatten(0, 1)
        return F.cross_entropy(rows, targets.flatten().long(), reduction="none").view_as(targets)

    loss = {"ours": ops.dense_softmax_cross_entropy, "torch": torch_loss, "torch.compile": torch.compile(torch_loss)}

    def step(loss):
        total = loss(logits, targets, CLASSES).where(counted, 0).sum()
        return (total.detach(), *torch.autograd.grad(total, logits))

    # torch computes the loss of half-precision logits in half precision.
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    compare(
        row,
        lambda: step(loss[row]),
        step(reference.dense_softmax_cross_entropy),
        check=lambda a, b: torch.testing.assert_close(a[0], b[0], rtol=tolerance, atol=0, check_dtype=False),
        bytes_moved=2 * sum(level.numel() * level.element_size() for level in logits),
        group=f"softmax cross-entropy, {IMAGES} x {ANCHORS:,} x {CLASSES}, forward and backward, {str(dtype)[6:]}",
        rival=(lambda: step(torch_loss)) if row == "ours" else None,
    )
