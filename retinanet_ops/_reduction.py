"""The argument `reduction` of losses."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def check_reduction(op: str, reduction: Any) -> None:
    """Raise ValueError unless the reduction is known."""
    if reduction not in ("none", "sum", "mean"):
        raise ValueError(f"{op}: reduction must be none, sum or mean, got {reduction!r}")


def reduced(
    losses: Tensor,  # [...]
    reduction: str,
) -> Tensor:  # [...] or []
    """Return the losses, their sum or their mean; the mean of no losses is 0 and keeps the autograd history."""
    if reduction == "none":
        return losses
    return losses.mean() if reduction == "mean" and losses.numel() > 0 else losses.sum()
