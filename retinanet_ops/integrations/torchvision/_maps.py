"""Rows of a head as the maps that the ops take."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def as_maps(
    rows: Tensor,  # [N, R, C]
    sizes: Sequence[tuple[int, int]] | None,  # height and width of each level
) -> list[Tensor]:  # L tensors [N, A*C, H, W], channels_last
    """Return the rows of a head as maps of the given sizes, or without sizes as one map of R x 1 cells.

    The single map needs no copy and is enough for the losses.
    """
    sizes = [(rows.shape[1], 1)] if sizes is None else sizes
    per_cell = rows.shape[1] // sum(h * w for h, w in sizes)
    levels = rows.split([per_cell * h * w for h, w in sizes], dim=1)
    # Flatten first. A view of a slice of the batch would keep strides that kernels do not accept as channels_last.
    flat = [level.reshape(-1) for level in levels]
    return [x.view(len(rows), h, w, -1).permute(0, 3, 1, 2) for x, (h, w) in zip(flat, sizes, strict=True)]
