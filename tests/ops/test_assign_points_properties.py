"""Assignment of points against the reference on grids and boxes of all kinds; `make fuzz` tries many more of them."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from properties import many_cases
from test_matching_properties import MatchingCases

import retinanet_ops as ops
from retinanet_ops import reference


class PointCases(MatchingCases):
    def truth(self, images, anchors):
        """Return boxes, labels and counts; a third of the boxes has a point on a bound of one of the rules."""
        boxes, count = self.ground_truth(images, anchors)
        if len(anchors) and boxes.shape[1] and self.integer(0, 1):
            for n in range(images):
                for i in range(0, boxes.shape[1], 3):
                    anchor = anchors[self.integer(0, len(anchors) - 1)]
                    width = anchor[2] - anchor[0]
                    x, y = (anchor[:2] + anchor[2:]) / 2
                    sides = width * torch.tensor([self.one_of(0.0, 0.5, 1.5, 3.0, 4.0, 8.0) for _ in range(4)])
                    boxes[n, i] = torch.stack((x - sides[0], y - sides[1], x + sides[2], y + sides[3]))
        return boxes, torch.arange(boxes.shape[1]).add(5).expand(images, -1), count

    def options(self):
        low = self.one_of(4.0, 0.0, 1.0)
        return {
            "radius": self.one_of(1.5, 1.5, 0.0, 0.3, 5.0, 1e30, None),
            "distance_range": (low, low * self.one_of(2.0, 1.0, 1.7)),
        }


@given(seed=st.integers(0, 2**63 - 1))
@many_cases
def test_assignment_equals_the_reference(device, seed):
    cases = PointCases(seed)
    grid, images = cases.grid(), cases.integer(1, 2)
    anchors = grid.boxes()
    boxes, labels, count = cases.truth(images, anchors)
    boxes = boxes.to(cases.one_of(torch.float32, torch.float32, torch.float64))
    options = cases.options()
    expected = reference.assign_points(grid, boxes, labels, count, **options)
    truth = boxes.to(device), labels.to(device), count.to(device)
    level_sizes = [h * w * a for (h, w), a in zip(grid.grid_sizes, grid.anchors_per_cell, strict=True)]
    for form, sizes in ((grid.to(device), None), (anchors.to(device), level_sizes)):
        actual = ops.assign_points(form, *truth, level_sizes=sizes, **options)
        for name, value, wanted in zip(actual._fields, actual, expected, strict=True):
            assert torch.equal(value.cpu(), wanted), name
