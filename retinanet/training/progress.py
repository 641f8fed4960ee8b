"""Progress of a training run: the part of its state that is neither a tensor nor a random generator."""

from __future__ import annotations

from dataclasses import dataclass, field


def _no_losses() -> list[float]:
    return [0.0, 0.0, 0.0]


@dataclass
class Progress:
    """Counters, sums and results of a run, saved in `last.pt` under these names.

    Attributes:
        epoch: Epochs that are complete.
        step: Steps of the current epoch that are complete.
        best: Best value of `TrainOptions.best_metric`, or None before the first evaluation.
        best_epoch: Epoch, counted from 1, that gave `best`.
        stats: COCO numbers of the last evaluation.
        lines: Lines of `metrics.jsonl`.
        epoch_sums: Sums over the current epoch of the class loss and the box loss, and the number of steps in them.
        window_sums: The same since the last line of losses.
        epoch_images: Images seen in the current epoch.
        epoch_seconds: Seconds spent in the steps of the current epoch.
        planned_epochs: Epochs that the run had when it started. They decide the length of the warm-up, which must not
            change when a continued run gets more epochs.
    """

    epoch: int = 0
    step: int = 0
    best: float | None = None
    best_epoch: int | None = None
    stats: dict[str, float] | None = None
    lines: list[str] = field(default_factory=list)
    epoch_sums: list[float] = field(default_factory=_no_losses)
    window_sums: list[float] = field(default_factory=_no_losses)
    epoch_images: int = 0
    epoch_seconds: float = 0.0
    planned_epochs: int = 0

    @property
    def place(self) -> str:
        """The point that the run has reached, in words."""
        if self.step:
            return f"after step {self.step} of epoch {self.epoch + 1}"
        return f"after epoch {self.epoch}" if self.epoch else "before the first step"

    @property
    def images_per_second(self) -> float:
        """Mean speed in the current epoch."""
        return self.epoch_images / max(self.epoch_seconds, 1e-9)

    def count(self, images: int, seconds: float) -> None:
        """Count one more step of the current epoch."""
        self.step += 1
        self.epoch_images += images
        self.epoch_seconds += seconds

    def next_epoch(self) -> None:
        """Count one more complete epoch."""
        self.epoch, self.step = self.epoch + 1, 0
        self.epoch_images, self.epoch_seconds = 0, 0.0
