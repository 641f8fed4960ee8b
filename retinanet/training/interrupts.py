"""Delayed handling of the signals that stop a program, so that a run is never interrupted within a training step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from retinanet.common.signals import STOP_SIGNALS


class Interrupts:
    """Context manager that delays SIGINT, SIGTERM and SIGHUP until no `postponed()` block is active.

    Only signals with a Python handler are delayed. SIGINT (Ctrl-C) has one by default, and the others have none.
    """

    def __init__(self) -> None:
        """Leave all handlers as they are until the context is entered."""
        self.depth = 0
        self.waiting: list[tuple[int, FrameType | None]] = []
        self.handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}

    def __enter__(self) -> Interrupts:
        # Only the main thread may set handlers, and handlers only run there.
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                handler = signal.getsignal(number)
                if callable(handler):
                    self.handlers[number] = handler
                    signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.handlers.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.depth:
            self.waiting.append((number, frame))
        else:
            self.handlers[number](number, frame)

    @contextmanager
    def postponed(self) -> Iterator[None]:
        """Delay signals within a block; the first of them is handled, and may raise, when no block is active."""
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1
        if self.depth == 0 and self.waiting:
            number, frame = self.waiting[0]
            self.waiting.clear()
            self.handlers[number](number, frame)

    @contextmanager
    def ignored(self) -> Iterator[None]:
        """Drop signals within a block, such as a second Ctrl-C while the first one saves the state."""
        self.depth += 1
        try:
            yield
        finally:
            self.waiting.clear()
            self.depth -= 1
