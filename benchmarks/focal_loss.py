"""Sigmoid focal loss of one COCO image, forward and backward: 201,600 anchors x 80 classes."""

import pytest
import torch
from harness import COCO_CLASSES
from torch import Tensor

import retinanet_ops as ops
from retinanet_ops import reference

ANCHORS = 201_600
DTYPES = (
    torch.float32,
    pytest.param(torch.bfloat16, marks=pytest.mark.full),
    pytest.param(torch.float16, marks=pytest.mark.full),
)


def with_gradient(loss, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Summed loss and its gradient."""
    leaf = logits.detach().requires_grad_()
    value = loss(leaf, targets)
    return value.detach(), torch.autograd.grad(value, leaf)[0]


@pytest.mark.parametrize("row", ("ours", "torchvision", "torch.compile"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_backward(compare, device, dtype, row):
    logits = torch.randn(ANCHORS, COCO_CLASSES).sub_(4).to(device, dtype)
    labels = torch.where(torch.rand(ANCHORS) < 0.002, torch.randint(0, COCO_CLASSES, (ANCHORS,)), -1).to(device)
    labels[torch.rand(ANCHORS, device=device) < 0.01] = -2
    valid = labels >= -1
    expected = with_gradient(lambda x, t: reference.sigmoid_focal_loss(x, t, reduction="sum"), logits.float(), labels)

    def dense(x: Tensor, t: Tensor) -> Tensor:
        import torchvision

        # What a user of the dense signature does with class ids: one-hot targets, ignored rows weighted away.
        one_hot = (t[:, None] == torch.arange(COCO_CLASSES, device=x.device)).to(x.dtype)
        return (torchvision.ops.sigmoid_focal_loss(x, one_hot) * valid[:, None]).sum()

    if row != "ours":
        pytest.importorskip("torchvision")
    loss = {
        "ours": lambda x, t: ops.sigmoid_focal_loss(x, t, reduction="sum"),
        "torchvision": dense,
        "torch.compile": torch.compile(dense) if row == "torch.compile" else None,
    }[row]

    def check(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
        if dtype == torch.float32:
            torch.testing.assert_close(actual[0], expected[0], rtol=1e-4, atol=0)
            torch.testing.assert_close(actual[1], expected[1], rtol=1e-3, atol=1e-6)
        elif row == "ours":  # in half precision the peers' formula loses the negatives; they are timed nevertheless
            torch.testing.assert_close(actual[1].float(), expected[1], rtol=1e-2, atol=1e-7)

    compare(
        row,
        lambda: with_gradient(loss, logits, labels),
        expected,
        check=check,
        bytes_moved=3 * logits.numel() * logits.element_size(),
        group=f"focal loss, forward + backward, {ANCHORS:,} x {COCO_CLASSES}, {dtype}",
    )
