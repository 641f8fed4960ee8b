"""Inputs that the tests against torchvision share."""

import torch
from cases import random_boxes
from torch import Tensor

VARIANTS = ("generalized_box_iou", "distance_box_iou", "complete_box_iou")
IOUS = ("box_iou", *VARIANTS)
WITH_EPS = VARIANTS[1:]
LOSSES = tuple(f"{name}_loss" for name in VARIANTS)
FLOAT = (torch.float32, torch.float64)
SIGNED = (torch.int16, torch.int32, torch.int64)
INTEGER = (torch.uint8, torch.int8, *SIGNED)


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Compare shape, dtype and values; torchvision computes in another order, so values may differ by roundings."""
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=2e-6)


def boxes_of(*shape, dtype=torch.float32, device="cpu", fmt="xyxy", whole=True):
    """Return boxes; every dtype holds whole coordinates exactly, and only others have unique gradients."""
    boxes = random_boxes(*shape, size=60.0, max_side=30.0)
    boxes = boxes.round() if whole else boxes
    if fmt != "xyxy":
        boxes[..., 2:] -= boxes[..., :2]
    return boxes.to(device, dtype)


def candidates(count, device, dtype=torch.float32):
    """Return boxes, different scores and classes."""
    boxes = random_boxes(count).to(device, dtype)
    return boxes, torch.randperm(count).to(device, dtype) / count, torch.randint(0, 5, (count,)).to(device)
