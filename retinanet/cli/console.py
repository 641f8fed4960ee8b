"""What several commands print: progress and the COCO numbers."""

from __future__ import annotations

from retinanet.common.progress import progress_bar

__all__ = ["print_stats", "progress_bar"]


def print_stats(stats: dict[str, float]) -> None:
    """Print the twelve COCO numbers, one per line."""
    from retinanet.detection.coco_numbers import STAT_MEANINGS

    for name, value in stats.items():
        shown = "  n/a" if value < 0 else f"{value:.3f}"
        print(f"  {name:<6} {shown}  {STAT_MEANINGS[name]}{' (no such objects)' if value < 0 else ''}")
