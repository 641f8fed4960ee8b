"""Random cases of Soft-NMS against the reference. `make fuzz` tries many more."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from properties import Cases, many_cases

import retinanet_ops as ops
from retinanet_ops import reference


@given(seed=st.integers(0, 2**63 - 1))
@many_cases
def test_soft_nms_of_coarse_boxes_and_scores(device, seed):
    cases = Cases(seed)
    # From 256 candidates on, the CUDA kernel keeps only some of them up to date; 512 have a slot in registers.
    n = cases.one_of(*(cases.integer(0, limit) for limit in (40, 40, 600, 2500)))
    extent = cases.one_of(6, 6, 60)
    corner, size = cases.integers(2 * n, 0, extent).view(n, 2), cases.integers(2 * n, 0, 4).view(n, 2)
    boxes = torch.cat((corner, corner + size), dim=1).float()[None]
    # All values have few binary digits, so scores tie often.
    levels = cases.one_of(8, 8, 1024)
    scores, labels = cases.integers(n, 0, levels)[None] / levels, cases.integers(n, 0, 1)[None]
    options = {
        "method": "linear",
        "iou_threshold": cases.one_of(0.0, 0.25, 0.5),
        "min_score": cases.one_of(0.0, 0.125, 0.3),
        "max_detections": cases.one_of(cases.integer(0, 45), cases.integer(60, 140)),
    }
    expected = reference.soft_nms(boxes, scores, labels, **options)
    actual = ops.soft_nms(boxes.to(device), scores.to(device), labels.to(device), **options)
    assert all(torch.equal(a.cpu(), e) for a, e in zip(actual, expected, strict=True))
