"""Measures NMS against the number of boxes and draws docs/generated/images/nms.png.

    python -m tools.pages.plots.nms

torchvision's curves end before a call would take minutes.
"""

from __future__ import annotations

from functools import partial

import torch

import retinanet_ops as ops
from benchmarks.harness import ground_truth
from tools.pages.plots.curves import CPU, Curve, draw, measure

COUNTS = (100, 300, 1000, 3000, 10_000, 20_000, 50_000, 100_000, 200_000)
TORCHVISION_MOST = 20_000


def curves() -> dict[str, Curve]:
    """Measure the curve of each implementation."""
    import torchvision

    result: dict[str, Curve] = {
        f"{owner}, {op}": [] for owner in ("ours", "torchvision") for op in ("nms", "batched_nms, 80 classes")
    }
    for count in COUNTS:
        torch.manual_seed(0)
        boxes, scores, classes = ground_truth(count, CPU), torch.rand(count), torch.randint(0, 80, (count,))
        for owner, library in (("ours", ops), ("torchvision", torchvision.ops)):
            for op, function in {
                "nms": partial(library.nms, boxes, scores, 0.5),
                "batched_nms, 80 classes": partial(library.batched_nms, boxes, scores, classes, 0.5),
            }.items():
                if owner == "ours" or count <= TORCHVISION_MOST:
                    measure(result[f"{owner}, {op}"], f"{owner}, {op}", count, function)
    return result


if __name__ == "__main__":
    draw(curves(), "boxes", "NMS of boxes of 8 to 400 pixels on 800 x 1344", "nms.png")
