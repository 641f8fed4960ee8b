"""The anchors of a configuration, by the rules of the project whose weights it describes.

Their order is always the package's: slot `a` of a position is `ratio * sizes + size`. `anchor_shapes` keep the order of
the configuration.
"""

from __future__ import annotations

import torch
from torch import Tensor

import retinanet_ops as ops
from retinanet.model.pyramid_config import AnchorFields

_CENTRED = ("yhenon", "odtk")


def base_anchors(config: AnchorFields) -> Tensor:  # [L * anchors per cell, 4] float32
    """Return the base anchors, around the origin of their cell, of one level after the other."""
    if config.anchor_shapes:
        shapes = torch.tensor([shape for level in config.anchor_shapes for shape in level], dtype=torch.float32)
        return torch.cat([-shapes / 2, shapes / 2], dim=1)
    boxes = ops.base_anchors(config.anchor_sizes, config.aspect_ratios, profile=config.conventions.anchor_profile)
    # A box of the width `x2 - x1 + 1` ends at `x2 + 1` in the coordinates of this package.
    return boxes + torch.tensor(
        [0, 0, config.conventions.box_offset, config.conventions.box_offset], dtype=torch.float32
    )


def anchor_grid(
    config: AnchorFields,
    base: Tensor,  # [L * anchors per cell, 4] float32
    batch_size: tuple[int, int],  # height, width of the padded batch in pixels
    grid_sizes: tuple[tuple[int, int], ...],  # height, width of each level's maps
) -> ops.AnchorGrid:
    """Return the anchors at all positions of a batch's maps, made from `base_anchors`."""
    if config.conventions.anchor_profile == "torchvision":
        return ops.AnchorGrid.from_base_anchors(base, grid_sizes, image_size=batch_size)
    strides = [2**level for level in config.fpn_levels]
    centre = 0.5 if config.conventions.anchor_profile in _CENTRED else 0.0
    return ops.AnchorGrid.from_base_anchors(base, grid_sizes, strides, centre_offset=centre)
