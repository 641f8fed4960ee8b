"""Matching against the reference on boxes of all kinds; `make fuzz` tries many more of them."""

from dataclasses import replace

import torch
from cases import DEGENERATE_BOXES
from hypothesis import given
from hypothesis import strategies as st
from properties import Cases, many_cases

import retinanet_ops as ops
from retinanet_ops import AnchorGrid, MatchRule, PaddedBoxes, reference
from retinanet_ops.constants import LOW_QUALITY_RULES


class MatchingCases(Cases):
    def grid(self):
        """Return a pyramid of few cells, whose strides and base anchors are rarely whole numbers."""
        levels = self.integer(1, 3)
        per_cell = tuple(self.integer(0, 4) for _ in range(levels))
        stride = self.one_of(4.0, 8.0, 7.3)
        bases = []
        for level, count in enumerate(per_cell):
            size = stride * 2**level * self.uniform(count, 2, low=0.3, high=5)
            base = torch.cat((-size / 2, size / 2), dim=1) + self.one_of(0.0, 3.7)
            bases.append(base.round() if self.integer(0, 1) else base)
        base_anchors = torch.cat([torch.empty(0, 4), *bases])
        if self.integer(0, 9) == 0 and len(base_anchors):
            base_anchors[0] = DEGENERATE_BOXES[self.integer(0, len(DEGENERATE_BOXES) - 1)]
        return AnchorGrid(
            base_anchors=base_anchors,
            anchors_per_cell=per_cell,
            grid_sizes=tuple((self.integer(0, 12) >> level, self.integer(0, 14) >> level) for level in range(levels)),
            strides=tuple((stride * 2**level, (stride + self.integer(0, 1)) * 2**level) for level in range(levels)),
            offsets=tuple((self.one_of(0.0, 0.5) * stride, self.one_of(0.0, -40.0)) for _ in range(levels)),
        )

    def boxes(self, count, anchors):
        """Return boxes of one kind, such as clustered, nested, or made from anchors."""
        kind = self.one_of("anywhere", "far", "cluster", "nested", "anchors", "parts", "lattice", "tiny", "degenerate")
        corner, size = self.uniform(count, 2, low=-10, high=110), self.uniform(count, 2, low=0.5, high=60)
        if kind == "far":
            corner = corner + 1e4
        elif kind == "cluster":
            corner, size = corner[:1] + self.uniform(count, 2), size[:1] + self.uniform(count, 2)
        elif kind == "nested":
            shrink = torch.arange(count)[:, None] / (count + 1)
            corner, size = corner[:1] + 20 * shrink, size[:1] + 60 - 50 * shrink
        elif kind == "lattice":
            corner, size = (corner / 16).round() * 16, (size / 16).ceil() * 16
        elif kind == "tiny":
            size = size / 100
        elif kind == "degenerate":
            return DEGENERATE_BOXES[self.integers(count, 0, len(DEGENERATE_BOXES) - 1)]
        elif kind in ("anchors", "parts") and len(anchors):
            boxes = anchors[self.integers(count, 0, len(anchors) - 1)].clone()
            if kind == "parts":  # IoUs as close to the thresholds as rounding allows
                boxes[:, 3] = boxes[:, 1] + (boxes[:, 3] - boxes[:, 1]) * self.one_of(0.5, 0.4, 0.25)
            return boxes
        return torch.cat((corner, corner + size), dim=1)

    def ground_truth(self, images, anchors):
        parts = [torch.cat([self.boxes(self.integer(0, 6), anchors) for _ in range(3)]) for _ in range(images)]
        boxes, count = ops.pad_boxes(parts)
        return boxes, count + self.integers(images, -1, 1)

    def rule_and_crowds(self, images, anchors):
        fg_iou = self.one_of(0.5, 0.4, 0.9, 0.05)
        rule = MatchRule(
            fg_iou=fg_iou,
            bg_iou=self.one_of(fg_iou, fg_iou * 0.8, 0.0),
            low_quality=self.one_of(*LOW_QUALITY_RULES),
            low_quality_min_iou=self.one_of(0.0, 0.0, 0.3, -1.0),
        )
        if self.integer(0, 2):
            return rule, None
        crowds = PaddedBoxes(*self.ground_truth(images, anchors))
        return replace(rule, crowd_ioa=self.one_of(0.5, 0.0, 0.9)), crowds


@given(seed=st.integers(0, 2**63 - 1))
@many_cases
def test_matching_equals_the_reference(device, seed):
    cases = MatchingCases(seed)
    grid, images = cases.grid(), cases.integer(1, 2)
    anchors = grid.boxes()
    gt_boxes, gt_count = cases.ground_truth(images, anchors)
    rule, crowds = cases.rule_and_crowds(images, anchors)
    dtype = cases.one_of(torch.float32, torch.float32, torch.float64)
    expected = reference.match_statistics(anchors, gt_boxes.to(dtype), gt_count, rule=rule, crowds=crowds)
    options = {"rule": rule, "crowds": None if crowds is None else PaddedBoxes(*(t.to(device) for t in crowds))}
    arguments = gt_boxes.to(device, dtype), gt_count.to(device)
    for form in (grid.to(device), anchors.to(device)):
        actual = ops.match_statistics(form, *arguments, **options)
        for name, value, wanted in zip(actual._fields, actual, expected, strict=True):
            assert torch.equal(value.cpu(), wanted), name
        assert torch.equal(ops.match_anchors(form, *arguments, **options).cpu(), expected.matches)
        labels = torch.arange(gt_boxes.shape[1]).add(5).expand(images, -1)
        targets = ops.assign_targets(form, arguments[0], labels.to(device), arguments[1], **options)
        assert torch.equal(
            targets.labels.cpu(), torch.where(expected.matches >= 0, expected.matches + 5, expected.matches)
        )
        assert targets.num_positive.tolist() == expected.matches.ge(0).sum(1).tolist()
