"""Pairwise IoU of ground-truth boxes and the 201,600 anchors of a COCO image."""

import pytest
import torch
from harness import coco_anchors, ground_truth

import retinanet_ops as ops
from retinanet_ops import reference


@pytest.mark.parametrize("row", ("ours", "torchvision", "torch.compile"))
@pytest.mark.parametrize("num_gt", (20, pytest.param(100, marks=pytest.mark.full)))
def test_box_iou(compare, device, num_gt, row):
    boxes, anchors = ground_truth(num_gt, device), coco_anchors(device).boxes()
    if row == "torchvision":
        torchvision = pytest.importorskip("torchvision")
    compiled = torch.compile(reference.box_iou) if row == "torch.compile" else None
    function = {
        "ours": lambda: ops.box_iou(boxes, anchors),
        "torchvision": lambda: torchvision.ops.box_iou(boxes, anchors),
        "torch.compile": lambda: compiled(boxes, anchors),
    }[row]
    compare(
        row,
        function,
        reference.box_iou(boxes, anchors),
        bytes_moved=4 * num_gt * len(anchors),
        group=f"box IoU, {num_gt} x {len(anchors):,}, float32",
    )
