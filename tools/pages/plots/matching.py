"""Measures matching against the number of ground truths and draws docs/generated/images/matching.png.

    python -m tools.pages.plots.matching

torchvision's curve ends before its temporaries would take more than 10 GB. The single point of mmdet, whose assigner
builds the IoU matrix, is the number that mmdet's documentation gives for a matrix of 512 x 400,000 (`bbox_overlaps`,
8020 MiB).
"""

from __future__ import annotations

from functools import partial

import torch
from matplotlib.axes import Axes

import retinanet_ops as ops
from benchmarks.harness import coco_anchors, ground_truth
from tools.pages.plots.curves import CPU, Curve, draw, measure

COUNTS = (1, 3, 10, 30, 100, 300, 1000, 2000, 5000)
TORCHVISION_MOST = 1000
MMDET = (512, 8020 * 2**20)


def curves() -> dict[str, Curve]:
    """Measure the curve of each implementation."""
    from torchvision.models.detection._utils import Matcher
    from torchvision.ops import box_iou

    grid = coco_anchors(CPU)
    anchors = grid.boxes()
    matcher = Matcher(0.5, 0.4, allow_low_quality_matches=True)
    result: dict[str, Curve] = {"ours, grid": [], "ours, explicit anchors": [], "torchvision": []}
    for count in COUNTS:
        torch.manual_seed(0)
        boxes, number = ground_truth(count, CPU)[None], torch.tensor([count])
        for name, function in {
            "ours, grid": partial(ops.match_anchors, grid, boxes, number),
            "ours, explicit anchors": partial(ops.match_anchors, anchors, boxes, number),
            "torchvision": partial(lambda boxes: matcher(box_iou(boxes[0], anchors)), boxes),
        }.items():
            if name != "torchvision" or count <= TORCHVISION_MOST:
                measure(result[name], name, count, function)
    return result


def add_mmdet(seconds: Axes, memory: Axes) -> None:
    """Add the number that mmdet publishes to the plot of memory."""
    memory.plot([MMDET[0]], [MMDET[1] / 2**20], "k*", label="mmdet, 400,000 anchors (published)")


if __name__ == "__main__":
    draw(curves(), "ground truths", "Matching of 201,600 anchors", "matching.png", add_mmdet)
