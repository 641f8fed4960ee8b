"""Sigmoid focal loss of one COCO image, forward and backward: 201,600 anchors x 80 classes.

The row "ours, memory kept" has malloc keep the freed gradient of the step before, which spares the page faults of a
fresh one. The row "floor" is no loss: it reads the logits twice and writes as much as a gradient takes,
`x.sum(); x * 2`.
"""

from collections.abc import Callable

import pytest
import torch
from harness import COCO_CLASSES, keep_freed_memory, one_thread
from torch import Tensor

import retinanet_ops as ops
from retinanet_ops import reference

ANCHORS = 201_600
ROWS = (
    "ours",
    "ours, one thread",
    "torchvision",
    "torchvision compiled",
    "reference compiled",
    "floor",
    pytest.param("ours, memory kept", marks=pytest.mark.last),
)
DTYPES = (
    torch.float32,
    torch.bfloat16,
    pytest.param(torch.float16, marks=pytest.mark.full),
)


def with_gradient(loss: Callable[[Tensor, Tensor], Tensor], logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Summed loss and its gradient."""
    leaf = logits.detach().requires_grad_()
    value = loss(leaf, targets)
    return value.detach(), torch.autograd.grad(value, leaf)[0]


def labels_of(anchors: int, device: torch.device) -> Tensor:
    """Few positives, many negatives, and some anchors to be ignored."""
    labels = torch.where(torch.rand(anchors) < 0.002, torch.randint(0, COCO_CLASSES, (anchors,)), -1)
    labels[torch.rand(anchors) < 0.01] = -2
    return labels.to(device)


def torchvision_loss(x: Tensor, t: Tensor) -> Tensor:
    """What a user of the dense signature does with class ids: one-hot targets, ignored rows weighted away."""
    import torchvision

    one_hot = (t[..., None] == torch.arange(x.shape[-1], device=x.device)).to(x.dtype)
    return (torchvision.ops.sigmoid_focal_loss(x, one_hot) * (t >= -1)[..., None]).sum()


def reference_loss(x: Tensor, t: Tensor) -> Tensor:
    """The formula in PyTorch that is right in half precision, too."""
    return reference.sigmoid_focal_loss(x, t, reduction="sum")


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_backward(compare, device, dtype, row):
    if row.startswith("torchvision"):
        pytest.importorskip("torchvision")
    if row.startswith("ours, ") and device.type != "cpu":
        pytest.skip("threads and malloc matter on the CPU only")
    logits = torch.randn(ANCHORS, COCO_CLASSES).sub_(4).to(device, dtype)
    labels = labels_of(ANCHORS, device)
    expected = with_gradient(reference_loss, logits.float(), labels)

    def ours(x: Tensor, t: Tensor) -> Tensor:
        return ops.sigmoid_focal_loss(x, t, reduction="sum")

    loss = {
        "ours": ours,
        "ours, one thread": ours,
        "ours, memory kept": ours,
        "torchvision": torchvision_loss,
        "torchvision compiled": torch.compile(torchvision_loss) if row == "torchvision compiled" else None,
        "reference compiled": torch.compile(reference_loss) if row == "reference compiled" else None,
    }

    def check(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
        if row == "floor":
            return
        if dtype == torch.float32:
            torch.testing.assert_close(actual[0], expected[0], rtol=1e-4, atol=0)
            torch.testing.assert_close(actual[1], expected[1], rtol=1e-3, atol=1e-6)
        elif not row.startswith("torchvision"):  # whose formula loses the negatives in half precision
            torch.testing.assert_close(actual[0].float(), expected[0], rtol=1e-4, atol=0)
            torch.testing.assert_close(actual[1].float(), expected[1], rtol=1e-2, atol=1e-7)

    def floor() -> tuple[Tensor, Tensor]:
        return logits.sum(), torch.mul(logits, 2)

    if row.endswith("memory kept"):
        keep_freed_memory()
    with one_thread(row.endswith("one thread")):
        compare(
            row,
            floor if row == "floor" else lambda: with_gradient(loss[row], logits, labels),
            expected,
            check=check,
            bytes_moved=3 * logits.numel() * logits.element_size(),
            group=f"focal loss, forward + backward, {ANCHORS:,} x {COCO_CLASSES}, {dtype}",
        )
