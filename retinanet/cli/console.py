"""What several commands print: progress and the COCO numbers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from retinanet.common.errors import printable
from retinanet.common.launch import launched_rank
from retinanet.common.progress import make_bar, progress_bar

if TYPE_CHECKING:
    from retinanet.detection.score_curves import OperatingPoint

__all__ = ["print_counts", "print_stats", "print_warning", "progress_bar", "step_bar"]


@contextmanager
def step_bar(total: int | None, unit: str, name: str) -> Iterator[Callable[[], Any]]:
    """Show the progress inside one item of a longer list, below the bar of the list.

    Args:
        total: Number of steps, or None if unknown.
        unit: What is counted, in the singular.
        name: The item.

    Yields:
        A function that counts one step.
    """
    bar = make_bar(total=total, desc=f"  {printable(name, 40)}", unit=unit, leave=False, delay=1)
    try:
        yield bar.update
    finally:
        bar.close()


def print_stats(stats: dict[str, float]) -> None:
    """Print the twelve COCO numbers, one per line."""
    from retinanet.detection.coco_numbers import STAT_MEANINGS

    for name, value in stats.items():
        shown, note = ("  n/a", ": undefined, the data set has no such objects") if value < 0 else (f"{value:.3f}", "")
        print(f"  {name:<6} {shown}  {STAT_MEANINGS[name]}{note}")


def print_counts(points: Sequence[OperatingPoint]) -> None:
    """Print precision, recall and F1 at some score thresholds, one per line."""
    width = max([len("class"), *(len(point.name) for point in points)])
    print(f"  {'class':<{width}}  score >  precision  recall     F1  correct  wrong  missed")
    for point in points:
        counts = point.counts
        precision, recall, f1 = (
            "n/a" if v is None else f"{v:.3f}" for v in (counts.precision, counts.recall, counts.f1)
        )
        numbers = f"{counts.threshold:7.3f}  {precision:>9}  {recall:>6}  {f1:>5}"
        found = f"{counts.true_positives:7}  {counts.false_positives:5}  {counts.false_negatives:6}"
        print(f"  {point.name:<{width}}  {numbers}  {found}  {point.note}".rstrip())


def print_warning(text: str) -> None:
    """Print a warning on standard error; of several processes, the main one alone does."""
    if not launched_rank():
        print(f"retinanet: warning: {text}", file=sys.stderr)
