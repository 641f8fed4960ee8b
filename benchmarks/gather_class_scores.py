"""Scores of all classes for 100 detections in each of two images."""

import pytest
import torch
from harness import COCO_CLASSES, coco_anchors, coco_heads

import retinanet_ops as ops
from retinanet_ops import reference
from retinanet_ops.reference._rows import rows_of


@pytest.mark.parametrize("row", ("ours", "permute, cat and gather"))
def test_gather_class_scores(compare, device, row):
    logits, _ = coco_heads(2, COCO_CLASSES, device, -4.0)
    index = torch.randint(0, coco_anchors(device).num_anchors, (2, 100)).to(device)

    def rows_first() -> torch.Tensor:
        rows = rows_of(logits, COCO_CLASSES)
        return rows.gather(1, index[..., None].expand(-1, -1, COCO_CLASSES)).sigmoid()

    compare(
        row,
        rows_first if row != "ours" else lambda: ops.gather_class_scores(logits, index, COCO_CLASSES),
        reference.gather_class_scores(logits, index, COCO_CLASSES),
        group="class scores of 2 x 100 detections, 201,600 anchors x 80 classes, float32",
    )
