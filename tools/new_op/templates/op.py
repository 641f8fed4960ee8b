"""TODO: say what null_op is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import reference
from ._checks import as_finite, check_floating, refuse_forward_mode
from ._fallback import with_fallback
from ._gradients import differentiable


@with_fallback(reference.null_op)
def null_op(
    x: Tensor,  # [...] floating
    scale: float = 2.0,
) -> Tensor:  # x's shape
    """Multiply a tensor by a number.

    Args:
        x: Tensor with at least one dimension, float16, bfloat16, float32 or float64. Half-precision tensors are
            multiplied in float32.
        scale: The number.

    Returns:
        The product in the dtype of `x`.

    Raises:
        TypeError: `x` is not floating, or `scale` is not a number.
        ValueError: `x` has no dimension, or `scale` is not finite.
        NotImplementedError: `x` has a forward-mode tangent.

    NaN propagates. Empty input gives an empty result. The op is deterministic, and its result is the same on every
    backend.

    The op is differentiable in `x`. The gradient is the same op on the incoming gradient, so derivatives of every order
    work. An op with another gradient registers a second op, such as `null_op_backward`; see
    `sigmoid_focal_loss`.

    Source: TODO.
    """
    op = "null_op"
    check_floating(op, "x", x)
    refuse_forward_mode(op, x)
    if x.dim() == 0:
        raise ValueError(f"{op}: x must have at least one dimension, got []")
    return _null_op(x, as_finite(op, "scale", scale))


@torch.library.register_fake("retinanet_ops::null_op")
def _(x: Tensor, scale: float) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.scale = inputs


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _null_op(grad, ctx.scale), None


_null_op = differentiable("null_op", _setup, _backward)
