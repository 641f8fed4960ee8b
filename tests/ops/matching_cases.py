"""Anchors and ground truth that the tests of matching share."""

import torch
from cases import random_boxes

import retinanet_ops as ops
from retinanet_ops import AnchorGrid, reference

GRID_SIZES = ((13, 17), (7, 9), (4, 5))


def small_grid(device="cpu"):
    """Return the anchors of a 104 x 136 image on three levels."""
    return AnchorGrid.torchvision(GRID_SIZES, (104, 136), sizes=((16, 20), (32, 40), (64, 80)), device=device)


def padded(counts, max_gt, **box_options):
    """Return boxes and counts of a batch of ground truth, whose padding holds boxes that must not match."""
    return random_boxes(len(counts), max_gt, **box_options), torch.tensor(counts)


def assert_equals_reference(device, anchors, gt_boxes, gt_count, **options):
    """Compare the matches with the reference and return them."""
    matches = ops.match_anchors(anchors, gt_boxes, gt_count, **options)
    expected = reference.match_anchors(anchors, gt_boxes, gt_count, **options)
    assert matches.dtype == torch.int32 and matches.device.type == device.type
    assert torch.equal(matches, expected)
    return matches


def grid_of_levels(finest=(64, 80)):
    """Return the grid of three levels, the finest of which has cells of 8 pixels."""
    height, width = finest
    shapes = [(height // k, width // k) for k in (1, 2, 4)]
    return AnchorGrid.torchvision(shapes, (8 * height, 8 * width), sizes=((32, 40), (64, 80), (128, 160)))
