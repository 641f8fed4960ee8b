"""The plots of an evaluation report as SVG, drawn by hotcoco where it has them."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable, Iterator
from typing import Any, Literal

import hotcoco.plot
import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from retinanet.detection.score_curves import Counts, ScoreCurve, ScoreCurves

# With more classes, curves could not be told apart.
_MOST_CURVES = 10


def precision_recall_plot(evaluation: Any) -> str:
    """Return the plot of precision over recall for each IoU threshold, as SVG.

    Args:
        evaluation: hotcoco's evaluator, accumulated.
    """
    return _svg((6.6, 5), lambda axes: hotcoco.plot.pr_curve_iou_sweep(evaluation, ax=axes))


def class_plot(evaluation: Any) -> str:
    """Return the plot of precision over recall at IoU 0.5 for the classes with the best AP50, as SVG."""
    return _svg((5.2, 5), lambda axes: hotcoco.plot.pr_curve_top_n(evaluation, top_n=_MOST_CURVES, ax=axes))


def tide_plot(errors: dict[str, Any]) -> str:
    """Return the bars of hotcoco's TIDE errors, as SVG."""
    return _svg((6.6, 3.4), lambda axes: hotcoco.plot.tide_errors(errors, ax=axes))


def confusion_plot(confusion: dict[str, Any]) -> str:
    """Return hotcoco's confusion matrix, as SVG."""
    side = min(max(5.0, 1.5 + 0.4 * len(confusion["cat_names"])), 12.0)
    return _svg((side, side), lambda axes: hotcoco.plot.confusion_matrix(confusion, ax=axes), layout=None)


def calibration_plot(calibration: dict[str, Any]) -> str:
    """Return the diagram of hotcoco's calibration, as SVG."""
    return _svg((5, 5), lambda axes: hotcoco.plot.reliability_diagram(calibration, ax=axes))


def score_plot(curve: ScoreCurve, at: Counts) -> str:
    """Return the plot of precision, recall and F1 over the score threshold, with a line at one threshold, as SVG."""

    def draw(axes: Axes) -> None:
        for name, values in (("precision", curve.precision), ("recall", curve.recall), ("F1", curve.f1)):
            # A threshold just below a score keeps the detections with this score.
            axes.step(np.r_[curve.scores, 0], np.r_[values, values[-1]], where="post", label=name)
        axes.axvline(at.threshold, color="0.3", linestyle="--", linewidth=1)
        axes.annotate(f"score > {at.threshold:.3f}", (at.threshold, 0.02), xytext=(4, 0), textcoords="offset points")
        _label(axes, "score threshold", "precision, recall, F1")

    return _svg((6.6, 4.2), draw)


def class_f1_plot(curves: ScoreCurves) -> str:
    """Return the plot of F1 over the score threshold for the classes with most objects, as SVG."""
    pairs = sorted(zip(curves.class_names, curves.by_class, strict=True), key=lambda pair: -pair[1].objects)

    def draw(axes: Axes) -> None:
        for name, curve in pairs[:_MOST_CURVES]:
            if len(curve.scores):
                axes.step(np.r_[curve.scores, 0], np.r_[curve.f1, curve.f1[-1]], where="post", label=name)
        _label(axes, "score threshold", "F1")

    return _svg((6.6, 4.2), draw)


def _label(axes: Axes, x_label: str, y_label: str) -> None:
    axes.set(xlabel=x_label, ylabel=y_label, xlim=(0, 1), ylim=(0, 1.02))
    axes.grid(alpha=0.4)
    axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1))


def _svg(
    size: tuple[float, float], draw: Callable[[Axes], Any], layout: Literal["compressed"] | None = "compressed"
) -> str:
    return figure_svg(size, lambda figure: draw(figure.add_subplot()), layout)


def figure_svg(
    size: tuple[float, float], draw: Callable[[Figure], Any], layout: Literal["compressed"] | None = "compressed"
) -> str:
    """Return a figure as SVG, in the style of hotcoco.

    Args:
        size: Width and height in inches.
        draw: Draws on the figure.
        layout: matplotlib's layout engine.
    """
    # Text becomes outlines, so that a page looks the same without the fonts; the salt makes the ids reproducible; and
    # dollar signs in the names of classes are no formulas.
    options: dict[Any, Any] = {"svg.fonttype": "path", "svg.hashsalt": "retinanet", "text.parse_math": False}
    with hotcoco.plot.style(), matplotlib.rc_context(options):
        figure = Figure(figsize=size, layout=layout)
        draw(figure)
        file = io.StringIO()
        with _without_font_warnings():
            figure.savefig(file, format="svg", metadata={"Date": None}, bbox_inches="tight", facecolor="white")
    return file.getvalue()


@contextlib.contextmanager
def _without_font_warnings() -> Iterator[None]:
    """Keep matplotlib from reporting the weights that the fonts of hotcoco lack."""
    logger = logging.getLogger("matplotlib.font_manager")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
