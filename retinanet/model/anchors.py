"""The anchors of a configuration, by the rules of the project whose weights it describes.

Their order is always the package's: slot `a` of a position is `ratio * sizes + size`.
"""

from __future__ import annotations

import torch
from torch import Tensor

import retinanet_ops as ops
from retinanet.model.config import RetinaNetConfig

_CENTRED = ("yhenon", "odtk")


def base_anchors(config: RetinaNetConfig) -> Tensor:  # [L * anchors per cell, 4] float32
    """The anchors of all levels around the centre of one, level after level."""
    # A box of the width `x2 - x1 + 1` ends at `x2 + 1` in the coordinates of this package.
    return _base_anchors(config) + torch.tensor([0, 0, config.box_offset, config.box_offset], dtype=torch.float32)


def _base_anchors(config: RetinaNetConfig) -> Tensor:
    sizes, ratios = config.anchor_sizes, config.aspect_ratios
    cells = [(1, 1)] * len(sizes)
    if config.anchor_profile == "torchvision":
        return ops.AnchorGrid.torchvision(cells, (1, 1), sizes, [ratios] * len(sizes)).base_anchors
    strides = [2**level for level in config.fpn_levels]
    if config.anchor_profile in ("mmdet", "yhenon"):
        return ops.AnchorGrid.mmdet(cells, strides, sizes=sizes, aspect_ratios=ratios).base_anchors
    if config.anchor_profile == "odtk":
        grid = ops.AnchorGrid.odtk(cells, strides, sizes=sizes, aspect_ratios=ratios)
    else:
        grid = ops.AnchorGrid.detectron2(cells, strides, sizes, ratios)
    # Of these two, slot `a` of a position is `size * ratios + ratio`.
    by_size = grid.base_anchors.reshape(len(sizes), len(sizes[0]), len(ratios), 4)
    return by_size.transpose(1, 2).reshape(-1, 4)


def anchor_grid(
    config: RetinaNetConfig,
    base: Tensor,  # [L * anchors per cell, 4] float32
    batch_size: tuple[int, int],  # height, width of the padded batch in pixels
    grid_sizes: tuple[tuple[int, int], ...],  # height, width of each level's maps
) -> ops.AnchorGrid:
    """The anchors of a batch's maps, made of `base_anchors`."""
    if config.anchor_profile == "torchvision":
        strides = [(float(batch_size[0] // h), float(batch_size[1] // w)) for h, w in grid_sizes]
    else:
        strides = [(float(2**level), float(2**level)) for level in config.fpn_levels]
    centre = 0.5 if config.anchor_profile in _CENTRED else 0.0
    return ops.AnchorGrid(
        base_anchors=base,
        anchors_per_cell=(config.anchors_per_cell,) * len(grid_sizes),
        grid_sizes=grid_sizes,
        strides=tuple(strides),
        offsets=tuple((centre * y, centre * x) for y, x in strides),
    )
