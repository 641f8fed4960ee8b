"""The heads' own tensors as rows."""

from __future__ import annotations

from torch import Tensor


def rows_of(
    level: Tensor,  # [N, A*size, H, W]
    size: int,
) -> Tensor:  # [N, H*W*A, size]
    """A level's channels `a * size + i` as rows in anchor order."""
    n, channels, h, w = level.shape
    return (
        level.reshape(n, channels // size, size, h, w)
        .permute(0, 3, 4, 1, 2)
        .reshape(n, h * w * (channels // size), size)
    )
