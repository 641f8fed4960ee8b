"""Gradients of ops that are differentiated through their reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


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
