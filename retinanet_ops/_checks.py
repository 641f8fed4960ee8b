"""Checks of the arguments that users pass to ops: first tensors, then numeric options.

Every message names the op and the argument, what was expected and what came. The kernels check shapes and dtypes again,
so that a direct call of `torch.ops.retinanet_ops` is memory-safe.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_INTEGER = (torch.int64, torch.int32, torch.uint8, torch.int8, torch.int16)
_CLASS_ID = (*_INTEGER, *_FLOATING, torch.bool)


def check_tensor(op: str, name: str, value: Any) -> None:
    """Raise TypeError unless the value is a tensor."""
    if not isinstance(value, Tensor):
        remedy = "; convert it with torch.as_tensor" if hasattr(value, "__array__") or isinstance(value, list) else ""
        raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}{remedy}")


def check_floating(op: str, name: str, value: Any) -> None:
    """Raise TypeError unless the value is a float16, bfloat16, float32 or float64 tensor."""
    if not isinstance(value, Tensor):
        check_tensor(op, name, value)
    if value.dtype not in _FLOATING:
        raise TypeError(f"{op}: {name} must be float16, bfloat16, float32 or float64, got {value.dtype}")


def is_integer(value: Tensor) -> bool:
    """Return whether the tensor has an integer dtype whose values fit into int64; bool does not count as an integer."""
    return value.dtype in _INTEGER


def check_number(op: str, name: str, value: Any) -> bool:
    """Raise TypeError unless the value is a floating or an integer tensor, and return whether it is an integer one."""
    if not isinstance(value, Tensor):
        check_tensor(op, name, value)
    if value.dtype in _FLOATING:
        return False
    if value.dtype not in _INTEGER:
        raise TypeError(f"{op}: {name} must be a floating or integer tensor, got {value.dtype}")
    return True


def check_integer(op: str, name: str, value: Any) -> None:
    """Raise TypeError unless the value is an integer tensor."""
    if not isinstance(value, Tensor):
        check_tensor(op, name, value)
    if value.dtype not in _INTEGER:
        raise TypeError(f"{op}: {name} must be an integer tensor, got {value.dtype}")


def check_class_ids(op: str, name: str, value: Any) -> None:
    """Raise TypeError unless the value is an integer, floating or bool tensor."""
    if not isinstance(value, Tensor):
        check_tensor(op, name, value)
    if value.dtype not in _CLASS_ID:
        raise TypeError(f"{op}: {name} must be an integer, floating or bool tensor, got {value.dtype}")


def check_shape(op: str, name: str, value: Tensor, expected: Sequence[int | str]) -> None:
    """Raise ValueError unless the tensor has the expected shape; a string stands for any size and names it."""
    shape = value.shape
    if len(shape) == len(expected):
        for i, size in enumerate(expected):
            if type(size) is not str and size != shape[i]:
                break
        else:
            return
    raise ValueError(f"{op}: {name} must have shape [{', '.join(map(str, expected))}], got {list(shape)}")


def as_rows(op: str, name: str, value: Any) -> Tensor:
    """Return rows [A, 4] or [N, A, 4], integers in float32; raise for other values and for a forward-mode tangent."""
    if not isinstance(value, Tensor):
        check_tensor(op, name, value)
    if value.dtype not in _FLOATING:
        check_number(op, name, value)
        value = value.float()
    refuse_forward_mode(op, value)
    shape = value.shape
    if not 2 <= len(shape) <= 3 or shape[-1] != 4:
        raise ValueError(f"{op}: {name} must have shape [A, 4] or [N, A, 4], got {list(value.shape)}")
    return value


def check_same_device(op: str, name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Raise ValueError unless both tensors are on the same device."""
    if value.device != other.device:
        raise ValueError(f"{op}: {name} must be on {other_name}'s device {other.device}, got {value.device}")


def refuse_forward_mode(op: str, *tensors: Tensor) -> None:
    """Raise NotImplementedError if a tensor has a forward-mode tangent, because kernels would silently drop it."""
    # A tangent exists inside a `dual_level` only. Its number, -1 outside, is not documented, hence the default.
    if torch.compiler.is_compiling() or getattr(forward_ad, "_current_level", 0) < 0:
        return
    if any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise NotImplementedError(f"{op}: forward-mode differentiation is not supported; use reverse mode")


