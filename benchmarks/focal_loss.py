"""Sigmoid focal loss of one COCO image, forward and backward: 201,600 anchors x 80 classes.

In the row "ours, memory kept", malloc reuses the memory of the previous gradient, which avoids the page faults of fresh
memory. The row "floor" computes no loss. It runs `x.sum(); x * 2`, which reads the logits twice and writes as many
bytes as their gradient has.
"""

from collections.abc import Callable, Sequence

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

#: Maps the tensors of the logits to a summed loss.
Loss = Callable[..., Tensor]


def with_gradients(loss: Loss, logits: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return the summed loss and its gradients."""
    leaves = [x.detach().requires_grad_() for x in logits]
    value = loss(*leaves)
    return value.detach(), *torch.autograd.grad(value, leaves)


def check_focal(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], row: str) -> None:
    """Assert that a row's results are close to the reference's on the same logits in float32."""
    dtype = actual[1].dtype
    if row == "floor" or (row.startswith("torchvision") and dtype != torch.float32):
        return  # the floor computes no loss, and torchvision's formula is wrong for negatives in half precision
    torch.testing.assert_close(actual[0].float(), expected[0], rtol=1e-4, atol=0)
    tolerance = {"rtol": 1e-3, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-7}
    for mine, right in zip(actual[1:], expected[1:], strict=True):
        torch.testing.assert_close(mine.float(), right, **tolerance)


def loss_of(row: str, ours: Loss, torchvision: Loss, reference: Loss) -> Loss:
    """Return the loss that a row times."""
    if row.startswith("ours"):
        return ours
    loss = torchvision if row.startswith("torchvision") else reference
    return torch.compile(loss) if row.endswith("compiled") else loss


def labels_of(anchors: int, device: torch.device) -> Tensor:
    """Return labels with few positives, many negatives and some ignored anchors."""
    labels = torch.where(torch.rand(anchors) < 0.002, torch.randint(0, COCO_CLASSES, (anchors,)), -1)
    labels[torch.rand(anchors) < 0.01] = -2
    return labels.to(device)


def torchvision_loss(x: Tensor, t: Tensor) -> Tensor:
    """Compute the loss with torchvision's dense signature: one-hot targets, ignored rows multiplied by 0."""
    import torchvision

    one_hot = (t[..., None] == torch.arange(x.shape[-1], device=x.device)).to(x.dtype)
    return (torchvision.ops.sigmoid_focal_loss(x, one_hot) * (t >= -1)[..., None]).sum()


def reference_loss(x: Tensor, t: Tensor) -> Tensor:
    """Compute the loss with the reference, which is right in half precision, too."""
    return reference.sigmoid_focal_loss(x, t, reduction="sum")


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_backward(compare, device, dtype, row):
    if row.startswith("torchvision"):
        pytest.importorskip("torchvision")
    if row.startswith("ours, ") and device.type != "cpu":
        pytest.skip("the number of threads and malloc matter on the CPU only")
    logits = torch.randn(ANCHORS, COCO_CLASSES).sub_(4).to(device, dtype)
    labels = labels_of(ANCHORS, device)

    def ours(x: Tensor) -> Tensor:
        return ops.sigmoid_focal_loss(x, labels, reduction="sum")

    def theirs(x: Tensor) -> Tensor:
        return torchvision_loss(x, labels)

    def plain(x: Tensor) -> Tensor:
        return reference_loss(x, labels)

    def floor() -> tuple[Tensor, Tensor]:
        return logits.sum(), torch.mul(logits, 2)

    loss = loss_of(row, ours, theirs, plain)
    if row.endswith("memory kept"):
        keep_freed_memory()
    with one_thread(row.endswith("one thread")):
        compare(
            row,
            floor if row == "floor" else lambda: with_gradients(loss, [logits]),
            with_gradients(plain, [logits.float()]),
            check=lambda actual, expected: check_focal(actual, expected, row),
            bytes_moved=3 * logits.numel() * logits.element_size(),
            group=f"focal loss, forward + backward, {ANCHORS:,} x {COCO_CLASSES}, {dtype}",
        )
