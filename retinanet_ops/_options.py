"""What the op wrappers share: checks of options that are numbers."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch


def as_count(op: str, name: str, value: Any, least: int = 0) -> int:
    """The value as an integer, at least `least` and in int64; raise TypeError or ValueError for others."""
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
    """The value as a float; raise TypeError for what is none, ValueError for NaN."""
    try:
        number = float(value) if not isinstance(value, str) else None
    except (TypeError, ValueError):
        number = None
    if number is None:
        raise TypeError(f"{op}: {name} must be a number, got {value!r}")
    if number != number:  # what `torch.compile` traces of a symbolic number, as it does not math.isnan
        raise ValueError(f"{op}: {name} must be a number, got nan")
    return number


def check_focal_options(op: str, alpha: float, gamma: float) -> None:
    """Raise ValueError unless the parameters of a focal loss are in range."""
    if not gamma >= 0:  # nor NaN
        raise ValueError(f"{op}: gamma must be >= 0, got {gamma}")
    if not alpha <= 1:
        raise ValueError(f"{op}: alpha must be in 0..1, or negative for no weighting, got {alpha}")


def as_coder_weights(op: str, coder_weights: Sequence[float]) -> list[float]:
    """Return the weights of the box coder as four floats, for a schema."""
    if len(coder_weights) != 4:
        raise ValueError(f"{op}: coder_weights must hold 4 numbers, got {len(coder_weights)}")
    numbers = [as_number(op, f"coder_weights[{i}]", w) for i, w in enumerate(coder_weights)]
    if not all(0 < w < math.inf for w in numbers):
        raise ValueError(f"{op}: coder_weights must be positive and finite, got {numbers}")
    return numbers


def log_ratio_bounds(op: str, min_log_ratio: float | None, max_log_ratio: float) -> tuple[float, float]:
    """Both bounds of a decoded log size ratio for a schema."""
    low = -math.inf if min_log_ratio is None else as_number(op, "min_log_ratio", min_log_ratio)
    high = as_number(op, "max_log_ratio", max_log_ratio)
    if low > high:
        raise ValueError(f"{op}: min_log_ratio must not be greater than max_log_ratio {high}, got {low}")
    return low, high