def as_count(op: str, name: str, value: Any, least: int = 0) -> int:
    """Return the value as an integer in `least..2^63 - 1`; raise TypeError or ValueError for any other value."""
    if type(value) is int and least <= value < 2**63:
        return value
    if not isinstance(value, torch.SymInt):
        try:
            value = operator.index(value)
        except TypeError:
            raise TypeError(f"{op}: {name} must be an integer, got {value!r}") from None
        if value >= 2**63:
            raise ValueError(f"{op}: {name} must be less than 2^63, got {value}")
    if value < least:
        raise ValueError(f"{op}: {name} must {f'be at least {least}' if least else 'not be negative'}, got {value}")
    return value


def as_number(op: str, name: str, value: Any) -> float:
    """Return the value as a float; raise TypeError for a value that is not a number, ValueError for NaN."""
    if type(value) is float and value == value:
        return value
    try:
        number = float(value) if not isinstance(value, str) else None
    except (TypeError, ValueError):
        number = None
    if number is None:
        raise TypeError(f"{op}: {name} must be a number, got {value!r}")
    if number != number:  # torch.compile traces this comparison of a symbolic number, but not math.isnan
        raise ValueError(f"{op}: {name} must be a number, got nan")
    return number


def as_finite(op: str, name: str, value: Any) -> float:
    """Return the value as a float; raise TypeError for a value that is not a number, ValueError for NaN and infinity.

    No schema receives an infinite number, because AOTInductor does not load a graph that holds one.
    """
    if type(value) is float and -math.inf < value < math.inf:
        return value
    number = as_number(op, name, value)
    if not -math.inf < number < math.inf:
        raise ValueError(f"{op}: {name} must be finite, got {number}")
    return number


def as_epsilon(op: str, value: Any) -> float:
    """Return `eps`, which is added to denominators, as a float; raise ValueError unless it is finite and >= 0."""
    eps = as_finite(op, "eps", value)
    if eps < 0:
        raise ValueError(f"{op}: eps must not be negative, got {eps}")
    return eps


def as_clamped(op: str, name: str, value: Any, low: float, high: float) -> float:
    """Return the value as a float, clamped to the finite range `low..high`; no result changes beyond that range."""
    number = as_number(op, name, value)
    if number < low:
        return low
    return high if number > high else number


def as_score_threshold(op: str, value: Any) -> float:
    """Return `score_threshold` for a schema: scores are 0 to 1, so all of them pass -1 and none passes 1."""
    return as_clamped(op, "score_threshold", value, -1.0, 1.0)


def as_iou_threshold(op: str, value: Any) -> float:
    """Return `iou_threshold` for a schema: every IoU is greater than -1, and none is greater than 2."""
    return as_clamped(op, "iou_threshold", value, -1.0, 2.0)


def as_coder_weights(op: str, coder_weights: Sequence[float]) -> list[float]:
    """Return the weights of the box coder as four floats, for a schema."""
    if len(coder_weights) != 4:
        raise ValueError(f"{op}: coder_weights must hold 4 numbers, got {len(coder_weights)}")
    if all([type(w) is float and 0 < w < math.inf for w in coder_weights]):
        return list(coder_weights)
    numbers = [as_number(op, f"coder_weights[{i}]", w) for i, w in enumerate(coder_weights)]
    if not all(0 < w < math.inf for w in numbers):
        raise ValueError(f"{op}: coder_weights must be positive and finite, got {numbers}")
    return numbers


def as_log_ratio_bounds(
    op: str, min_log_ratio: float | None, max_log_ratio: float | None
) -> tuple[float | None, float | None]:
    """Return both bounds of a decoded log size ratio for a schema; None stands for no bound."""
    low = _bound(op, "min_log_ratio", min_log_ratio, -math.inf)
    high = _bound(op, "max_log_ratio", max_log_ratio, math.inf)
    if low is not None and high is not None and low > high:
        raise ValueError(f"{op}: min_log_ratio must not be greater than max_log_ratio {high}, got {low}")
    return low, high


def _bound(op: str, name: str, value: float | None, unbounded: float) -> float | None:
    """Return a bound as a finite float, or None for None and for the infinity `unbounded`, which bounds nothing."""
    if type(value) is float and -math.inf < value < math.inf:
        return value
    if value is None or as_number(op, name, value) == unbounded:
        return None
    return as_finite(op, name, value)


def check_focal_options(op: str, alpha: float, gamma: float) -> None:
    """Raise ValueError unless the parameters of a focal loss are in range."""
    for name, value in (("alpha", alpha), ("gamma", gamma)):
        if abs(value) == math.inf:
            raise ValueError(f"{op}: {name} must be finite, got {value}")
    if not gamma >= 0:  # false for NaN, too
        raise ValueError(f"{op}: gamma must be >= 0, got {gamma}")
    if not alpha <= 1:
        raise ValueError(f"{op}: alpha must be in 0..1, or negative for no weighting, got {alpha}")
