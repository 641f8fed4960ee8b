"""Soft-NMS of a padded batch, in steps and in one pass."""

import pytest
import torch
from harness import ground_truth

import retinanet_ops as ops
from retinanet_ops import reference


@pytest.mark.parametrize("row", ("ours", "reference"))
@pytest.mark.parametrize("method", ("gaussian", "linear"))
@pytest.mark.parametrize("candidates", (1000, pytest.param(5000, marks=pytest.mark.full)))
def test_soft_nms(compare, device, candidates, method, row):
    boxes = torch.stack([ground_truth(candidates, device) for _ in range(2)])
    scores = (torch.randperm(2 * candidates).view(2, -1) / (2 * candidates)).to(device)
    labels = torch.randint(0, 80, (2, candidates)).to(device)
    options = {"method": method, "max_detections": 100}
    library = ops if row == "ours" else reference
    compare(
        row,
        lambda: library.soft_nms(boxes, scores, labels, **options),
        reference.soft_nms(boxes, scores, labels, **options),
        group=f"soft-NMS, {method}, best 100 of 2 x {candidates:,} boxes, 80 classes, float32",
    )


@pytest.mark.parametrize("row", ("ours", "reference"))
@pytest.mark.parametrize("method", ("gaussian", "linear"))
@pytest.mark.parametrize("candidates", (300, pytest.param(3000, marks=pytest.mark.full)))
def test_soft_nms_scores(compare, device, candidates, method, row):
    boxes = torch.stack([ground_truth(candidates, device) for _ in range(2)])
    scores = (torch.randperm(2 * candidates).view(2, -1) / (2 * candidates)).to(device)
    labels = torch.randint(0, 10, (2, candidates)).to(device)
    library = ops if row == "ours" else reference
    compare(
        row,
        lambda: library.soft_nms_scores(boxes, scores, labels, method=method),
        reference.soft_nms_scores(boxes, scores, labels, method=method),
        group=f"soft-NMS in one pass, {method}, 2 x {candidates:,} boxes, 10 classes, float32",
    )
