"""The outputs of a head as one row per anchor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def rows_of(
    levels: Sequence[Tensor],  # L tensors [N, A*size, H, W]
    size: int,
) -> Tensor:  # [N, sum A*H*W, size]
    """Permute and concatenate the levels to rows in anchor order; channel `a * size + i` becomes column i."""
    rows = [level.unflatten(1, (level.shape[1] // size, size)).permute(0, 3, 4, 1, 2).flatten(1, 3) for level in levels]
    return torch.cat(rows, dim=1)
