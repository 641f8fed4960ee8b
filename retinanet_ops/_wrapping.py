"""What the op wrappers share: argument checks, the fallback of devices without kernels, gradients by the reference."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from ._library import kernels_available
from .anchors import AnchorArguments, AnchorGrid, as_arguments

P = ParamSpec("P")
R = TypeVar("R")


class FallbackWarning(UserWarning):
    """An op runs in plain PyTorch because its device has no kernels."""


def with_fallback(reference: Callable[P, R]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Serves tensors of devices that have no kernels by the reference, with one warning per op."""

    def decorate(op: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(op)
        def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
            device_type = _device_type((*args, *kwargs.values()))
            if kernels_available(device_type):
                return op(*args, **kwargs)
            _warn_once(op.__name__, device_type)
            return reference(*args, **kwargs)

        return wrapper

    return decorate


def _device_type(arguments: Sequence[Any]) -> str:
    """Where the first argument is that has a device: the name of a keyword says nothing about its place."""
    for value in arguments:
        if isinstance(value, AnchorGrid):
            value = value.base_anchors
        elif isinstance(value, (list, tuple)) and value:
            value = value[0]
        if isinstance(value, Tensor):
            return value.device.type
    return "cpu"


@functools.cache
def _warn_once(op: str, device_type: str) -> None:
    warnings.warn(
        f"retinanet_ops.{op} has no kernel for {device_type} tensors and runs in plain PyTorch",
        FallbackWarning,
        stacklevel=3,
    )


def check_tensor(op: str, name: str, value: Any) -> None:
    """Raise TypeError unless the value is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}")


def check_floating(op: str, name: str, value: Any) -> None:
    """Raise TypeError unless the value is a float16, bfloat16, float32 or float64 tensor."""
    check_tensor(op, name, value)
    if value.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise TypeError(f"{op}: {name} must be float16, bfloat16, float32 or float64, got {value.dtype}")


def is_integer(value: Tensor) -> bool:
    """Whether the tensor has an integer dtype that int64 holds, and that PyTorch has operators for (bool is none)."""
    return value.dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def check_integer(op: str, name: str, value: Any) -> None:
    """Raise TypeError unless the value is an integer tensor."""
    check_tensor(op, name, value)
    if not is_integer(value):
        raise TypeError(f"{op}: {name} must be an integer tensor, got {value.dtype}")


def check_shape(op: str, name: str, value: Tensor, expected: Sequence[int | str]) -> None:
    """Raise ValueError unless the shape fits; a string stands for any size and names it in the message."""
    if value.dim() != len(expected) or any(
        e != s for e, s in zip(expected, value.shape, strict=True) if isinstance(e, int)
    ):
        raise ValueError(f"{op}: {name} must have shape [{', '.join(map(str, expected))}], got {list(value.shape)}")


def check_rows(op: str, name: str, value: Any) -> None:
    """Raise unless the value is a floating tensor of boxes, [A, 4] or [N, A, 4], without a tangent."""
    check_floating(op, name, value)
    refuse_forward_mode(op, value)
    if value.dim() not in (2, 3) or value.shape[-1] != 4:
        raise ValueError(f"{op}: {name} must have shape [A, 4] or [N, A, 4], got {list(value.shape)}")


def check_same_device(op: str, name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Raise ValueError unless both tensors are on one device."""
    if value.device != other.device:
        raise ValueError(f"{op}: {name} must be on {other_name}'s device {other.device}, got {value.device}")


def refuse_forward_mode(op: str, *tensors: Tensor) -> None:
    """Raise NotImplementedError for a tensor with a tangent, which a kernel would drop without a word."""
    if not torch.compiler.is_compiling() and any(unpack_dual(t).tangent is not None for t in tensors):
        raise NotImplementedError(f"{op}: forward-mode differentiation is not supported; use reverse mode")


def anchor_arguments(
    op: str,
    anchors: Tensor | AnchorGrid,
    images: int,
    rows: int | None,
    dtype: torch.dtype,
    beside: tuple[str, Tensor],
) -> AnchorArguments:
    """Either form of anchors for a schema, checked against the batch; explicit anchors are converted to `dtype`.

    `beside` is an argument's name and value, on whose device the anchors have to be.
    """
    if isinstance(anchors, Tensor):
        check_rows(op, "anchors", anchors)
        if anchors.dim() == 3 and anchors.shape[0] != images:
            raise ValueError(f"{op}: anchors must have shape [A, 4] or [{images}, A, 4], got {list(anchors.shape)}")
        anchors = anchors.to(dtype)
    elif not isinstance(anchors, AnchorGrid):
        raise TypeError(f"{op}: anchors must be a tensor or an AnchorGrid, got {type(anchors).__name__}")
    count = anchors.num_anchors if isinstance(anchors, AnchorGrid) else anchors.shape[-2]
    if rows is not None and rows != count:
        raise ValueError(f"{op}: expected one row for each of the {count} anchors, got {rows}")
    arguments = as_arguments(anchors)
    check_same_device(op, "anchors", arguments.tensor, *beside)
    return arguments


def anchors_of(arguments: AnchorArguments) -> Tensor | AnchorGrid:
    """The anchors that a schema's three arguments stand for."""
    tensor, sizes, steps = arguments
    if not sizes:
        return tensor
    return AnchorGrid(
        base_anchors=tensor,
        anchors_per_cell=tuple(sizes[2::3]),
        grid_sizes=tuple(zip(sizes[0::3], sizes[1::3], strict=True)),
        strides=tuple(zip(steps[0::4], steps[1::4], strict=True)),
        offsets=tuple(zip(steps[2::4], steps[3::4], strict=True)),
    )


def reference_gradients(
    function: Callable[..., Tensor],
    tensors: Sequence[Tensor],
    needed: Sequence[bool],
    grad: Tensor,
) -> list[Tensor | None]:
    """Gradients of `function(*tensors)`, a reference, for the tensors that need one.

    The result is differentiable again, so higher derivatives work.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # A view keeps the history of a tensor that has one, and lets any other require a gradient of its own.
        tensors = [
            (t.view_as(t) if t.requires_grad else t.detach().requires_grad_()) if need else t
            for t, need in zip(tensors, needed, strict=True)
        ]
        wanted = [t for t, need in zip(tensors, needed, strict=True) if need]
        result = function(*tensors)
        grads = iter(torch.autograd.grad(result, wanted, grad, create_graph=create_graph, materialize_grads=True))
    return [next(grads) if need else None for need in needed]
