"""Losses on their way from the device to `metrics.jsonl`: read in groups, checked, added up and written."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from retinanet.common.errors import DivergedError
from retinanet.common.files import writing
from retinanet.training.loggers import Loggers
from retinanet.training.progress import Progress


class _Unread(NamedTuple):
    """Losses of a step that the host has not read."""

    values: Tensor  # [losses + 1]: the losses and the gradient norm
    step: int  # of the run, counted from 1
    epoch: int  # counted from 1
    lr: float
    image_ids: list[Any]
    seconds: tuple[float, float]  # waiting for images, and in the step itself


class LossLog:
    """The losses of a run.

    Args:
        path: The file `metrics.jsonl`, or None to write nothing.
        names: Names of the losses.
        progress: The state of the run, which receives the sums and the lines.
        log_every: Steps between lines of losses; 0 writes none.
        read_every: Steps between reads. Each read synchronises with the device.
        state_path: File that keeps the last good state, for the message about divergence.
        loggers: What receives every line as a dict; None is nothing.
    """

    def __init__(
        self,
        path: Path | None,
        names: Sequence[str],
        progress: Progress,
        log_every: int,
        read_every: int,
        state_path: Path,
        loggers: Loggers | None = None,
    ) -> None:
        """Start without unread losses."""
        self.path = path
        self.names = names
        self.progress = progress
        self.log_every = log_every
        self.read_every = read_every
        self.state_path = state_path
        self.loggers = loggers or Loggers()
        self.unread: list[_Unread] = []
        for sums in (progress.epoch_sums, progress.window_sums):
            if not sums:
                sums.extend([0.0] * (len(names) + 1))

    def add(self, values: Tensor, *, step: int, lr: float, image_ids: list[Any], seconds: tuple[float, float]) -> None:
        """Add the losses of a step.

        Args:
            values: `[losses + 1]`: the losses in the order of their names, and the gradient norm.
            step: Number of the step in the run, counted from 1.
            lr: Learning rate of the step.
            image_ids: Images of this process in the step.
            seconds: How long the step has taken: waiting for images, and the step itself.

        Raises:
            DivergedError: A loss or a gradient that was read is not finite. The message names the images.
        """
        self.unread.append(_Unread(values, step, self.progress.epoch + 1, lr, image_ids, seconds))
        if len(self.unread) >= self.read_every:
            self.read()

    def read(self) -> None:
        """Copy the unread losses to the host, check them and add them up.

        The time of waiting for the device belongs in equal parts to the steps whose losses are read.

        Raises:
            DivergedError: A loss or a gradient is not finite. The message names the images.
        """
        if not self.unread:
            return
        started = time.perf_counter()
        rows = torch.stack([unread.values for unread in self.unread]).tolist()
        wait = time.perf_counter() - started
        self.progress.epoch_seconds += wait
        for row, unread in zip(rows, self.unread, strict=True):
            *losses, norm = row
            if not all(map(math.isfinite, row)):
                values = ", ".join(f"{name} {loss}" for name, loss in zip(self.names, losses, strict=True))
                raise DivergedError(
                    f"step {unread.step} (epoch {unread.epoch}): training diverged: {values}, gradient norm {norm}, "
                    f"images {', '.join(map(str, unread.image_ids))}, learning rate {unread.lr:g}; try a lower one. "
                    f"{self.state_path} holds the last good state"
                )
            for sums in (self.progress.epoch_sums, self.progress.window_sums):
                for i, value in enumerate((*losses, 1.0)):
                    sums[i] += value
            data, step = unread.seconds
            for i, value in enumerate((data, step + wait / len(rows), 1.0)):
                self.progress.window_seconds[i] += value
            if self.log_every and unread.step % self.log_every == 0:
                head = {"kind": "step", "epoch": unread.epoch, "step": unread.step, "lr": unread.lr}
                self.write_line(head, self.progress.window_sums, self.progress.take_window_times())
        self.unread.clear()

    def write_line(self, head: dict[str, Any], sums: list[float], tail: dict[str, Any] | None = None) -> dict[str, Any]:
        """Write a line with the mean losses between `head` and `tail`, reset `sums` to 0, and return the line."""
        *losses, steps = sums
        means = {name: loss / steps for name, loss in zip(self.names, losses, strict=True)}
        record = {**head, "loss": sum(means.values()), **means, **(tail or {})}
        line = json.dumps(record)
        sums[:] = [0.0] * len(sums)
        self.progress.lines.append(line)
        if self.path is not None:
            with writing(self.path), self.path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        self.loggers.record(record)
        return record
