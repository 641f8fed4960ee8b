"""Measures time and memory against a size on the CPU and draws both curves side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib
import torch

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from benchmarks.harness import peak_resident_bytes

ROOT = Path(__file__).resolve().parents[3]

CPU = torch.device("cpu")

#: Points (size, seconds, bytes).
Curve = list[tuple[int, float, int]]


def median_seconds(function: Callable[[], object]) -> float:
    """Return the median time of repeated calls: at least three calls and half a second."""
    function()
    times: list[float] = []
    while len(times) < 3 or sum(times) < 0.5:
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measure(curve: Curve, name: str, size: int, function: Callable[[], object]) -> None:
    """Append a point to a curve: the median time, and the peak memory that one call adds to the process."""
    seconds, memory = median_seconds(function), peak_resident_bytes(function, CPU) or 0
    curve.append((size, seconds, memory))
    print(f"{name:<24} {size:6} {seconds * 1e3:10.3f} ms {memory / 2**20:8.1f} MiB", flush=True)


def draw(
    curves: dict[str, Curve],
    xlabel: str,
    title: str,
    file: str,
    more: Callable[[Axes, Axes], None] = lambda seconds, memory: None,
) -> None:
    """Draw the curves into a file of docs/generated/images.

    Args:
        curves: Curve by name.
        xlabel: Label of the size axis.
        title: Title of the figure.
        file: Name of the file.
        more: Function that adds to the plots of time and memory.
    """
    figure, (seconds, memory) = plt.subplots(1, 2, figsize=(10, 4.6))
    for name, curve in curves.items():
        sizes = [size for size, _, _ in curve]
        seconds.plot(sizes, [1e3 * t for _, t, _ in curve], marker="o", label=name)
        # Linux reports memory in pages, so smaller values have no meaning.
        memory.plot(sizes, [max(size, 4096) / 2**20 for _, _, size in curve], marker="o", label=name)
    more(seconds, memory)
    for axes, label in ((seconds, "ms"), (memory, "MiB")):
        axes.set(xscale="log", yscale="log", xlabel=xlabel, ylabel=label)
        axes.grid(alpha=0.3)
    figure.suptitle(f"{title}, float32, CPU, {torch.get_num_threads()} threads")
    labels = {
        label: handle
        for axes in (seconds, memory)
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    columns = 3 if len(labels) > 4 else 2
    rows = -(-len(labels) // columns)
    # The legend is below the plots, so that it hides no curve.
    figure.legend(labels.values(), labels.keys(), loc="lower center", ncols=columns)
    figure.tight_layout(rect=(0, 0.02 + 0.05 * rows, 1, 1))
    figure.savefig(ROOT / "docs" / "generated" / "images" / file, dpi=110)
