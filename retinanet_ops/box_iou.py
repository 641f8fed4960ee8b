"""Pairwise IoU of two sets of boxes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import reference
from ._wrapping import (
    check_floating,
    check_same_device,
    check_shape,
    reference_gradients,
    refuse_forward_mode,
    with_fallback,
)
from .types import compute_dtype


@with_fallback(reference.box_iou)
def box_iou(
    boxes1: Tensor,  # [M, 4] floating
    boxes2: Tensor,  # [N, 4] floating
) -> Tensor:  # [M, N]
    """Intersection over union of every pair of boxes.

    Args:
        boxes1: `(x1, y1, x2, y2)` pixels.
        boxes2: `(x1, y1, x2, y2)` pixels.

    Returns:
        IoU in float32, or float64 if an argument is float64.  A pair with a degenerate box (a side that is zero,
        negative, infinite or NaN) has IoU 0.

    Raises:
        TypeError: An argument is not floating.
        ValueError: A shape is not `[*, 4]`, or the devices differ.

    The bits are the same on every backend.  Differentiable.  Empty input: empty.  Deterministic.
    Source: equals `torchvision.ops.box_iou` on valid boxes.
    """
    for name, boxes in (("boxes1", boxes1), ("boxes2", boxes2)):
        check_floating("box_iou", name, boxes)
        check_shape("box_iou", name, boxes, ["M" if name == "boxes1" else "N", 4])
    check_same_device("box_iou", "boxes2", boxes2, "boxes1", boxes1)
    refuse_forward_mode("box_iou", boxes1, boxes2)
    dtype = compute_dtype(boxes1, boxes2)
    return torch.ops.retinanet_ops.box_iou(boxes1.to(dtype), boxes2.to(dtype))


@torch.library.register_fake("retinanet_ops::box_iou")
def _(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    return boxes1.new_empty((boxes1.shape[0], boxes2.shape[0]))


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return tuple(reference_gradients(reference.box_iou, ctx.saved_tensors, ctx.needs_input_grad, grad))


torch.library.register_autograd("retinanet_ops::box_iou", _backward, setup_context=_setup)
