"""Sigmoid focal loss for dense targets or class ids."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import reference
from ._checks import (
    check_floating,
    check_focal_options,
    check_same_device,
    check_tensor,
    is_integer,
    refuse_forward_mode,
)
from ._fallback import with_fallback
from ._gradients import differentiable, reference_gradients
from ._reduction import check_reduction
from .types import compute_dtype


@with_fallback(reference.sigmoid_focal_loss)
def sigmoid_focal_loss(
    inputs: Tensor,  # [...] floating
    targets: Tensor,  # same shape as inputs, or integer [...] without the last dimension
    alpha: float = 0.25,
    gamma: float = 2.0,
    reduction: str = "none",
) -> Tensor:  # inputs' shape, or [] for "sum" and "mean"
    """Return the focal loss of independent logits, `-alpha_t (1 - p_t)^gamma log(p_t)`.

    `1 - p` is never computed as a difference, so confident predictions lose no digits.

    Args:
        inputs: Logits, float16, bfloat16, float32 or float64. The loss of half-precision logits is computed in float32.
        targets: Either dense targets or class ids. Dense targets have the shape of `inputs`, any dtype, and values in
            0..1; values between 0 and 1 are soft targets. Class ids are integers of the shape of `inputs` without its
            last dimension K: a class 0..K-1, -1 for background (all K logits are negatives), or -2 for ignored (loss
            and gradient of the row are 0, whatever its logits).
        alpha: Weight of positives; negatives have weight `1 - alpha`. A negative value disables weighting.
        gamma: Exponent of the modulating factor, at least 0.
        reduction: "none", "sum" or "mean". The mean is over all elements, including ignored ones.

    Returns:
        The loss of each logit in the dtype of `inputs`, or the sum or mean, which is float32 for half-precision inputs.

    Raises:
        TypeError: `inputs` is not floating, `targets` is not a tensor, or class ids are not integers.
        ValueError: `targets` has neither shape or is on another device, `gamma` is negative, `alpha` is above 1, one of
            the two is not finite, or `reduction` is unknown.
        NotImplementedError: `inputs` or `targets` has a forward-mode tangent.

    A class id outside -2..K-1 makes the loss and the gradient of its row NaN, because raising an error would require a
    synchronisation with the device. A NaN logit makes only its own loss and gradient NaN. Empty input gives an empty
    result, 0 for "sum" and NaN for "mean".

    The op is differentiable in `inputs` and in dense `targets`. A kernel computes the gradient of `inputs`. The
    reference computes the gradient of `targets` and second derivatives. For the backward pass the logits and the
    targets are saved, and no other tensor of their size.

    The op is deterministic. Sums are taken in a fixed order that does not depend on the number of threads.

    Source: Lin et al., "Focal Loss for Dense Object Detection", 2017, eq. 5. The signature and the results for dense
    targets are those of `torchvision.ops.sigmoid_focal_loss`.
    """
    op = "sigmoid_focal_loss"
    check_floating(op, "inputs", inputs)
    check_tensor(op, "targets", targets)
    check_same_device(op, "targets", targets, "inputs", inputs)
    if targets.shape == inputs.shape:
        if targets.dtype != inputs.dtype:
            targets = targets.to(compute_dtype(inputs))
    elif targets.dim() == inputs.dim() - 1 and targets.shape == inputs.shape[:-1]:
        if not is_integer(targets):
            raise TypeError(f"{op}: class ids must be an integer tensor, got {targets.dtype}")
        if targets.dtype != torch.int32:
            targets = targets.to(torch.int64)
    else:
        raise ValueError(
            f"{op}: targets must have inputs' shape {list(inputs.shape)}, or hold class ids of shape "
            f"{list(inputs.shape[:-1])}, got {list(targets.shape)}"
        )
    refuse_forward_mode(op, inputs, targets)
    check_focal_options(op, alpha, gamma)
    check_reduction(op, reduction)
    loss = _sigmoid_focal_loss(inputs, targets, float(alpha), float(gamma), reduction != "none")
    return loss / inputs.numel() if reduction == "mean" else loss


@torch.library.register_fake("retinanet_ops::sigmoid_focal_loss")
def _(inputs: Tensor, targets: Tensor, alpha: float, gamma: float, reduce: bool) -> Tensor:
    if reduce:
        return inputs.new_empty((), dtype=compute_dtype(inputs))
    return torch.empty_like(inputs, memory_format=torch.contiguous_format)


@torch.library.register_fake("retinanet_ops::sigmoid_focal_loss_backward")
def _(grad: Tensor, inputs: Tensor, targets: Tensor, alpha: float, gamma: float) -> Tensor:
    return torch.empty_like(inputs, memory_format=torch.contiguous_format)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logits, targets, ctx.alpha, ctx.gamma, ctx.reduce = inputs
    ctx.save_for_backward(logits, targets)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    inputs, targets = ctx.saved_tensors
    grad_inputs = grad_targets = None
    if ctx.needs_input_grad[0]:
        grad_inputs = _sigmoid_focal_loss_backward(grad, inputs, targets, ctx.alpha, ctx.gamma)
    if ctx.needs_input_grad[1]:
        loss = _reference_loss(ctx.alpha, ctx.gamma, ctx.reduce)
        _, grad_targets = reference_gradients(loss, (inputs, targets), (False, True), grad)
    return grad_inputs, grad_targets, None, None, None


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, logits, targets, ctx.alpha, ctx.gamma = inputs
    ctx.save_for_backward(grad, logits, targets)


def _double_backward(ctx: Any, grad_grad: Tensor) -> tuple[Tensor | None, ...]:
    grad, inputs, targets = ctx.saved_tensors
    loss = _reference_loss(ctx.alpha, ctx.gamma, reduce=grad.dim() == 0)

    def grad_inputs(grad: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
        result = reference_gradients(loss, (inputs, targets), (True, False), grad)[0]
        assert result is not None
        return result

    needed = ctx.needs_input_grad[:3]
    return (*reference_gradients(grad_inputs, (grad, inputs, targets), needed, grad_grad), None, None)


def _reference_loss(alpha: float, gamma: float, reduce: bool) -> Any:
    return lambda inputs, targets: reference.sigmoid_focal_loss(
        inputs, targets, alpha, gamma, "sum" if reduce else "none"
    )


_sigmoid_focal_loss = differentiable("sigmoid_focal_loss", _setup, _backward)
_sigmoid_focal_loss_backward = differentiable("sigmoid_focal_loss_backward", _setup_backward, _double_backward)
