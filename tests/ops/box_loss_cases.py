"""Heads, anchors and targets that the tests of the box losses share."""

import torch
from cases import random_boxes

from retinanet_ops import AnchorGrid

LAYOUTS = (torch.contiguous_format, torch.channels_last)
# The first level has more anchors than the tile of a CUDA block, and the tile ends inside a cell.
GRID_SIZES = ((27, 29), (7, 9), (1, 1))
PER_CELL = 6


def small_grid(device="cpu", sizes=GRID_SIZES):
    return AnchorGrid.torchvision(sizes, (104, 136), sizes=((16, 20), (32, 40), (64, 80))[: len(sizes)], device=device)


def heads(*, images=2, sizes=GRID_SIZES, dtype=torch.float32, device="cpu", layout=LAYOUTS[0], scale=0.3):
    def level(h, w):
        x = torch.randn(images, 4 * PER_CELL, h, w) * scale
        return x.to(device, dtype).contiguous(memory_format=layout).requires_grad_()

    return [level(h, w) for h, w in sizes]


def targets(device, *, images=2, grid=None, max_gt=7):
    """Return anchors, ground truth, and matches, about half of which are positive."""
    grid = grid or small_grid(device)
    gt_boxes = random_boxes(images, max_gt, size=90.0, max_side=70.0).to(device)
    matches = torch.randint(-6, max_gt, (images, grid.num_anchors)).clamp(min=-2).to(device, torch.int32)
    return grid, gt_boxes, matches
