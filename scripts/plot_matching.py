"""Measures matching against the number of ground truths and draws docs/images/matching.png.

    python scripts/plot_matching.py

Time is the median of a few runs, memory the most that torch's allocator holds during one. torchvision stops where its
temporaries would take more than 4 GB. mmdet's point is the figure of its documentation for an IoU matrix of 512 x
400,000 (`bbox_overlaps`, 8020 MiB), which its assigner builds.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import matplotlib
import torch

matplotlib.use("Agg")
from matplotlib import pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
from harness import coco_anchors, ground_truth, peak_extra_bytes  # noqa: E402

import retinanet_ops as ops  # noqa: E402

COUNTS = (1, 3, 10, 30, 100, 300, 1000, 2000, 5000)
TORCHVISION_MOST = 300
MMDET = (512, 8020 * 2**20)
CPU = torch.device("cpu")

Curve = list[tuple[int, float, int]]  # ground truths, seconds, bytes


def median_seconds(function: Callable[[], object]) -> float:
    """Of runs for half a second, and three at least."""
    function()
    times: list[float] = []
    while len(times) < 3 or sum(times) < 0.5:
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measure() -> dict[str, Curve]:
    """The curve of each row."""
    from torchvision.models.detection._utils import Matcher
    from torchvision.ops import box_iou

    grid = coco_anchors(CPU)
    anchors = grid.boxes()
    matcher = Matcher(0.5, 0.4, allow_low_quality_matches=True)
    curves: dict[str, Curve] = {"ours, grid": [], "ours, explicit anchors": [], "torchvision": []}
    for count in COUNTS:
        torch.manual_seed(0)
        boxes, number = ground_truth(count, CPU)[None], torch.tensor([count])
        functions: dict[str, Callable[[], object]] = {
            "ours, grid": partial(ops.match_anchors, grid, boxes, number),
            "ours, explicit anchors": partial(ops.match_anchors, anchors, boxes, number),
            "torchvision": partial(lambda boxes: matcher(box_iou(boxes[0], anchors)), boxes),
        }
        for name, function in functions.items():
            if name != "torchvision" or count <= TORCHVISION_MOST:
                curves[name].append((count, median_seconds(function), peak_extra_bytes(function, CPU)))
                print(
                    f"{name:<24} {count:5} {curves[name][-1][1] * 1e3:10.3f} ms {curves[name][-1][2] / 2**20:8.1f} MiB"
                )
    return curves


def main() -> None:
    """Measure and draw."""
    curves = measure()
    figure, (seconds, memory) = plt.subplots(1, 2, figsize=(10, 4))
    for name, curve in curves.items():
        counts = [count for count, _, _ in curve]
        seconds.plot(counts, [1e3 * t for _, t, _ in curve], marker="o", label=name)
        memory.plot(counts, [size / 2**20 for _, _, size in curve], marker="o", label=name)
    memory.plot([MMDET[0]], [MMDET[1] / 2**20], "k*", label="mmdet, 400,000 anchors (published)")
    for axes, label in ((seconds, "ms"), (memory, "MiB")):
        axes.set(xscale="log", yscale="log", xlabel="ground truths", ylabel=label)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(f"Matching of 201,600 anchors, float32, CPU, {torch.get_num_threads()} threads")
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "images" / "matching.png", dpi=110)


if __name__ == "__main__":
    main()
