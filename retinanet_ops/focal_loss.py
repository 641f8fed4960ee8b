"""Sigmoid focal loss for dense targets or class ids."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import reference
from ._checks import (
    as_finite,
    check_floating,
    check_focal_options,
    check_number,
    check_same_device,
    check_tensor,
    is_integer,
    refuse_forward_mode,
)
from ._fallback import with_fallback
from ._gradients import converted, differentiable, reference_gradients
from ._reduction import check_reduction
from .constants import IGNORED
from .types import compute_dtype


@with_fallback(reference.sigmoid_focal_loss)
def sigmoid_focal_loss(
    inputs: Tensor,  # [...] floating
    targets: Tensor,  # same shape as inputs, or integer [...] without the last dimension
    alpha: float = 0.25,
    gamma: float = 2.0,
    reduction: str = "none",
    *,
    pos_weight: Tensor | float | None = None,  # [K], [K, 1, ..., 1] or one number
    ignore_value: float | None = None,
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
        pos_weight: Factor of the losses of positives: one number, or one of each class. Shape [K] is for classes in the
            last dimension of `inputs`. With dense targets, any shape that broadcasts to that of `inputs` along one
            dimension will do, such as [K, 1, 1] for maps [N, K, H, W]. The loss of an element with a soft target t has
            the factor `1 + (pos_weight - 1) t`. An element whose factor is 0 has loss and gradient 0, whatever its
            logit.
        ignore_value: Dense target of elements that are ignored: their loss and gradient are 0, whatever their logit.
            It is rounded to the dtype of floating targets.

    Returns:
        The loss of each logit in the dtype of `inputs`, or the sum or mean, which is float32 for half-precision inputs.

    Raises:
        TypeError: `inputs` is not floating, `targets` is not a tensor, class ids are not integers, `pos_weight` is
            neither a number nor a tensor of numbers, or `ignore_value` is not a number.
        ValueError: `targets` has neither shape or is on another device, `gamma` is negative, `alpha` is above 1, a
            number is not finite, `reduction` is unknown, `pos_weight` does not fit `inputs` or is on another device, or
            `ignore_value` is given with class ids.
        NotImplementedError: `inputs`, `targets` or `pos_weight` has a forward-mode tangent.

    A class id outside -2..K-1 makes the loss and the gradient of its row NaN, because raising an error would require a
    synchronisation with the device. A NaN logit makes only its own loss and gradient NaN. Empty input gives an empty
    result, 0 for "sum" and NaN for "mean".

    The op is differentiable in `inputs`, in dense `targets` and in `pos_weight`. A kernel computes the gradient of
    `inputs`. The reference computes the other gradients and second derivatives. For the backward pass the logits and
    the targets are saved, and no other tensor of their size.

    The op is deterministic. Sums are taken in a fixed order that does not depend on the number of threads.

    Source: Lin et al., "Focal Loss for Dense Object Detection", 2017, eq. 5. The signature and the results for dense
    targets are those of `torchvision.ops.sigmoid_focal_loss`. With targets 0 and 1, `pos_weight` is that of
    `torch.nn.BCEWithLogitsLoss`.
    """
    op = "sigmoid_focal_loss"
    check_floating(op, "inputs", inputs)
    check_tensor(op, "targets", targets)
    check_same_device(op, "targets", targets, "inputs", inputs)
    if ignore_value is not None:
        ignore_value = as_finite(op, "ignore_value", ignore_value)
    if targets.shape == inputs.shape:
        if targets.dtype != inputs.dtype:
            given, targets = targets, targets.to(compute_dtype(inputs))
            if ignore_value is not None and given.is_floating_point():
                targets = targets.masked_fill(given == ignore_value, ignore_value)  # where it is equal when rounded
    elif targets.dim() == inputs.dim() - 1 and targets.shape == inputs.shape[:-1]:
        if not is_integer(targets):
            raise TypeError(f"{op}: class ids must be an integer tensor, got {targets.dtype}")
        if ignore_value is not None:
            raise ValueError(f"{op}: ignore_value is for dense targets; the class id of ignored rows is {IGNORED}")
        if targets.dtype != torch.int32:
            targets = targets.to(torch.int64)
    else:
        raise ValueError(
            f"{op}: targets must have inputs' shape {list(inputs.shape)}, or hold class ids of shape "
            f"{list(inputs.shape[:-1])}, got {list(targets.shape)}"
        )
    if pos_weight is not None:
        pos_weight = _factors_of_positives(op, pos_weight, inputs, dense=targets.shape == inputs.shape)
    refuse_forward_mode(op, inputs, targets, *(() if pos_weight is None else (pos_weight,)))
    check_focal_options(op, alpha, gamma)
    check_reduction(op, reduction)
    loss = _sigmoid_focal_loss(
        inputs, targets, pos_weight, float(alpha), float(gamma), ignore_value, reduction != "none"
    )
    return loss / inputs.numel() if reduction == "mean" else loss


