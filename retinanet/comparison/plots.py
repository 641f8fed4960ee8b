"""The curves of a comparison: training loss and validation AP50 over the steps, all models in one figure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from retinanet.comparison.results import ModelResult
from retinanet.detection.report_plots import figure_svg


def curves_svg(models: Sequence[ModelResult]) -> str:
    """Return the curves as SVG. A line is the mean of the seeds, and the band around it their range."""

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        lines = []
        for model in models:
            _draw_curve(left, [run.losses for run in model.runs])
            lines.append(_draw_curve(right, [run.evaluations for run in model.runs]))
        left.set(xlabel="step", ylabel="training loss (sum)")
        right.set(xlabel="step", ylabel="validation AP50")
        for axes in (left, right):
            axes.set_ylim(bottom=0)  # After all curves, because the upper limit is that of the curves so far.
            axes.grid(alpha=0.4)
        right.legend(lines, [model.title for model in models], loc="best")

    return figure_svg((9, 3.8), draw)


def _draw_curve(axes: Axes, runs: Sequence[Sequence[tuple[int, float]]]) -> Line2D:
    steps = [step for step, _ in runs[0]]
    values = np.array([[value for _, value in run] for run in runs])  # [seeds, steps]
    [line] = axes.plot(steps, values.mean(axis=0), marker="." if len(steps) < 30 else None)
    axes.fill_between(steps, values.min(axis=0), values.max(axis=0), color=line.get_color(), alpha=0.2, linewidth=0)
    return line
