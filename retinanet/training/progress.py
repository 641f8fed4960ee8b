"""Progress of a training run: the part of its state that is neither a tensor nor a random generator."""

from __future__ import annotations

from dataclasses import dataclass, field


def _no_seconds() -> list[float]:
    return [0.0, 0.0, 0.0]


@dataclass
class Progress:
    """Counters, sums and results of a run, saved in `last.pt` under these names.

    Attributes:
        epoch: Epochs that are complete.
        step: Steps of the current epoch that are complete.
        best: Best value of `TrainOptions.best_metric`, or None before the first evaluation.
        best_epoch: Epoch, counted from 1, that gave `best`.
        best_threshold: Score threshold of that epoch's model for all classes, or None if nothing was correct.
        stats: COCO numbers of the last evaluation.
        lines: Lines of `metrics.jsonl`.
        epoch_sums: Sums over the current epoch of each loss, and the number of steps in them; empty before `LossLog`
            knows the losses.
        window_sums: The same since the last line of losses.
        epoch_images: Images seen in the current epoch.
        epoch_seconds: Seconds spent in the steps of the current epoch.
        epoch_data_seconds: Part of `epoch_seconds` that was spent waiting for images.
        window_seconds: Seconds since the last line of losses, of the steps whose losses have been read: waiting for
            images, and in the steps themselves; and the number of these steps.
        planned_epochs: Epochs that the run had when it started. They decide the length of the warm-up, which must not
            change when a continued run gets more epochs.
    """

    epoch: int = 0
    step: int = 0
    best: float | None = None
    best_epoch: int | None = None
    best_threshold: float | None = None
    stats: dict[str, float] | None = None
    lines: list[str] = field(default_factory=list)
    epoch_sums: list[float] = field(default_factory=list)
    window_sums: list[float] = field(default_factory=list)
    epoch_images: int = 0
    epoch_seconds: float = 0.0
    epoch_data_seconds: float = 0.0
    window_seconds: list[float] = field(default_factory=_no_seconds)
    planned_epochs: int = 0

    @property
    def place(self) -> str:
        """The point that the run has reached, in words."""
        if self.step:
            return f"after step {self.step} of epoch {self.epoch + 1}"
        return f"after epoch {self.epoch}" if self.epoch else "before the first step"

    @property
    def mean_loss(self) -> float | None:
        """Mean of the sum of all losses in the current epoch, or None before its first step."""
        *losses, steps = self.epoch_sums or (0.0,)
        return sum(losses) / steps if steps else None

    @property
    def images_per_second(self) -> float:
        """Mean speed in the current epoch."""
        return self.epoch_images / max(self.epoch_seconds, 1e-9)

    @property
    def step_times(self) -> tuple[float, float]:
        """Mean seconds per step of the current epoch: waiting for images, and in the step itself."""
        steps = max(self.step, 1)
        return self.epoch_data_seconds / steps, (self.epoch_seconds - self.epoch_data_seconds) / steps

    def count(self, images: int, data_seconds: float, step_seconds: float) -> None:
        """Count one more step of the current epoch."""
        self.step += 1
        self.epoch_images += images
        self.epoch_seconds += data_seconds + step_seconds
        self.epoch_data_seconds += data_seconds

    def take_window_times(self) -> dict[str, float]:
        """Return the mean times of a step since the last call, for a line of losses; empty if there was no step."""
        data, step, steps = self.window_seconds
        self.window_seconds = _no_seconds()
        return {"data_seconds": round(data / steps, 6), "step_seconds": round(step / steps, 6)} if steps else {}

    def next_epoch(self) -> None:
        """Count one more complete epoch."""
        self.epoch, self.step = self.epoch + 1, 0
        self.epoch_images, self.epoch_seconds, self.epoch_data_seconds = 0, 0.0, 0.0