def _factors_of_positives(op: str, pos_weight: Any, inputs: Tensor, dense: bool) -> Tensor:
    """Return the factors of positives in the compute dtype of the logits, in a shape that the kernels take."""
    dtype = compute_dtype(inputs)
    if isinstance(pos_weight, Tensor):
        check_number(op, "pos_weight", pos_weight)
        factors = pos_weight
    else:
        if hasattr(pos_weight, "__len__") and not isinstance(pos_weight, str):
            check_tensor(op, "pos_weight", pos_weight)
        factors = inputs.new_full((1,), as_finite(op, "pos_weight", pos_weight), dtype=dtype)
    check_same_device(op, "pos_weight", factors, "inputs", inputs)
    shape, single = list(factors.shape), factors.numel() == 1
    if dense:
        # The sizes other than 1, and those of `inputs` that they are compared with.
        paired = zip(reversed(shape), reversed(inputs.shape), strict=False)
        sizes = [(size, expected) for size, expected in paired if size != 1]
        fits = single or (len(shape) <= inputs.dim() and len(sizes) == 1 and sizes[0][0] == sizes[0][1])
    else:
        fits = single or shape == [inputs.shape[-1]]
    if not fits:
        maps = ", or broadcast to inputs' shape along one dimension, such as [K, 1, 1] for maps" if dense else ""
        last = inputs.shape[-1] if inputs.dim() else 1
        raise ValueError(f"{op}: pos_weight must be a number, have shape [{last}]{maps}, got {shape}")
    if single and not dense:
        factors = factors.reshape(1).expand(inputs.shape[-1])
    return converted(factors, dtype)


@torch.library.register_fake("retinanet_ops::sigmoid_focal_loss")
def _(
    inputs: Tensor,
    targets: Tensor,
    pos_weight: Tensor | None,
    alpha: float,
    gamma: float,
    ignore_value: float | None,
    reduce: bool,
) -> Tensor:
    if reduce:
        return inputs.new_empty((), dtype=compute_dtype(inputs))
    return torch.empty_like(inputs, memory_format=torch.contiguous_format)


@torch.library.register_fake("retinanet_ops::sigmoid_focal_loss_backward")
def _(
    grad: Tensor,
    inputs: Tensor,
    targets: Tensor,
    pos_weight: Tensor | None,
    alpha: float,
    gamma: float,
    ignore_value: float | None,
) -> Tensor:
    return torch.empty_like(inputs, memory_format=torch.contiguous_format)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logits, targets, pos_weight, ctx.alpha, ctx.gamma, ctx.ignore_value, ctx.reduce = inputs
    ctx.save_for_backward(logits, targets, pos_weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    inputs, targets, pos_weight = ctx.saved_tensors
    grad_inputs = None
    if ctx.needs_input_grad[0]:
        grad_inputs = _sigmoid_focal_loss_backward(
            grad, inputs, targets, pos_weight, ctx.alpha, ctx.gamma, ctx.ignore_value
        )
    others: list[Tensor | None] = [None, None]
    if any(ctx.needs_input_grad[1:3]):
        tensors = [inputs, targets] if pos_weight is None else [inputs, targets, pos_weight]
        needed = (False, *ctx.needs_input_grad[1 : len(tensors)])
        others = reference_gradients(_reference_loss(ctx, ctx.reduce), tensors, needed, grad)[1:]
    return (grad_inputs, *others, *[None] * (6 - len(others)))


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, logits, targets, pos_weight, ctx.alpha, ctx.gamma, ctx.ignore_value = inputs
    ctx.save_for_backward(grad, logits, targets, pos_weight)


def _double_backward(ctx: Any, grad_grad: Tensor) -> tuple[Tensor | None, ...]:
    grad, inputs, targets, pos_weight = ctx.saved_tensors
    loss = _reference_loss(ctx, reduce=grad.dim() == 0)

    def grad_inputs(grad: Tensor, *tensors: Tensor) -> Tensor:
        result = reference_gradients(loss, tensors, (True, *[False] * (len(tensors) - 1)), grad)[0]
        assert result is not None
        return result

    tensors = [grad, inputs, targets] if pos_weight is None else [grad, inputs, targets, pos_weight]
    grads = reference_gradients(grad_inputs, tensors, ctx.needs_input_grad[: len(tensors)], grad_grad)
    return (*grads, *[None] * (7 - len(grads)))


def _reference_loss(ctx: Any, reduce: bool) -> Any:
    """Return the reference as a function of logits, targets and, if there are any, factors of positives."""
    return lambda inputs, targets, pos_weight=None: reference.sigmoid_focal_loss(
        inputs,
        targets,
        ctx.alpha,
        ctx.gamma,
        "sum" if reduce else "none",
        pos_weight=pos_weight,
        ignore_value=ctx.ignore_value,
    )


_sigmoid_focal_loss = differentiable("sigmoid_focal_loss", _setup, _backward)
_sigmoid_focal_loss_backward = differentiable("sigmoid_focal_loss_backward", _setup_backward, _double_backward)
