"""The training loop of one epoch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext

from retinanet.common.errors import DataError
from retinanet.training.batches import Sample
from retinanet.training.interrupts import Interrupts
from retinanet.training.learner import Learner
from retinanet.training.loss_log import LossLog
from retinanet.training.progress import Progress


def train_epoch(
    learner: Learner,
    batches: Iterator[list[Sample]],
    steps_per_epoch: int,
    progress: Progress,
    log: LossLog,
    interrupts: Interrupts,
    after_step: Callable[[], None],
) -> None:
    """Train from the point that `progress` has reached to the end of its epoch.

    Args:
        learner: The model and its optimizer.
        batches: The batches of the run, from that point on.
        steps_per_epoch: Number of batches in an epoch.
        progress: The counters of the run, updated by each step.
        log: The log that receives the losses.
        interrupts: The context that delays signals while a step is incomplete.
        after_step: Function that is called after each step, for a progress bar.

    Raises:
        DataError: The data set has ended early.
        DivergedError: A loss or a gradient is not finite.
    """
    learner.model.train()
    started = time.perf_counter()
    # Processes that train together stop after the same step, so none of them may stop by itself.
    with interrupts.postponed() if learner.engine.processes > 1 else nullcontext():
        while progress.step < steps_per_epoch:
            samples = next(batches)
            loaded = time.perf_counter()
            plan = learner.plan(samples, stop=bool(interrupts.waiting))
            if plan.stop:
                break
            if not plan.images:
                raise DataError(
                    f"the training set has ended after {progress.step} of {steps_per_epoch} steps of epoch "
                    f"{progress.epoch + 1}; give the number of steps that it has as steps_per_epoch"
                )
            with interrupts.postponed():
                lr = learner.learning_rate
                losses = learner.step(samples, plan)
                step = progress.epoch * steps_per_epoch + progress.step + 1
                seconds = (loaded - started, time.perf_counter() - loaded)
                progress.count(plan.images, *seconds)
                image_ids = [target["image_id"] for _, target in samples]
                log.add(losses, step=step, lr=lr, image_ids=image_ids, seconds=seconds)
            after_step()
            started = time.perf_counter()
        with interrupts.postponed():
            log.read()
    if progress.step < steps_per_epoch:
        raise KeyboardInterrupt
