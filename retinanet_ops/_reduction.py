"""The argument `reduction` of losses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def check_reduction(op: str, reduction: Any) -> None:
    """Raise ValueError unless the reduction is known."""
    if reduction not in ("none", "sum", "mean"):
        raise ValueError(f"{op}: reduction must be none, sum or mean, got {reduction!r}")


def reduced(
    op: str,
    losses: Tensor,  # [...]
    reduction: Any,
) -> Tensor:  # [...] or []
    """Return the losses, their sum or their mean, where the mean of no losses is 0; raise for another reduction."""
    check_reduction(op, reduction)
    if reduction == "none":
        return losses
    total = losses.sum()
    if reduction == "sum":
        return total
    count = losses.numel()
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        # The graph may run with another number of losses, which it computes and which no condition may depend on.
        return total / torch.scalar_tensor(count, dtype=total.dtype, device=total.device).clamp(min=1)
    return total / max(count, 1)
