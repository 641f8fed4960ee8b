"""What several commands print: progress and the COCO numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from retinanet.common.errors import printable
from retinanet.common.progress import progress_bar

__all__ = ["print_stats", "progress_bar", "step_bar"]


@contextmanager
def step_bar(total: int | None, unit: str, name: str) -> Iterator[Callable[[], Any]]:
    """Show a bar for the steps inside one item of a longer list, on a terminal only, and remove it at the end.

    Args:
        total: Number of steps, or None if unknown.
        unit: What is counted, in the singular.
        name: The item.

    Yields:
        A function that counts one step.
    """
    from tqdm import tqdm

    with tqdm(total=total, desc=f"  {printable(name, 40)}", unit=unit, leave=False, delay=1, disable=None) as bar:
        yield bar.update


def print_stats(stats: dict[str, float]) -> None:
    """Print the twelve COCO numbers, one per line."""
    from retinanet.detection.coco_numbers import STAT_MEANINGS

    for name, value in stats.items():
        shown = "  n/a" if value < 0 else f"{value:.3f}"
        print(f"  {name:<6} {shown}  {STAT_MEANINGS[name]}{' (no such objects)' if value < 0 else ''}")
