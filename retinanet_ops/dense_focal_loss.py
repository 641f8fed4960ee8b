"""Focal loss computed from the outputs of a classification head, without a permuted or concatenated copy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference
from ._checks import (
    as_count,
    check_floating,
    check_focal_options,
    check_same_device,
    check_shape,
    refuse_forward_mode,
)
from ._fallback import with_fallback
from ._gradients import converted, differentiable, reference_gradients
from ._heads import check_anchor_integers, check_levels, empty_like_levels, second_derivatives
from .constants import MAX_CLASSES
from .types import compute_dtype


@with_fallback(reference.dense_focal_loss)
def dense_focal_loss(
    cls_logits: Sequence[Tensor],  # L tensors [N, A*K, H, W] floating
    labels: Tensor,  # [N, sum A*H*W] integer
    num_classes: int,
    *,
    alpha: float = 0.25,
    gamma: float = 2.0,
    anchor_weight: Tensor | None = None,  # [N, sum A*H*W] floating
    label_smoothing: float = 0.0,
) -> Tensor:  # [N]
    """Return the focal loss of each image, summed over all levels, anchors and classes.

    The op reads the levels as the head wrote them: it needs no permute, no cat and no one-hot target.

    Args:
        cls_logits: Outputs of the classification head, with the logit of class k of anchor a in channel `a * K + k`.
            All levels share one dtype: float16, bfloat16, float32 or float64. A level that is neither contiguous
            nor channels_last is copied.
        labels: Class 0..K-1 of each anchor, -1 for background (all K logits are negatives), or -2 for ignored (loss and
            gradient are 0, whatever the logits). Rows are ordered by level, y, x, and anchor of the cell, as
            `assign_targets` returns them.
        num_classes: K, the number of logits per anchor, 1 to 2^23.
        alpha: Weight of positives; negatives have weight `1 - alpha`. A negative value disables weighting.
        gamma: Exponent of the modulating factor, at least 0.
        anchor_weight: Factor of each anchor's loss. A factor of 0 makes the loss and the gradient of the anchor's
            logits 0, whatever the logits are.
        label_smoothing: Smoothing s in 0..1. The targets 1 and 0 become t = `1 - s / 2` and t = `s / 2`. The cross
            entropy, alpha and the modulating factor are interpolated with t, as for soft targets in
            `sigmoid_focal_loss`.

    Returns:
        The sum of each image, in float32, or in float64 for float64 logits. For the usual normalisation, divide it by
        `Targets.num_positive.clamp(min=1)`.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: A number of channels is not a multiple of `num_classes`, `labels` does not have one entry per
            anchor, another shape or device does not match, or an option is out of its range.
        NotImplementedError: A level or `anchor_weight` has a forward-mode tangent.

    A label outside -2..K-1 makes the loss of its image and the gradients of its anchor NaN. Empty input gives 0.

    The op is differentiable in `cls_logits` and `anchor_weight`. The backward kernel writes the gradient of
    `cls_logits` in the layout of each level. The reference computes the gradient of `anchor_weight` and second
    derivatives. For the backward pass the logits are saved, and no other tensor of their size.

    The op is deterministic. Sums are taken in a fixed order that depends on shapes and layouts, but not on the number
    of threads.

    Source: Lin et al., "Focal Loss for Dense Object Detection", 2017, eq. 5; smoothing of binary targets after Szegedy
    et al., "Rethinking the Inception Architecture", 2016, section 7.
    """
    op = "dense_focal_loss"
    num_classes = as_count(op, "num_classes", num_classes, 1)
    if num_classes > MAX_CLASSES:
        raise ValueError(f"{op}: num_classes must be at most {MAX_CLASSES}, got {num_classes}")
    check_levels(op, "cls_logits", cls_logits, "A*K")
    check_anchor_integers(op, "labels", labels, cls_logits, num_classes)
    refuse_forward_mode(op, *cls_logits, *(() if anchor_weight is None else (anchor_weight,)))
    check_focal_options(op, alpha, gamma)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{op}: label_smoothing must be in 0..1, got {label_smoothing}")
    if anchor_weight is not None:
        check_floating(op, "anchor_weight", anchor_weight)
        check_shape(op, "anchor_weight", anchor_weight, list(labels.shape))
        check_same_device(op, "anchor_weight", anchor_weight, "cls_logits", cls_logits[0])
        anchor_weight = converted(anchor_weight, compute_dtype(cls_logits[0]))
    if labels.dtype == torch.int64:
        # Values that int32 cannot hold must not wrap around to valid labels.
        labels = labels.clamp(-3, torch.iinfo(torch.int32).max)
    loss: Tensor = _dense_focal_loss(
        list(cls_logits),
        converted(labels, torch.int32),
        anchor_weight,
        num_classes,
        float(alpha),
        float(gamma),
        float(label_smoothing),
    )
    return loss


@torch.library.register_fake("retinanet_ops::dense_focal_loss")
def _(cls_logits: list[Tensor], labels: Tensor, *rest: object) -> Tensor:
    return labels.new_empty((labels.shape[0],), dtype=compute_dtype(cls_logits[0]))


@torch.library.register_fake("retinanet_ops::dense_focal_loss_backward")
def _(grad: Tensor, cls_logits: list[Tensor], *rest: object) -> list[Tensor]:
    return empty_like_levels(cls_logits)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    cls_logits, labels, anchor_weight, *ctx.options = inputs
    ctx.save_for_backward(labels, anchor_weight, *cls_logits)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    labels, anchor_weight, *cls_logits = ctx.saved_tensors
    grad_logits = grad_weight = None
    if any(ctx.needs_input_grad[0]):
        grad_logits = _dense_focal_loss_backward(grad, cls_logits, labels, anchor_weight, *ctx.options)
    if ctx.needs_input_grad[2]:
        loss = _reference_loss(labels, *ctx.options)
        needed = (False,) * len(cls_logits) + (True,)
        grad_weight = reference_gradients(loss, (*cls_logits, anchor_weight), needed, grad)[-1]
    return grad_logits, None, grad_weight, None, None, None, None


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    grad, cls_logits, labels, anchor_weight, *ctx.options = inputs
    ctx.save_for_backward(grad, labels, anchor_weight, *cls_logits)


def _double_backward(ctx: Any, grad_grads: list[Tensor]) -> tuple[Any, ...]:
    grad, labels, anchor_weight, *cls_logits = ctx.saved_tensors
    needs = ctx.needs_input_grad
    others, needed = ((), ()) if anchor_weight is None else ((anchor_weight,), (needs[3],))
    loss = _reference_loss(labels, *ctx.options)
    grads = second_derivatives(loss, grad, cls_logits, others, grad_grads, (needs[0], *needs[1], *needed))
    grad_weight = None if anchor_weight is None else grads[-1]
    return grads[0], grads[1 : 1 + len(cls_logits)], None, grad_weight, None, None, None, None


def _reference_loss(labels: Tensor, num_classes: int, alpha: float, gamma: float, label_smoothing: float) -> Any:
    def loss(*tensors: Tensor) -> Tensor:  # the levels, then `anchor_weight` if it is given
        levels = [t for t in tensors if t.dim() == 4]
        return reference.dense_focal_loss(
            levels,
            labels,
            num_classes,
            alpha=alpha,
            gamma=gamma,
            anchor_weight=tensors[-1] if len(levels) < len(tensors) else None,
            label_smoothing=label_smoothing,
        )

    return loss


_dense_focal_loss = differentiable("dense_focal_loss", _setup, _backward, levels_at=0)
_dense_focal_loss_backward = differentiable("dense_focal_loss_backward", _setup_backward, _double_backward, levels_at=1)
