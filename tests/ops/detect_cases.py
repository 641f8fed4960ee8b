"""Heads, anchors and comparisons that the tests of dense detection share."""

import torch

from retinanet_ops import AnchorGrid

GRID_SIZES = ((12, 16), (6, 8), (3, 4))
IMAGE_SIZES = torch.tensor([[96, 128], [80, 100]])


def grid_anchors(device="cpu"):
    return AnchorGrid.torchvision(GRID_SIZES, (96, 128), sizes=((16, 20), (32, 40), (64, 80)), device=device)


def heads(device, dtype=torch.float32, num_classes=5, images=2, grid_sizes=GRID_SIZES, per_cell=6, spread=2.0):
    logits = [(torch.randn(images, per_cell * num_classes, h, w) * spread - 4).to(device, dtype) for h, w in grid_sizes]
    deltas = [(torch.randn(images, per_cell * 4, h, w) * 0.3).to(device, dtype) for h, w in grid_sizes]
    return logits, deltas


def assert_same(actual, expected, atol=1e-3):
    """Compare decisions exactly, and boxes and scores within rounding (the exponential is not that of torch)."""
    for name in ("labels", "count", "anchor_index", "truncated"):
        assert torch.equal(getattr(actual, name), getattr(expected, name)), name
    torch.testing.assert_close(actual.scores, expected.scores, rtol=1e-6, atol=0)
    torch.testing.assert_close(actual.boxes, expected.boxes, rtol=1e-6, atol=atol)
