"""IoU of every pair against the reference on boxes of all kinds; `make fuzz` tries many more of them."""

import torch
from cases import DEGENERATE_BOXES
from hypothesis import given
from hypothesis import strategies as st
from properties import Cases, many_cases

import retinanet_ops as ops
from retinanet_ops import reference


class BoxCases(Cases):
    def boxes(self):
        """Return boxes of one kind, some of them degenerate."""
        count = self.one_of(self.integer(0, 9), self.integer(25, 70), self.integer(500, 530))
        kind = self.one_of("anywhere", "lattice", "far", "tiny")
        corner, size = self.uniform(count, 2, low=-10, high=100), self.uniform(count, 2, low=0.5, high=60)
        if kind == "lattice":
            corner, size = (corner / 16).round() * 16, (size / 16).ceil() * 16
        elif kind == "far":
            corner = corner + 1e5
        elif kind == "tiny":
            corner, size = corner * 2.0**-72, size * 2.0**-72
        boxes = torch.cat((corner, corner + size), dim=1)
        odd = self.integers(count, 0, 9) == 0
        boxes[odd] = DEGENERATE_BOXES[self.integers(int(odd.sum()), 0, len(DEGENERATE_BOXES) - 1)]
        return boxes


@given(seed=st.integers(0, 2**63 - 1))
@many_cases
def test_box_iou_equals_the_reference(device, seed):
    cases = BoxCases(seed)
    dtype = cases.one_of(torch.float32, torch.float32, torch.float64)
    a, b = cases.boxes().to(dtype), cases.boxes().to(dtype)
    if cases.integer(0, 1) and len(a):
        b = torch.cat((b, a + cases.one_of(0.0, 1.0)))
    assert torch.equal(ops.box_iou(a.to(device), b.to(device)).cpu(), reference.box_iou(a, b))
