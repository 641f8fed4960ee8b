"""Gradients of ops that compare two lists of boxes by a symmetric measure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ._gradients import differentiable, reference_gradients


def symmetric(
    name: str,
    references: Mapping[str, Callable[..., Tensor]],
    swapped: Callable[[Tensor], Tensor],
) -> Callable[..., Any]:
    """Register the gradients of the operators `name` and `name_backward`, and return a function that calls the first.

    Both take two lists of boxes and the kind of the measure. The second computes the gradient of the first list. That
    of the second list is the result for swapped lists, because the measures are symmetric.

    Args:
        name: Name of the operator.
        references: Reference of each kind, from which second derivatives are computed.
        swapped: Function that turns the gradient of the operator's result into that of the result for swapped lists.
    """

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.kind = inputs
        ctx.save_for_backward(*tensors)

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        boxes1, boxes2 = ctx.saved_tensors
        needs1, needs2, _ = ctx.needs_input_grad
        return (
            first_gradient(grad, boxes1, boxes2, ctx.kind) if needs1 else None,
            first_gradient(swapped(grad), boxes2, boxes1, ctx.kind) if needs2 else None,
            None,
        )

    def double_backward(ctx: Any, grad_grad: Tensor) -> tuple[Tensor | None, ...]:
        def grad_boxes1(grad: Tensor, boxes1: Tensor, boxes2: Tensor) -> Tensor:
            result = reference_gradients(references[ctx.kind], (boxes1, boxes2), (True, False), grad)[0]
            assert result is not None
            return result

        return *reference_gradients(grad_boxes1, ctx.saved_tensors, ctx.needs_input_grad[:3], grad_grad), None

    first_gradient = differentiable(f"{name}_backward", setup, double_backward)
    return differentiable(name, setup, backward)
