"""NMS with many kept boxes of one class, which the CPU looks up in a grid of cells."""

import pytest
import torch

import retinanet_ops as ops
from retinanet_ops import reference

CROWD = 24 * 24


def crowd(device, dtype=torch.float32, corner=1000.0):  # [CROWD, 4]
    """Return boxes of one pixel, two pixels apart."""
    x, y = torch.meshgrid(torch.arange(24), torch.arange(24), indexing="ij")
    first = corner + 3 * torch.stack((x, y), dim=-1).reshape(-1, 2)
    return torch.cat((first, first + 1), dim=1).to(device, dtype)


def kept_after_a_crowd(boxes, threshold, labels=None):
    """Return which boxes NMS keeps after a crowd of better boxes in each of their classes."""
    crowds = 1 if labels is None else 2
    others = torch.cat([crowd(boxes.device, boxes.dtype, 1000.0 + 200 * k) for k in range(crowds)])
    everything = torch.cat((others, boxes))
    classes = torch.zeros(len(everything), dtype=torch.int64, device=boxes.device)
    if labels is not None:
        classes[CROWD : len(others)] = 1
        classes[len(others) :] = labels
    scores = torch.linspace(1, 0.5, len(everything), device=boxes.device)
    keep = ops.batched_nms(everything, scores, classes, threshold)
    assert torch.equal(keep, reference.batched_nms(everything, scores, classes, threshold))
    return (keep[keep >= len(others)] - len(others)).tolist()


@pytest.mark.parametrize("threshold", (0.0, 1e-4))
def test_large_boxes_over_small_ones(device, threshold):
    # A box of 60 x 60 pixels with the first box of the crowd in a corner: IoU 1 / 3600. It covers more cells than there
    # are kept boxes.
    over = torch.tensor([[941.5, 941.5, 1001.5, 1001.5]], device=device)
    assert kept_after_a_crowd(over, threshold) == []
    # The crowd of the other class is elsewhere.
    assert kept_after_a_crowd(over, threshold, torch.tensor([1], device=device)) == [0]
    assert kept_after_a_crowd(over, 1 / 100) == [0]


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_areas_of_one_significant_digit(device, dtype):
    # Both areas and the area of the intersection round to the least positive number, so the IoU is 1 instead of 0.25.
    least = -149 if dtype == torch.float32 else -1074
    side = 1.4**0.5 * 2.0 ** (least / 2)
    first = torch.tensor([[0.0, 0.0, side, side]], dtype=dtype, device=device)
    moved = torch.tensor([0.6 * side, 0, 0.6 * side, 0], dtype=dtype, device=device)
    shifts = torch.linspace(0, side, 8, dtype=dtype, device=device)
    for shift in shifts:  # for several positions of the edges of cells
        assert kept_after_a_crowd(torch.cat((first, first + moved)) + shift, 0.5) == [0]


def test_the_longest_sides(device):
    end = torch.finfo(torch.float64).max
    boxes = torch.tensor(
        [[-0.255 * end, 0, 0.255 * end, 1], [-0.123 * end, 0, 0.123 * end, 1]], dtype=torch.float64, device=device
    )
    assert kept_after_a_crowd(boxes, 0.3) == [0]
    assert kept_after_a_crowd(boxes, 0.5) == [0, 1]
