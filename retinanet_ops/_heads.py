"""Helpers of the ops that read the outputs of the heads: checks, layouts of gradients, second derivatives."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ._checks import check_floating, check_integer, check_same_device, check_shape
from ._gradients import reference_gradients
from .constants import MAX_LEVELS


def check_levels(op: str, name: str, levels: Sequence[Tensor], channels: str) -> None:
    """Raise unless the levels are 1 to 16 floating tensors [N, channels, H, W] of one dtype on one device."""
    if not isinstance(levels, Sequence):
        raise TypeError(f"{op}: {name} must be a list of tensors, got {type(levels).__name__}")
    if not 1 <= len(levels) <= MAX_LEVELS:
        raise ValueError(f"{op}: {name} must hold 1 to {MAX_LEVELS} levels, got {len(levels)}")
    first = levels[0]
    check_floating(op, f"{name}[0]", first)
    dtype, device, shape = first.dtype, first.device, first.shape
    for i, level in enumerate(levels):
        # One cheap test of all conditions. Only a level that fails it is checked one condition at a time.
        if (
            isinstance(level, Tensor)
            and level.dtype == dtype
            and level.dim() == 4
            and level.shape[0] == shape[0]
            and level.device == device
        ):
            continue
        check_floating(op, f"{name}[{i}]", level)
        check_shape(op, f"{name}[{i}]", level, [shape[0], channels, "H", "W"])
        check_same_device(op, f"{name}[{i}]", level, f"{name}[0]", first)
        raise TypeError(f"{op}: {name}[{i}] must have {name}[0]'s dtype {dtype}, got {level.dtype}")


def check_anchor_integers(
    op: str,
    name: str,
    integers: Tensor,
    cls_logits: Sequence[Tensor],
    num_classes: int,
) -> None:
    """Raise unless every level holds whole rows of logits and `integers`, called `name`, has one for each row."""
    check_integer(op, name, integers)
    check_same_device(op, name, integers, "cls_logits", cls_logits[0])
    images, anchors = cls_logits[0].shape[0], 0
    for i, level in enumerate(cls_logits):
        _, channels, height, width = level.shape
        if channels % num_classes:
            raise ValueError(
                f"{op}: cls_logits[{i}] must have a multiple of num_classes {num_classes} channels, got {channels}"
            )
        anchors += channels // num_classes * height * width
    if integers.shape != (images, anchors):
        raise ValueError(
            f"{op}: {name} must have shape [{images}, {anchors}], one entry for each anchor, got {list(integers.shape)}"
        )


def empty_like_levels(levels: Sequence[Tensor]) -> list[Tensor]:
    """Return uninitialised tensors in the layouts in which kernels write the gradients of the levels."""
    return [torch.empty_like(level if _is_channels_last(level) else level.contiguous()) for level in levels]


def _is_channels_last(level: Tensor) -> bool:  # [N, C, H, W]
    """Return whether the kernels treat the level as channels_last.

    The rule is stricter than PyTorch's for dimensions of size 1. csrc/common/heads.h has the same rule.
    """
    _, c, h, w = level.shape
    return not level.is_contiguous() and level.stride() == (h * w * c, 1, w * c, c)


def second_derivatives(
    loss: Callable[..., Tensor],
    grad: Tensor,  # [N]
    levels: Sequence[Tensor],
    others: Sequence[Tensor],
    grad_grads: Sequence[Tensor | None],
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """Differentiate the gradients of `loss(*levels, *others)` with respect to the levels.

    Args:
        loss: Reference that returns one number per image.
        grad: Gradient that the first backward pass received.
        levels: Outputs of the heads.
        others: Further differentiable arguments of `loss`.
        grad_grads: Gradient that this backward pass received for the gradient of each level; None stands for zero.
        needed: Whether each of `grad`, `levels` and `others` needs a derivative.

    Returns:
        The derivative of each of `grad`, `levels` and `others`, or None where it is not needed.
    """

    def weighted_gradients(grad: Tensor, *tensors: Tensor) -> Tensor:
        of_levels = [i < len(levels) for i in range(len(tensors))]
        gradients = reference_gradients(loss, tensors, of_levels, grad)
        return sum(
            ((g * w).sum() for g, w in zip(gradients, grad_grads, strict=False) if g is not None and w is not None),
            start=grad.new_zeros(()),
        )

    return reference_gradients(weighted_gradients, (grad, *levels, *others), needed, grad.new_ones(()))
