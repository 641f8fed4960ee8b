"""What the ops on the heads' own tensors share: checks of the levels, the layout of gradients, second derivatives."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ._wrapping import check_floating, check_same_device, check_shape, reference_gradients
from .constants import MAX_LEVELS


def check_levels(op: str, name: str, levels: Sequence[Tensor], channels: str) -> None:
    """Raise unless the levels are a list of 1 to 16 floating tensors [N, channels, H, W] of one dtype on one device."""
    if not isinstance(levels, Sequence):
        raise TypeError(f"{op}: {name} must be a list of tensors, got {type(levels).__name__}")
    if not 1 <= len(levels) <= MAX_LEVELS:
        raise ValueError(f"{op}: {name} must hold 1 to {MAX_LEVELS} levels, got {len(levels)}")
    for i, level in enumerate(levels):
        check_floating(op, f"{name}[{i}]", level)
        check_shape(op, f"{name}[{i}]", level, [levels[0].shape[0], channels, "H", "W"])
        check_same_device(op, f"{name}[{i}]", level, f"{name}[0]", levels[0])
        if level.dtype != levels[0].dtype:
            raise TypeError(f"{op}: all levels must have one dtype, level {i} differs from level 0")


def empty_like_levels(levels: Sequence[Tensor]) -> list[Tensor]:
    """Tensors of the layouts that kernels give to the levels' gradients."""
    return [torch.empty_like(level if _is_channels_last(level) else level.contiguous()) for level in levels]


def _is_channels_last(level: Tensor) -> bool:  # [N, C, H, W]
    """The kernels' own rule (csrc/common/heads.h): stricter than PyTorch's about sizes of 1."""
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
    """Derivatives by `grad`, the levels and the others of the gradients that `loss(*levels, *others)` gives its levels.

    Args:
        loss: A reference of one number for each image.
        grad: What the loss's backward was given.
        levels: The heads' tensors.
        others: Further tensors with gradients.
        grad_grads: What this backward is given for each level's gradient.
        needed: Which of `grad`, `levels` and `others` need a derivative.
    """

    def weighted_gradients(grad: Tensor, *tensors: Tensor) -> Tensor:
        of_levels = [i < len(levels) for i in range(len(tensors))]
        gradients = reference_gradients(loss, tensors, of_levels, grad)
        return sum(
            ((g * w).sum() for g, w in zip(gradients, grad_grads, strict=False) if g is not None and w is not None),
            start=grad.new_zeros(()),
        )

    return reference_gradients(weighted_gradients, (grad, *levels, *others), needed, grad.new_ones(()))
