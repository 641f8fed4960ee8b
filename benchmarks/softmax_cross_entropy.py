"""Softmax cross-entropy of SSD's default boxes, of which hard negative mining counts few."""

import pytest
import torch
import torch.nn.functional as F

import retinanet_ops as ops
from retinanet_ops import reference

IMAGES, ANCHORS, CLASSES = 8, 8732, 91


@pytest.mark.parametrize("row", ("ours", "torch", "torch.compile"))
@pytest.mark.parametrize(
    "dtype",
    (torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.full)),
    ids=lambda dtype: str(dtype).removeprefix("torch."),
)
def test_softmax_cross_entropy(compare, device, dtype, row):
    logits = (torch.randn(IMAGES, ANCHORS, CLASSES) * 1.5).to(device, dtype).requires_grad_()
    targets = torch.randint(0, CLASSES, (IMAGES, ANCHORS), dtype=torch.int32).to(device)
    counted = (torch.rand(IMAGES, ANCHORS) < 0.08).to(device)

    def torch_loss(logits, targets):
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten().long(), reduction="none").view_as(targets)

    loss = {"ours": ops.softmax_cross_entropy, "torch": torch_loss, "torch.compile": torch.compile(torch_loss)}[row]

    def step(loss):
        logits.grad = None
        total = loss(logits, targets).where(counted, 0).sum()
        total.backward()
        return total.detach()

    # torch computes the loss of half-precision logits in half precision.
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    compare(
        row,
        lambda: step(loss),
        step(reference.softmax_cross_entropy),
        check=lambda a, b: torch.testing.assert_close(a, b, rtol=tolerance, atol=0, check_dtype=False),
        bytes_moved=2 * logits.numel() * logits.element_size(),
        group=f"softmax cross-entropy, {IMAGES} x {ANCHORS:,} x {CLASSES}, forward and backward, {str(dtype)[6:]}",
        rival=(lambda: step(torch_loss)) if row == "ours" else None,
    )
