"""The fallback to plain PyTorch for tensors on devices that have no kernels."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

from torch import Tensor

from ._library import kernels_available
from .anchors import AnchorGrid

P = ParamSpec("P")
R = TypeVar("R")


class FallbackWarning(UserWarning):
    """Warning that an op runs in plain PyTorch because its device has no kernels."""


def with_fallback(reference: Callable[P, R]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate an op so that it calls its reference on devices without kernels, with one warning per op and device."""

    def decorate(op: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(op)
        def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
            device_type = _device_type(args) or _device_type(tuple(kwargs.values())) or "cpu"
            if kernels_available(device_type):
                return op(*args, **kwargs)
            _warn_once(op.__name__, device_type)
            return reference(*args, **kwargs)

        return wrapper

    return decorate


def _device_type(arguments: Sequence[Any]) -> str | None:
    """Return the device type of the first tensor, list of tensors or `AnchorGrid` among the arguments."""
    for value in arguments:
        if isinstance(value, AnchorGrid):
            value = value.base_anchors
        elif isinstance(value, (list, tuple)) and value:
            value = value[0]
        if isinstance(value, Tensor):
            return "cpu" if value.is_cpu else value.device.type  # the type's name takes 0.3 us
    return None


@functools.cache
def _warn_once(op: str, device_type: str) -> None:
    """Warn about the fallback; the cache makes later calls with the same arguments silent."""
    warnings.warn(
        f"retinanet_ops.{op} has no kernel for {device_type} tensors and runs in plain PyTorch",
        FallbackWarning,
        stacklevel=3,
    )
