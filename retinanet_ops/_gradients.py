"""Gradients of ops: their registration, a short path to the kernels in eager mode, and gradients of references."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

# The short path needs these functions of PyTorch, which are not documented. Without them, ops take the long path.
_below_autograd: Any = getattr(torch._C, "_AutoDispatchBelowAutograd", None)
_transforms_active: Any = getattr(torch._C, "_are_functorch_transforms_active", None)
_tracing_state: Any = getattr(torch._C, "_get_tracing_state", None)
_HAS_SHORT_PATH = None not in (_below_autograd, _transforms_active, _tracing_state)


def differentiable(
    name: str,
    setup: Callable[[Any, tuple[Any, ...], Any], None],
    backward: Callable[..., tuple[Any, ...]],
    levels_at: int | None = None,
) -> Callable[..., Any]:
    """Register the gradient of an operator, and return a function that calls the operator with little overhead.

    In eager mode, the kernel that `torch.library.register_autograd` generates takes 3 to 60 us, because the dispatcher
    calls it through Python and it flattens lists of tensors. The returned function skips it: it calls the kernel of the
    device below autograd, inside a `torch.autograd.Function` if a tensor needs a gradient. Compilation, export, tracing
    and transforms of `torch.func` see the operator with its registered gradient.

    Args:
        name: Name of the operator, whose only tensors in lists are those of one argument.
        setup: As in `torch.library.register_autograd`.
        backward: As in `torch.library.register_autograd`.
        levels_at: Index of the argument that is a list of tensors, if there is one.
    """
    torch.library.register_autograd(f"retinanet_ops::{name}", backward, setup_context=setup)
    operator = getattr(torch.ops.retinanet_ops, name).default
    if not _HAS_SHORT_PATH:
        return operator
    types = [str(argument.type) for argument in operator._schema.arguments]
    tensors_at = [i for i, name in enumerate(types) if name in ("Tensor", "Optional[Tensor]")]
    returns_list = [str(result.type) for result in operator._schema.returns] == ["List[Tensor]"]

    def forward(ctx: Any, count: int, *flat: Any) -> Any:
        """Call the kernel; `flat` holds the arguments with the `count` tensors of the list in its place."""
        arguments = flat
        if levels_at is not None:
            end = levels_at + count
            arguments = (*flat[:levels_at], list(flat[levels_at:end]), *flat[end:])
        with _below_autograd():
            output = operator(*arguments)
        setup(ctx, arguments, output)
        ctx.count = count
        return tuple(output) if returns_list else output

    def flat_backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        """Call `backward` with the structure of arguments and results that it expects."""
        flat_needs = ctx.needs_input_grad
        needs = flat_needs[1:]
        if levels_at is not None:
            end = levels_at + ctx.count
            needs = (*needs[:levels_at], needs[levels_at:end], *needs[end:])
        ctx.needs_input_grad = needs
        try:
            result = backward(ctx, list(grads)) if returns_list else backward(ctx, *grads)
        finally:
            ctx.needs_input_grad = flat_needs
        if levels_at is None:
            return None, *result
        of_levels = result[levels_at] or (None,) * ctx.count
        rest = [None if isinstance(g, list) else g for g in result[levels_at + 1 :]]  # [] is that of a list of numbers
        return None, *result[:levels_at], *of_levels, *rest

    attributes = {"forward": staticmethod(forward), "backward": staticmethod(flat_backward)}
    function: Any = type(f"GradientOf_{name}", (Function,), attributes)
    # `Function.apply` adds the transforms of `torch.func` to this method, which takes about 2 us.
    apply = super(Function, function).apply

    def call(*arguments: Any) -> Any:
        """Call the operator."""
        if torch.compiler.is_compiling() or _transforms_active() or _tracing_state() is not None:
            return operator(*arguments)
        if torch.is_grad_enabled():
            levels = () if levels_at is None else arguments[levels_at]
            if _any_requires_grad(levels) or _any_requires_grad([arguments[i] for i in tensors_at]):
                if levels_at is None:
                    flat, count = arguments, 0
                else:
                    flat = (*arguments[:levels_at], *levels, *arguments[levels_at + 1 :])
                    count = len(levels)
                output = apply(count, *flat)
                return list(output) if returns_list else output
        with _below_autograd():
            return operator(*arguments)

    return call


def _any_requires_grad(tensors: Sequence[Tensor | None]) -> bool:
    """Return whether one of the tensors requires a gradient."""
    for tensor in tensors:  # any() with a generator would take twice as long
        if tensor is not None and tensor.requires_grad:
            return True
    return False


def detached(tensor: Tensor) -> Tensor:
    """Return the tensor without its autograd history."""
    if _HAS_SHORT_PATH and not tensor.requires_grad and not torch.compiler.is_compiling() and not _transforms_active():
        return tensor  # saves a call of the dispatcher
    return tensor.detach()


def converted(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the tensor in the dtype."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)  # `to` of the same dtype calls the dispatcher


def reference_gradients(
    function: Callable[..., Tensor],
    tensors: Sequence[Tensor],
    needed: Sequence[bool],
    grad: Tensor,
) -> list[Tensor | None]:
    """Return the gradients of a reference; in grad mode they can be differentiated again.

    Args:
        function: Reference, as a function of `tensors` alone.
        tensors: Arguments of the reference.
        needed: Whether each tensor needs a gradient.
        grad: Gradient of the result of the reference.

    Returns:
        The gradient of each tensor, or None where it is not needed.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # A view of a tensor that requires a gradient keeps its autograd history. Any other tensor becomes a leaf here.
        tensors = [
            (t.view_as(t) if t.requires_grad else t.detach().requires_grad_()) if need else t
            for t, need in zip(tensors, needed, strict=True)
        ]
        inputs = [t for t, need in zip(tensors, needed, strict=True) if need]
        result = function(*tensors)
        grads = iter(torch.autograd.grad(result, inputs, grad, create_graph=create_graph, materialize_grads=True))
    return [next(grads) if need else None for need in needed]
