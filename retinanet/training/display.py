"""What a training run shows: a bar over its steps, a line for each epoch, and how long the run will take."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from retinanet.common.progress import clock_in, duration
from retinanet.training.options import TrainOptions
from retinanet.training.progress import Progress

# The first steps are slower than the others, because memory is allocated and caches are empty.
_STEPS_BEFORE_TIMING = 2
# The time of a step is announced after this many more steps, or after this many seconds and at least three steps.
_TIMED_STEPS, _TIMED_SECONDS, _FEWEST_TIMED_STEPS = 20, 60.0, 3
# Evaluations without a single correct detection after which advice is given.
_EVALUATIONS_AT_0 = 3


class Display:
    """Progress of a run on standard error.

    Args:
        make_bar: Makes the bar, as `tqdm` does; None shows nothing.
        progress: The counters of the run.
        options: The recipe.
        steps_per_epoch: Number of steps in an epoch.
    """

    def __init__(
        self, make_bar: Callable[..., Any] | None, progress: Progress, options: TrainOptions, steps_per_epoch: int
    ) -> None:
        """Show nothing yet; entering the context makes the bar."""
        self.make_bar = make_bar
        self.progress = progress
        self.options = options
        self.steps_per_epoch = steps_per_epoch
        self.total = options.epochs * steps_per_epoch
        self.bar: Any = None
        self.steps = 0
        self.announced = False
        self.started = self.step_started = self.timed_seconds = 0.0

    def __enter__(self) -> Display:
        self.first_step = self.progress.epoch * self.steps_per_epoch + self.progress.step
        self.started = self.step_started = time.monotonic()
        if self.make_bar is not None:
            self.bar = self.make_bar(
                total=self.total, initial=self.first_step, unit="step", desc="training", dynamic_ncols=True
            )
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def nothing_to_do(self) -> None:
        """Say that the run is complete, and how to train longer."""
        self._write(
            f"all {self.options.epochs} epochs of this run are complete; train longer with --epochs if the schedule is "
            "constant, and otherwise in a new run with --weights"
        )

    def after_step(self) -> None:
        """Move the bar, and announce the time of a step once it is known."""
        self.steps += 1
        now = time.monotonic()
        if self.steps > _STEPS_BEFORE_TIMING:
            self.timed_seconds += now - self.step_started
        self.step_started = now
        if self.bar is None:
            return
        self.bar.set_postfix_str(self._summary(), refresh=False)
        self.bar.update()
        if not self.announced:
            self._announce_time()

    def _announce_time(self) -> None:
        timed, seconds = self.steps - _STEPS_BEFORE_TIMING, self.timed_seconds
        if timed < _FEWEST_TIMED_STEPS or (timed < _TIMED_STEPS and seconds < _TIMED_SECONDS):
            return
        self.announced = True
        left = self.total - self.first_step - self.steps
        if left > 0:
            rest = left * seconds / timed
            self._write(
                f"{_step_time(seconds / timed)} per step: the other {left} steps take {duration(rest)}, until "
                f"{clock_in(rest)}; evaluations come on top"
            )

    def evaluating(self) -> None:
        """Show that the steps of the epoch are complete."""
        if self.bar is not None:
            self.bar.set_postfix_str(f"{self._epoch()}, evaluating and saving")

    def after_epoch(self, record: dict[str, Any]) -> None:
        """Print a line for an epoch, before `Progress` counts it as complete.

        Args:
            record: The epoch's line of `metrics.jsonl`.
        """
        progress, metric = self.progress, self.options.best_metric
        text = f"{self._epoch()}: loss {record['loss']:.3f}, {record['images_per_second']:.1f} images/s"
        if metric in record:
            text += f", {metric} {record[metric]:.3f}"
        if progress.best is not None:
            text += f", best {progress.best:.3f} in epoch {progress.best_epoch}"
        left = self.total - self.first_step - self.steps
        if left > 0 and self.steps:
            text += f", {duration((time.monotonic() - self.started) / self.steps * left)} left"
        self._write(text)
        evaluations = (progress.epoch + 1) / self.options.evaluate_every
        if metric in record and not progress.best and evaluations == _EVALUATIONS_AT_0:
            self._write(
                f"{metric} is still 0 after {_EVALUATIONS_AT_0} evaluations and {record['step']} steps. A model that "
                "started from random weights needs thousands of steps: start from --backbone-weights or --weights, or "
                "give more --epochs. Otherwise, look at the boxes (`retinanet check`) and at the learning rate"
            )
        # The next step does not last since the end of the previous one, because of the evaluation in between.
        self.step_started = time.monotonic()

    def stopped_early(self) -> None:
        """Print a line that says why the run ends before its last epoch."""
        progress, options = self.progress, self.options
        self._write(
            f"stopped after epoch {progress.epoch} of {options.epochs}, because {options.best_metric} has not risen in "
            f"{options.patience} evaluations; --resume with a larger --patience trains on"
        )

    def _epoch(self) -> str:
        return f"epoch {self.progress.epoch + 1}/{self.options.epochs}"

    def _summary(self) -> str:
        """Return the mean loss and speed of the epoch so far, and the best result."""
        progress = self.progress
        text = self._epoch()
        if progress.mean_loss is not None:
            text += f", loss {progress.mean_loss:.3f}"
        data, step = progress.step_times
        text += f", {progress.images_per_second:.1f} images/s, data {_step_time(data)}, step {_step_time(step)}"
        if progress.best is not None:
            text += f", best {self.options.best_metric} {progress.best:.3f}"
        return text

    def _write(self, text: str) -> None:
        if self.bar is not None:
            self.bar.write(text, file=sys.stderr)


def _step_time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.0f} ms"
