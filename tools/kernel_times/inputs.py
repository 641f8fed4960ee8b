"""Inputs of the cases: the pyramid of a RetinaNet on images of 800 x 1344, boxes, logits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from retinanet_ops import AnchorGrid

IMAGES = 16
CLASSES = 80
CELL_ANCHORS = 9
SIZE = (800, 1344)
GRIDS = ((100, 168), (50, 84), (25, 42), (13, 21), (7, 11))
ANCHORS = CELL_ANCHORS * sum(h * w for h, w in GRIDS)

#: Means of logits with a standard deviation of 1.2, by how many of an image's 16 M pass a score threshold of 0.05.
FEW, MANY = -7.0, -3.61  # about 6 thousand, 4.7 million


def anchor_grid() -> AnchorGrid:
    """Return the anchors of the pyramid, three sizes and three aspect ratios in each cell."""
    import retinanet_ops as ops

    sides = tuple((side, int(side * 2 ** (1 / 3)), int(side * 2 ** (2 / 3))) for side in (32, 64, 128, 256, 512))
    return ops.AnchorGrid.torchvision(GRIDS, SIZE, sides).to(torch.get_default_device())


def point_grid() -> AnchorGrid:
    """Return FCOS's anchors, a square in each cell of the pyramid, whose centres are its points."""
    import retinanet_ops as ops

    sides = tuple((float(side),) for side in (8, 16, 32, 64, 128))
    return ops.AnchorGrid.torchvision(GRIDS, SIZE, sides, ((1.0,),) * len(sides)).to(torch.get_default_device())


def uniform_boxes(*shape: int) -> Tensor:
    """Return boxes `[*shape, 4]` with sides of 8 to 403, anywhere in the image. Most survive NMS."""
    side = torch.exp(torch.rand(*shape, 2) * 3.9 + 2.1)
    corner = torch.rand(*shape, 2) * (torch.tensor([SIZE[1], SIZE[0]]) - side).clamp(min=0)
    return torch.cat((corner, corner + side), dim=-1)


def one_cluster(n: int) -> Tensor:
    """Return boxes `[n, 4]` of which any two overlap, so that few survive NMS.

    torchvision's own benchmark of NMS uses such boxes (https://github.com/pytorch/vision/issues/8766).
    """
    corner = torch.rand(n, 2)
    return torch.cat((corner, torch.rand(n, 2) + 10), dim=1)


def logits(images: int, dtype: torch.dtype, mean: float) -> list[Tensor]:
    """Return class logits of the pyramid. All images are equal."""
    return [
        (torch.randn(1, CELL_ANCHORS * CLASSES, *grid) * 1.2 + mean).to(dtype).repeat(images, 1, 1, 1) for grid in GRIDS
    ]


def deltas(images: int, dtype: torch.dtype) -> list[Tensor]:
    """Return box offsets of the pyramid. All images are equal."""
    return [(torch.randn(1, CELL_ANCHORS * 4, *grid) * 0.3).to(dtype).repeat(images, 1, 1, 1) for grid in GRIDS]


def labels(images: int, every: int) -> Tensor:
    """Return the labels or matches of all anchors, of which every so-many-th is positive."""
    values = torch.full((images, ANCHORS), -1, dtype=torch.int32)
    values[:, ::every] = 3
    return values
