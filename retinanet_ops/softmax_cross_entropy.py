"""Softmax cross-entropy of rows of logits with class ids."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from . import reference
from ._checks import check_floating, check_integer, check_same_device, check_shape, refuse_forward_mode
from ._fallback import with_fallback
from ._gradients import differentiable, reference_gradients
from .types import compute_dtype


@with_fallback(reference.softmax_cross_entropy)
def softmax_cross_entropy(
    inputs: Tensor,  # [..., K] floating
    targets: Tensor,  # [...] integer
) -> Tensor:  # [...]
    """Return the softmax cross-entropy of each row, `log(sum_k exp(x_k)) - x_target`.

    This is the classification loss of SSD, whose class 0 is the background. Only the loss of each row is written. The
    backward pass computes the softmax of a row again, and only where its incoming gradient is not 0. With hard negative
    mining, these are few rows.

    Args:
        inputs: Logits, float16, bfloat16, float32 or float64. The loss of half-precision logits is computed in float32.
        targets: Class id 0..K-1 of each row, or -2 for ignored (loss and gradient of the row are 0, whatever its
            logits).

    Returns:
        The loss of each row, in float32, or in float64 for float64 logits.

    Raises:
        TypeError: `inputs` is not floating, or `targets` are not integers.
        ValueError: `targets` has another shape or is on another device, or there are no classes.
        NotImplementedError: `inputs` has a forward-mode tangent.

    Any other target, background (-1) included, makes the loss and the gradient of its row NaN. A NaN logit makes the
    loss and the gradient of its row NaN, and no other. A row whose incoming gradient is 0 has gradient 0, whatever its
    logits and its target. Empty input gives an empty result.

    The op is differentiable in `inputs`. For the backward pass the logits and the targets are saved. The reference
    computes second derivatives. The op is deterministic. Sums are taken in a fixed order that does not depend on the
    number of threads.

    Source: the results of `torch.nn.functional.cross_entropy(reduction="none")`.
    """
    op = "softmax_cross_entropy"
    check_floating(op, "inputs", inputs)
    check_integer(op, "targets", targets)
    if inputs.dim() == 0 or inputs.shape[-1] == 0:
        raise ValueError(f"{op}: inputs must have shape [..., K] with at least one class, got {list(inputs.shape)}")
    check_shape(op, "targets", targets, inputs.shape[:-1])
    check_same_device(op, "targets", targets, "inputs", inputs)
    refuse_forward_mode(op, inputs)
    if targets.dtype != torch.int32:
        if targets.dtype == torch.int64:
            targets = targets.clamp(-3, torch.iinfo(torch.int32).max)  # an id beyond int32 stays out of range
        targets = targets.to(torch.int32)
    return cast(Tensor, _softmax_cross_entropy(inputs, targets))


@torch.library.register_fake("retinanet_ops::softmax_cross_entropy")
def _(inputs: Tensor, targets: Tensor) -> Tensor:
    return inputs.new_empty(targets.shape, dtype=compute_dtype(inputs))


@torch.library.register_fake("retinanet_ops::softmax_cross_entropy_backward")
def _(grad: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
    return torch.empty_like(inputs, memory_format=torch.contiguous_format)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _softmax_cross_entropy_backward(grad, *ctx.saved_tensors), None


def _double_backward(ctx: Any, grad_grad: Tensor) -> tuple[Tensor | None, ...]:
    grad, inputs, targets = ctx.saved_tensors

    def grad_inputs(grad: Tensor, inputs: Tensor) -> Tensor:
        def loss(inputs: Tensor) -> Tensor:
            return reference.softmax_cross_entropy(inputs, targets)

        result = reference_gradients(loss, (inputs,), (True,), grad)[0]
        assert result is not None
        return result

    return (*reference_gradients(grad_inputs, (grad, inputs), ctx.needs_input_grad[:2], grad_grad), None)


_softmax_cross_entropy = differentiable("softmax_cross_entropy", _setup, _backward)
_softmax_cross_entropy_backward = differentiable("softmax_cross_entropy_backward", _setup, _double_backward)
