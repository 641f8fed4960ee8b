"""Loggers: objects that receive the losses and numbers of a run, such as TensorBoard's."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from retinanet.common.errors import UsageError, one_line


class Loggers:
    """The loggers of a run. One that fails is reported once and left out from then on; training continues.

    Args:
        loggers: Objects with any of the methods `on_step(dict)` (every `log_every` steps), `on_epoch(dict)` and
            `close()`. The dicts are the lines of `metrics.jsonl`.
    """

    def __init__(self, loggers: Sequence[object] = ()) -> None:
        """Keep the loggers."""
        self.active = list(loggers)

    def record(self, line: dict[str, Any]) -> None:
        """Pass a line of `metrics.jsonl` on."""
        self._call(f"on_{line['kind']}", dict(line))

    def close(self) -> None:
        """Tell the loggers that no more lines follow."""
        self._call("close")

    def _call(self, method: str, *arguments: Any) -> None:
        for logger in list(self.active):
            try:
                if hasattr(logger, method):
                    getattr(logger, method)(*arguments)
            except Exception as error:
                self.active.remove(logger)
                print(
                    f"retinanet: warning: {type(logger).__name__}.{method} failed, so this logger gets nothing more: "
                    f"{type(error).__name__}: {one_line(error)}",
                    file=sys.stderr,
                )


class TensorBoardLogger:
    """Writes the losses of steps, and the losses and COCO numbers of epochs, over the step of the run.

    Args:
        folder: Folder for TensorBoard.
        first_step: Steps of the run that are complete. What a killed run has written beyond them is hidden.

    Raises:
        UsageError: TensorBoard is not installed.
    """

    def __init__(self, folder: Path, first_step: int = 0) -> None:
        """Open the folder."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ModuleNotFoundError as error:
            raise UsageError(
                "--log tensorboard: TensorBoard is not installed: run pip install 'retinanet-ops[tensorboard]'"
            ) from error
        self.writer = SummaryWriter(str(folder), purge_step=first_step + 1)

    def on_step(self, line: dict[str, Any]) -> None:
        """Write the numbers of a line of `metrics.jsonl` about steps."""
        self._write("step", line)

    def on_epoch(self, line: dict[str, Any]) -> None:
        """Write the numbers of a line of `metrics.jsonl` about an epoch."""
        self._write("epoch", line)
        self.writer.flush()

    def _write(self, kind: str, line: dict[str, Any]) -> None:
        for name, value in line.items():
            if isinstance(value, (int, float)) and name not in ("step", "epoch"):
                self.writer.add_scalar(f"{kind}/{name}", value, line["step"])

    def close(self) -> None:
        """Close the files."""
        self.writer.close()
