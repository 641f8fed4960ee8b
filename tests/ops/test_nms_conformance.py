"""The cases of docs/generated/nms_conformance.md on every backend, and the page itself."""

from pathlib import Path

import pytest
import torch
from nms_conformance import ROWS

import retinanet_ops as ops
from retinanet_ops import reference

ROOT = Path(__file__).resolve().parents[2]


LARGE = 10_000  # boxes


@pytest.mark.parametrize(
    "row",
    [pytest.param(row, id=row.name, marks=[pytest.mark.once] if len(row.boxes) > LARGE else []) for row in ROWS],
)
def test_row(device, row):
    for dtype in row.dtypes:
        boxes, scores = row.boxes.to(device, dtype), row.scores.to(device)
        if row.classes is None:
            keep = ops.nms(boxes, scores, row.threshold)
        else:
            keep = ops.batched_nms(boxes, scores, row.classes.to(device), row.threshold)
        assert keep.tolist() == row.expected
        classes = None if row.classes is None else row.classes.to(device)[None]
        index, count = ops.batched_nms_padded(
            boxes[None],
            scores[None],
            classes,
            iou_threshold=row.threshold,
            max_detections=len(row.expected) + 1,
        )
        assert index.tolist() == [[*row.expected, -1]] and count.tolist() == [len(row.expected)]


@pytest.mark.parametrize("candidates", (0, 5))
def test_no_images(device, candidates):
    boxes, scores = torch.empty(0, candidates, 4, device=device), torch.empty(0, candidates, device=device)
    index, count = ops.batched_nms_padded(boxes, scores, iou_threshold=0.5, max_detections=3)
    assert index.shape == (0, 3) and count.shape == (0,)


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("row", [row for row in ROWS if len(row.boxes) <= LARGE], ids=lambda row: row.name)
def test_the_reference_agrees(row):
    classes = torch.zeros(len(row.boxes), dtype=torch.int64) if row.classes is None else row.classes
    for dtype in row.dtypes:
        assert reference.batched_nms(row.boxes.to(dtype), row.scores, classes, row.threshold).tolist() == row.expected


@pytest.mark.backends("cpu")
def test_the_page_is_up_to_date():
    torchvision = pytest.importorskip("torchvision")
    page = pytest.importorskip("tools.pages.nms_conformance", reason="needs the source tree")
    text = (ROOT / "docs" / "generated" / "nms_conformance.md").read_text()
    if f"torchvision {torchvision.__version__.split('+')[0]} " not in text:
        pytest.skip("was written with another version of torchvision")
    assert text == page.page()
