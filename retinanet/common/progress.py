"""Progress of long work: a bar on a terminal, and now and then a line where the output goes into a file."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, TextIO

from retinanet.common.launch import launched_rank

#: Seconds between the lines that stand for a bar.
SECONDS_BETWEEN_LINES = 120.0


def make_bar(*args: Any, **options: Any) -> Any:
    """Return a `tqdm` bar on standard error, or `ProgressLines` with the same arguments if that is no terminal.

    Of several processes that a launcher has started together, the main one alone shows progress.
    """
    if launched_rank():
        return ProgressLines(*args, **options, silent=True)
    if not sys.stderr.isatty():
        return ProgressLines(*args, **options)
    from tqdm import tqdm

    return tqdm(*args, **options)


def progress_bar(description: str, unit: str, delay: float = 0) -> Callable[..., Iterable[Any]]:
    """Return a wrapper of iterables that shows progress on standard error.

    Args:
        description: The text before the bar.
        unit: What is counted, in the singular.
        delay: Seconds before the bar appears.
    """
    return partial(make_bar, desc=description, unit=unit, delay=delay)


class ProgressLines:
    """Stand-in for `tqdm` that prints a line every two minutes, and nothing for work that takes less.

    A bar that redraws itself would fill a log file with thousands of copies.

    Args:
        iterable: What to iterate over, or None for a bar that is moved by `update`.
        total: Number of items, or None for the length of `iterable`.
        initial: Items that are complete at the start.
        desc: The text before the numbers.
        unit: What is counted, in the singular.
        silent: Whether to print nothing at all.
        **_: Other arguments of `tqdm`, which have no effect.
    """

    def __init__(
        self,
        iterable: Iterable[Any] | None = None,
        *,
        total: int | None = None,
        initial: int = 0,
        desc: str = "",
        unit: str = "item",
        silent: bool = False,
        **_: Any,
    ) -> None:
        """Start the clock."""
        self.iterable = iterable
        self.total = len(iterable) if total is None and hasattr(iterable, "__len__") else total  # type: ignore[arg-type]
        self.initial = self.done = initial
        self.description = desc
        self.unit = unit
        self.postfix = ""
        self.silent = silent
        self.started = self.printed = time.monotonic()

    def __iter__(self) -> Iterator[Any]:
        assert self.iterable is not None
        for item in self.iterable:
            yield item
            self.update()

    def set_postfix_str(self, s: str = "", refresh: bool = True) -> None:
        """Set the text at the end of the next line."""
        self.postfix = s

    def update(self, n: int = 1) -> None:
        """Count `n` more items, and print a line if the last one was long ago."""
        self.done += n
        if time.monotonic() - self.printed >= SECONDS_BETWEEN_LINES:
            self.write(str(self))

    def write(self, s: str, file: TextIO | None = None) -> None:
        """Print a line of text; the next line of progress waits for the usual time."""
        self.printed = time.monotonic()
        if not self.silent:
            print(s, file=sys.stderr if file is None else file, flush=True)

    def close(self) -> None:
        """Do nothing: there is no bar to remove."""

    def __str__(self) -> str:
        """Return what is done, and how long the rest will take."""
        of = "" if self.total is None else f" of {self.total}"
        counted = self.done if self.total is None else self.total
        plural = "" if counted == 1 else "es" if self.unit.endswith(("s", "x", "ch", "sh")) else "s"
        text = f"{self.description}: {self.done}{of} {self.unit}{plural}"
        fresh = self.done - self.initial
        if self.total is not None and fresh > 0:
            rest = (time.monotonic() - self.started) / fresh * (self.total - self.done)
            text += f", {duration(rest)} left"
        return text + (f", {self.postfix}" if self.postfix else "")


def duration(seconds: float) -> str:
    """Return a time span in words, such as "2 h 05 min", "17 min" or "40 s"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02} min"


def clock_in(seconds: float) -> str:
    """Return the time of day in `seconds` from now, with the day if that is not within 20 hours."""
    moment = time.localtime(time.time() + seconds)
    return time.strftime("%H:%M" if seconds < 20 * 3600 else "%a %d %b, %H:%M", moment)
