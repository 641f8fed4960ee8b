"""Focal loss straight from the tensors of a classification head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference
from ._heads import check_levels, empty_like_levels, second_derivatives
from ._options import check_focal_options
from ._wrapping import (
    check_floating,
    check_integer,
    check_same_device,
    check_shape,
    reference_gradients,
    refuse_forward_mode,
    with_fallback,
)
from .types import compute_dtype


@with_fallback(reference.dense_focal_loss)
def dense_focal_loss(
    cls_logits: Sequence[Tensor],  # L tensors [N, A*K, H, W] floating
    labels: Tensor,  # [N, sum A*H*W] integer
    *,
    alpha: float = 0.25,
    gamma: float = 2.0,
    weight: Tensor | None = None,  # [N, sum A*H*W] floating
    label_smoothing: float = 0.0,
) -> Tensor:  # [N]
    """Focal loss of each image, summed over all levels, anchors and classes; no permute, no cat, no one-hot.

    K, at most 2^23, is the number of logits over the number of labels: labels of too few anchors can pass for those
    of more classes.

    Args:
        cls_logits: Outputs of the classification head, channel `a * K + k`; float16, bfloat16, float32 or float64, all
            levels alike; each contiguous or channels_last (any other layout is copied).
        labels: Class 0..K-1 of each anchor, -1 for background (all K logits are negatives), -2 for ignored (loss and
            gradient 0, whatever the logits); rows ordered by level, y, x, anchor of the cell, as `assign_targets`
            gives them.
        alpha: Weight of positives; negatives weigh `1 - alpha`.  Negative: no weighting.
        gamma: Exponent of the modulating factor, >= 0.
        weight: Factor of each anchor's loss; 0 takes it out, whatever its logits.
        label_smoothing: Targets 1 and 0 become `1 - s / 2` and `s / 2`, s in 0..1, with the meaning that soft targets
            have in `sigmoid_focal_loss`.

    Returns:
        Sum of each image, float32 (float64 for float64 logits).  Divide it by `Targets.num_positive`.

    Raises:
        TypeError: A tensor has a wrong dtype.
        ValueError: Shapes do not fit each other, or an option is out of its range.

    A label outside -2..K-1 makes the loss of its image, and the gradients of its anchor, NaN.  Empty input: 0.

    Differentiable in `cls_logits`, by a kernel that writes each level's layout, and in `weight`; that and second
    derivatives work through the reference.  Nothing of the size of the logits is saved but the logits themselves.

    Deterministic: sums are taken in a fixed order, which depends on shapes and layout, not on threads.

    Source: Lin et al., "Focal Loss for Dense Object Detection", 2017, eq. 5; smoothing of two-way decisions after
    Szegedy et al., "Rethinking the Inception Architecture", 2016, section 7.
    """
    op = "dense_focal_loss"
    num_classes = _check(op, cls_logits, labels)
    refuse_forward_mode(op, *cls_logits, *(() if weight is None else (weight,)))
    check_focal_options(op, alpha, gamma)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{op}: label_smoothing must be in 0..1, got {label_smoothing}")
    if weight is not None:
        check_floating(op, "weight", weight)
        check_shape(op, "weight", weight, list(labels.shape))
        check_same_device(op, "weight", weight, "cls_logits", cls_logits[0])
        weight = weight.to(compute_dtype(cls_logits[0]))
    if labels.dtype == torch.int64:
        labels = labels.clamp(-3, torch.iinfo(torch.int32).max)  # what does not fit int32 stays out of range
    loss: Tensor = torch.ops.retinanet_ops.dense_focal_loss(
        list(cls_logits),
        labels.to(torch.int32),
        weight,
        num_classes,
        float(alpha),
        float(gamma),
        float(label_smoothing),
    )
    return loss


def _check(op: str, cls_logits: Sequence[Tensor], labels: Tensor) -> int:  # K
    check_levels(op, "cls_logits", cls_logits, "A*K")
    check_integer(op, "labels", labels)
    check_shape(op, "labels", labels, [cls_logits[0].shape[0], "sum A*H*W"])
    check_same_device(op, "labels", labels, "cls_logits", cls_logits[0])
    return _num_classes(op, cls_logits, labels)


def _num_classes(op: str, cls_logits: Sequence[Tensor], labels: Tensor) -> int:
    """The K with which the levels have one label for each anchor."""
    logits, anchors = sum(level.shape[1] * level.shape[2] * level.shape[3] for level in cls_logits), labels.shape[1]
    if logits == 0 and anchors == 0:
        return 1
    num_classes = logits // anchors if anchors > 0 else 0
    if num_classes == 0 or num_classes * anchors != logits:
        raise ValueError(f"{op}: labels must have one row for each anchor, got {anchors} rows for {logits} logits")
    for i, level in enumerate(cls_logits):
        if level.shape[1] % num_classes:
            raise ValueError(
                f"{op}: cls_logits[{i}] has {level.shape[1]} channels, which do not fit the {num_classes} classes that "
                f"{anchors} labels for {logits} logits give"
            )
    return num_classes


@torch.library.register_fake("retinanet_ops::dense_focal_loss")
def _(cls_logits: list[Tensor], labels: Tensor, *rest: object) -> Tensor:
    return labels.new_empty((labels.shape[0],), dtype=compute_dtype(cls_logits[0]))


@torch.library.register_fake("retinanet_ops::dense_focal_loss_backward")
def _(grad: Tensor, cls_logits: list[Tensor], *rest: object) -> list[Tensor]:
    return empty_like_levels(cls_logits)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    cls_logits, labels, weight, *ctx.options = inputs
    ctx.save_for_backward(labels, weight, *cls_logits)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    labels, weight, *cls_logits = ctx.saved_tensors
    grad_logits = grad_weight = None
    if any(ctx.needs_input_grad[0]):
        grad_logits = torch.ops.retinanet_ops.dense_focal_loss_backward(grad, cls_logits, labels, weight, *ctx.options)
    if ctx.needs_input_grad[2]:
        loss = _reference_loss(labels, *ctx.options)
        needed = (False,) * len(cls_logits) + (True,)
        grad_weight = reference_gradients(loss, (*cls_logits, weight), needed, grad)[-1]
    return grad_logits, None, grad_weight, None, None, None, None


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    grad, cls_logits, labels, weight, *ctx.options = inputs
    ctx.save_for_backward(grad, labels, weight, *cls_logits)


def _double_backward(ctx: Any, grad_grads: list[Tensor]) -> tuple[Any, ...]:
    grad, labels, weight, *cls_logits = ctx.saved_tensors
    needs = ctx.needs_input_grad
    others, needed = ((), ()) if weight is None else ((weight,), (needs[3],))
    loss = _reference_loss(labels, *ctx.options)
    grads = second_derivatives(loss, grad, cls_logits, others, grad_grads, (needs[0], *needs[1], *needed))
    grad_weight = None if weight is None else grads[-1]
    return grads[0], grads[1 : 1 + len(cls_logits)], None, grad_weight, None, None, None, None


def _reference_loss(labels: Tensor, num_classes: int, alpha: float, gamma: float, label_smoothing: float) -> Any:
    def loss(*tensors: Tensor) -> Tensor:  # the levels, and the weight if there is one
        levels = [t for t in tensors if t.dim() == 4]
        weight = tensors[-1] if len(levels) < len(tensors) else None
        return reference.dense_focal_loss(
            levels, labels, alpha=alpha, gamma=gamma, weight=weight, label_smoothing=label_smoothing
        )

    return loss


torch.library.register_autograd("retinanet_ops::dense_focal_loss", _backward, setup_context=_setup)
torch.library.register_autograd(
    "retinanet_ops::dense_focal_loss_backward", _double_backward, setup_context=_setup_backward
)
