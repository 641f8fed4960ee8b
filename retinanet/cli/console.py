"""What several commands print: progress bars and the COCO numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any


def progress_bar(description: str, unit: str, delay: float = 0) -> Callable[..., Iterable[Any]]:
    """Return a wrapper of iterables that shows a progress bar on standard error.

    Args:
        description: The text before the bar.
        unit: What is counted, in the singular.
        delay: Seconds before the bar appears.
    """
    from tqdm import tqdm

    return partial(tqdm, desc=description, unit=unit, delay=delay)


def print_stats(stats: dict[str, float]) -> None:
    """Print the twelve COCO numbers, one per line."""
    from retinanet.detection.coco_numbers import STAT_MEANINGS

    for name, value in stats.items():
        shown = "  n/a" if value < 0 else f"{value:.3f}"
        print(f"  {name:<6} {shown}  {STAT_MEANINGS[name]}{' (no such objects)' if value < 0 else ''}")
