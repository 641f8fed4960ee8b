"""Softmax cross-entropy computed from the outputs of a classification head, without a permuted copy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from . import reference
from ._checks import as_count, refuse_forward_mode
from ._fallback import with_fallback
from ._gradients import converted, differentiable
from ._heads import check_anchor_integers, check_levels, empty_like_levels, second_derivatives
from .types import compute_dtype


@with_fallback(reference.dense_softmax_cross_entropy)
def dense_softmax_cross_entropy(
    cls_logits: Sequence[Tensor],  # L tensors [N, A*K, H, W] floating
    targets: Tensor,  # [N, sum A*H*W] integer
    num_classes: int,
) -> Tensor:  # [N, sum A*H*W]
    """Return the softmax cross-entropy of each anchor, `log(sum_k exp(x_k)) - x_target`.

    This is the classification loss of SSD, whose class 0 is the background. The op reads the levels as the head wrote
    them: it needs no permute and no cat. The backward pass reads only logits near anchors whose incoming gradient is
    not 0. With hard negative mining, these are few.

    Args:
        cls_logits: Outputs of the classification head, with the logit of class k of anchor a in channel `a * K + k`.
            All levels share one dtype: float16, bfloat16, float32 or float64. A level that is neither contiguous
            nor channels_last is copied.
        targets: Class id 0..K-1 of each anchor, or -2 for ignored (loss and gradient are 0, whatever the logits). Rows
            are ordered by level, y, x, and anchor of the cell, as in the labels of `assign_targets`.
        num_classes: K, the number of logits per anchor, at least 1. It counts the background, if that is a class.

    Returns:
        The loss of each anchor, in float32, or in float64 for float64 logits.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: A number of channels is not a multiple of `num_classes`, `targets` does not have one entry per
            anchor, or another shape or device does not match.
        NotImplementedError: A level has a forward-mode tangent.

    Any other target, background (-1) included, makes the loss and the gradient of its anchor NaN. A NaN logit makes the
    loss and the gradient of its anchor NaN, and no other. An anchor whose incoming gradient is 0 has gradient 0,
    whatever its logits and its target. Empty input gives an empty result.

    The op is differentiable in `cls_logits`. The backward kernel writes the gradient in the layout of each level. For
    the backward pass the inputs are saved, and two numbers per anchor: its highest logit, and the sum of the
    exponentials. The reference computes second derivatives.

    The op is deterministic. Sums are taken in a fixed order that depends on shapes and layouts, but not on the number
    of threads.

    Source: the results of `torch.nn.functional.cross_entropy(reduction="none")`.
    """
    op = "dense_softmax_cross_entropy"
    num_classes = as_count(op, "num_classes", num_classes, 1)
    check_levels(op, "cls_logits", cls_logits, "A*K")
    check_anchor_integers(op, "targets", targets, cls_logits, num_classes)
    refuse_forward_mode(op, *cls_logits)
    if targets.dtype == torch.int64:
        targets = targets.clamp(-3, torch.iinfo(torch.int32).max)  # an id beyond int32 stays out of range
    loss, _ = _dense_softmax_cross_entropy(list(cls_logits), converted(targets, torch.int32), num_classes)
    return cast(Tensor, loss)


@torch.library.register_fake("retinanet_ops::dense_softmax_cross_entropy")
def _(cls_logits: list[Tensor], targets: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(cls_logits[0])
    return targets.new_empty(targets.shape, dtype=dtype), targets.new_empty((*targets.shape, 2), dtype=dtype)


@torch.library.register_fake("retinanet_ops::dense_softmax_cross_entropy_backward")
def _(grad: Tensor, cls_logits: list[Tensor], *rest: object) -> list[Tensor]:
    return empty_like_levels(cls_logits)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    cls_logits, targets, ctx.num_classes = inputs
    _, softmax = output  # [N, A, 2]: the highest logit of each anchor, and the sum of exp(logit - highest logit)
    ctx.mark_non_differentiable(softmax)
    ctx.save_for_backward(targets, softmax, *cls_logits)
    ctx.set_materialize_grads(False)  # would launch a kernel that fills a gradient of `softmax`


def _backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Any, ...]:
    targets, softmax, *cls_logits = ctx.saved_tensors
    if grad is None:
        return [None] * len(cls_logits), None, None
    return _dense_softmax_cross_entropy_backward(grad, cls_logits, targets, softmax, ctx.num_classes), None, None


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    grad, cls_logits, targets, _, ctx.num_classes = inputs
    ctx.save_for_backward(grad, targets, *cls_logits)


def _double_backward(ctx: Any, grad_grads: list[Tensor]) -> tuple[Any, ...]:
    grad, targets, *cls_logits = ctx.saved_tensors

    def loss(*levels: Tensor) -> Tensor:
        return reference.dense_softmax_cross_entropy(levels, targets, ctx.num_classes)

    needed = (ctx.needs_input_grad[0], *ctx.needs_input_grad[1])
    grad_of_grad, *of_levels = second_derivatives(loss, grad, cls_logits, (), grad_grads, needed)
    return grad_of_grad, of_levels, None, None, None


_dense_softmax_cross_entropy = differentiable("dense_softmax_cross_entropy", _setup, _backward, levels_at=0)
_dense_softmax_cross_entropy_backward = differentiable(
    "dense_softmax_cross_entropy_backward", _setup_backward, _double_backward, levels_at=1
)
