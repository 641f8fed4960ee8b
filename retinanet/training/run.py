"""Training: `train` runs the recipe, evaluates and saves after each epoch, and continues a run where it stopped.

On the CPU with a fixed number of threads, an interrupted and continued run gives the same weights as an uninterrupted
one, bit for bit. See `retinanet.training.run_folder` for the files of a run.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset, IterableDataset

from retinanet.common.errors import DataError, UsageError, listed
from retinanet.common.progress import make_bar
from retinanet.data import DetectionDataset
from retinanet.data.fitness import check_learnable, check_measurable, check_resizable
from retinanet.detection.detection_table import merge_detections
from retinanet.detection.evaluate import detect_dataset, evaluate_detections
from retinanet.model.detector import Detector
from retinanet.model.thresholds import ScoreThresholds
from retinanet.training.batches import (
    AugmentedImages,
    EpochBatches,
    Sample,
    SamplePreparation,
    loader_of,
    stream_batches,
)
from retinanet.training.display import Display
from retinanet.training.engine import Engine, start_engine
from retinanet.training.interrupts import Interrupts
from retinanet.training.learner import Learner, syncs_norm
from retinanet.training.loggers import Loggers, TensorBoardLogger
from retinanet.training.loop import train_epoch
from retinanet.training.loss_log import LossLog
from retinanet.training.options import TrainOptions
from retinanet.training.pipeline import Pipeline
from retinanet.training.progress import Progress
from retinanet.training.run_folder import STATE_NAME, RunFolder, describe_run

# On a GPU, losses are read once in this many steps, because each read synchronises with the device.
_STEPS_BETWEEN_READS = 20


@dataclass(frozen=True)
class TrainResult:
    """Where a run ended.

    Attributes:
        run_dir: The run folder.
        epochs: Epochs that are complete.
        best: Best value of `TrainOptions.best_metric`, or None without a validation set.
        best_epoch: Epoch, counted from 1, that gave `best`.
        best_threshold: Score threshold that `best.safetensors` carries for all classes, or None if it has none.
        stats: COCO numbers of the last evaluation.
        score_thresholds: Score thresholds of the model in the last epoch, or None if it was not evaluated or nothing
            was correct.
    """

    run_dir: Path
    epochs: int
    best: float | None
    best_epoch: int | None
    stats: dict[str, float] | None
    best_threshold: float | None = None
    score_thresholds: ScoreThresholds | None = None


def train(
    model: Detector,
    train_set: Dataset[Any],
    val_set: DetectionDataset | None,
    options: TrainOptions,
    run_dir: str | os.PathLike[str],
    resume: bool = False,
    progress: Callable[..., Any] | None = make_bar,
    data_options: Mapping[str, Any] | None = None,
    loggers: Sequence[object] = (),
    transform: Pipeline | None = None,
) -> TrainResult:
    """Train a model, evaluate it and save it as training goes on.

    Args:
        model: The model, which is trained in place. When a run is continued, the run's weights replace the model's.
        train_set: Images to train on: a `DetectionDataset`, or any Dataset or IterableDataset of pairs of an image
            `[3, H, W]` (uint8, or floating point in 0..1) and a target as `Detector.forward` takes it, optionally with
            an `image_id`. If it has `class_names`, they must be those of the model, in the same order. An
            IterableDataset needs a length or `TrainOptions.steps_per_epoch`.
        val_set: Images to evaluate on, or None.
        options: The recipe.
        run_dir: The run folder; made if it does not exist.
        resume: Whether to continue the run in `run_dir`. The model, the data and the options must be those of that
            run, except for the options in `CHANGEABLE_ON_RESUME`, and for more epochs with a constant schedule.
        progress: Makes the progress bar, as `tqdm` does; None shows nothing. By default, lines replace the bar if
            standard error is no terminal.
        data_options: JSON values that say where the data is. They are kept in `config.json`, from which
            `retinanet train --resume` finds the data again.
        loggers: Objects with methods `on_step(dict)`, `on_epoch(dict)` or `close()`, which receive the lines of
            `metrics.jsonl`. One that fails is reported once and does not stop training.
        transform: A pipeline of torchvision.transforms.v2, which follows the augmentation of the options. It takes an
            image and a dict with `boxes` (tv_tensors.BoundingBoxes) and `labels`. A continued run needs the same one.

    Returns:
        Where the run ended.

    Raises:
        UsageError: `run_dir` holds a run and `resume` is False, or the reverse, or another process uses it, or the
            model, options or data differ from those of the run, or a file cannot be written, or synchronised batch
            normalisation would leave a process without images.
        DataError: The data or the classes do not fit the model, or `last.pt` is damaged.
        DivergedError: A loss or a gradient is not finite. The message names the images, and `last.pt` keeps the last
            good state.
        KeyboardInterrupt: The run was interrupted. Its state is saved, and the message says how to continue.
    """
    check_data(model, train_set, val_set, options)
    engine = start_engine(options.device)
    _check_shares(model, train_set, options, engine)
    description = describe_run(model.config, options, train_set, val_set)
    with engine.noticing_losses(), ExitStack() as stack:
        folder = None
        if engine.is_main:
            folder = stack.enter_context(
                RunFolder(Path(run_dir), description, resume=resume, data_options=data_options)
            )
        steps_per_epoch = _steps_per_epoch(train_set, options)
        started = Progress(planned_epochs=options.epochs)
        state = engine.from_main(folder.saved_progress() if folder and resume else started)
        learner = Learner(model, options, state.planned_epochs * steps_per_epoch, engine)
        run = _Run(learner, state, folder, Path(run_dir), steps_per_epoch)
        if engine.is_main:
            run.log.loggers = stack.enter_context(
                closing(_make_loggers(options, loggers, Path(run_dir), run.total_step))
            )
        with folder.explaining_write_errors() if folder else nullcontext():
            run.prepare(resume)
            prepare = SamplePreparation(train_set, options, model.config.num_classes, transform)
            run.train_epochs(run.batches(train_set, prepare), val_set, progress if engine.is_main else None)
    return TrainResult(
        Path(run_dir),
        state.epoch,
        state.best,
        state.best_epoch,
        state.stats,
        state.best_threshold,
        learner.result.score_thresholds,
    )


class _Run:
    """The epochs of one run, and what happens between them; only the main process has a folder to write to."""

    def __init__(
        self, learner: Learner, progress: Progress, folder: RunFolder | None, run_dir: Path, steps_per_epoch: int
    ) -> None:
        self.learner = learner
        self.options = learner.options
        self.progress = progress
        self.folder = folder
        self.run_dir = run_dir
        self.steps_per_epoch = steps_per_epoch
        read_every = 1 if learner.device.type == "cpu" else _STEPS_BETWEEN_READS
        metrics_path = None if folder is None else folder.metrics_path
        names = learner.model.loss_names
        self.log = LossLog(metrics_path, names, progress, self.options.log_every, read_every, run_dir / STATE_NAME)
        self.interrupts = Interrupts()
        self.saved_at = time.monotonic()

    @property
    def total_step(self) -> int:
        """Number of steps that the whole run has done."""
        return self.progress.epoch * self.steps_per_epoch + self.progress.step

    def prepare(self, resume: bool) -> None:
        """Restore the state of the run in the folder, or start one, in all processes."""
        if not resume:
            torch.manual_seed(self.options.seed)
        if self.folder is not None:
            if self.progress.epoch < self.options.epochs:
                self.folder.check_room(self.learner)
            if resume:
                self.folder.restore(self.learner)
            else:
                self.folder.start()
                self.save()
        self.learner.share_state()

    def train_epochs(
        self,
        batches: Iterator[list[Sample]],
        val_set: DetectionDataset | None,
        make_bar: Callable[..., Any] | None,
    ) -> None:
        """Train on the batches from the current step on to the end of the run.

        Raises:
            KeyboardInterrupt: The run was interrupted. Its state is saved, and the message says how to continue.
        """
        with self.interrupts, Display(make_bar, self.progress, self.options, self.steps_per_epoch) as display:

            def after_step() -> None:
                self.save_if_due()
                display.after_step()

            if self.progress.epoch >= self.options.epochs:
                display.nothing_to_do()
            try:
                while self.progress.epoch < self.options.epochs and not self.stops_early():
                    train_epoch(
                        self.learner,
                        batches,
                        self.steps_per_epoch,
                        self.progress,
                        self.log,
                        self.interrupts,
                        after_step,
                    )
                    display.evaluating()
                    self.finish_epoch(val_set, display)
                if self.progress.epoch < self.options.epochs:
                    display.stopped_early()
            except KeyboardInterrupt as stop:
                with self.interrupts.ignored():
                    self.save()
                raise KeyboardInterrupt(
                    f"{self.run_dir / STATE_NAME} holds the state {self.progress.place}; continue with "
                    f"`retinanet train --resume {self.run_dir}`"
                ) from stop

    def batches(self, train_set: Dataset[Any], prepare: SamplePreparation) -> Iterator[list[Sample]]:
        """Return this process's shares of the batches of the run from the current step on."""
        options, progress, engine = self.options, self.progress, self.learner.engine
        if isinstance(train_set, IterableDataset):
            return stream_batches(train_set, prepare, options, progress, engine)
        sampler = EpochBatches(
            _length(train_set),
            options.batch_size,
            options.epochs,
            options.seed,
            epoch=progress.epoch,
            step=progress.step,
            rank=engine.rank,
            processes=engine.processes,
        )
        return iter(loader_of(AugmentedImages(train_set, prepare), options, engine, batch_sampler=sampler))

    def finish_epoch(self, val_set: DetectionDataset | None, display: Display) -> None:
        """Evaluate if an evaluation is due, write and show the epoch's losses and COCO numbers, and save."""
        progress, options = self.progress, self.options
        number = progress.epoch + 1
        stats: dict[str, float] = {}
        if val_set is not None and (number % options.evaluate_every == 0 or number == options.epochs):
            stats = self.evaluate(val_set)
        with self.interrupts.postponed():
            self.log.read()
            if stats:
                progress.stats = stats
                value = stats[options.best_metric]
                if progress.best is None or value > progress.best:
                    thresholds = self.learner.result.score_thresholds
                    progress.best, progress.best_epoch = value, number
                    progress.best_threshold = None if thresholds is None else thresholds.overall
                    if self.folder is not None:
                        self.folder.save_best(self.learner)
            head = {"kind": "epoch", "epoch": number, "step": self.total_step, "lr": self.learner.learning_rate}
            seconds, speed = round(progress.epoch_seconds, 3), round(progress.images_per_second, 3)
            data, step = (round(value, 6) for value in progress.step_times)
            times = {"seconds": seconds, "images_per_second": speed, "data_seconds": data, "step_seconds": step}
            tail = {**times, **stats}
            display.after_epoch(self.log.write_line(head, progress.epoch_sums, tail))
            progress.next_epoch()
            self.save()

    def stops_early(self) -> bool:
        """Return whether the best result is too old to wait for a better one."""
        best, patience = self.progress.best, self.options.patience
        if patience is None or not best or best < 0 or self.progress.step:
            return False
        assert self.progress.best_epoch is not None
        return self.progress.epoch - self.progress.best_epoch >= patience * self.options.evaluate_every

    def evaluate(self, val_set: DetectionDataset) -> dict[str, float]:
        """Choose the score thresholds of the model, and return its COCO numbers; each process takes some images."""
        engine, model, options = self.learner.engine, self.learner.result, self.options
        # The statistics of batch normalisation are those of each process; only the main one saves them.
        engine.copy_from_main(model.buffers())
        shares = engine.gather(
            detect_dataset(
                model,
                val_set,
                indices=range(engine.rank, len(val_set), engine.processes),
                batch_size=-(-options.batch_size // (engine.processes * options.accumulate)),
                workers=options.workers,
            )
        )
        stats: dict[str, float] = {}
        if engine.is_main:
            result = evaluate_detections(val_set, merge_detections(shares))
            stats, model.score_thresholds = result.stats, result.curves.thresholds(model.config.class_names)
        stats, model.score_thresholds = engine.from_main((stats, model.score_thresholds))
        return stats

    def save(self) -> None:
        """Write everything that a continued run needs."""
        self.log.read()
        if self.folder is not None:
            self.folder.save(self.learner, self.progress)
        self.saved_at = time.monotonic()

    def save_if_due(self) -> None:
        """Save if the last save was `save_every` minutes ago, so that a crash in a long epoch loses only minutes."""
        interval = 60 * self.options.save_every
        if interval and time.monotonic() - self.saved_at >= interval:
            with self.interrupts.postponed():
                self.save()


def _make_loggers(options: TrainOptions, loggers: Sequence[object], run_dir: Path, first_step: int) -> Loggers:
    own = [TensorBoardLogger(run_dir / "tensorboard", first_step)] if options.log == "tensorboard" else []
    return Loggers([*own, *loggers])


def _length(dataset: Dataset[Any]) -> int:
    return len(dataset)  # type: ignore[arg-type]


def _steps_per_epoch(dataset: Dataset[Any], options: TrainOptions) -> int:
    if isinstance(dataset, IterableDataset) and options.steps_per_epoch is not None:
        return options.steps_per_epoch
    if not hasattr(dataset, "__len__"):
        raise UsageError(
            f"steps_per_epoch: {type(dataset).__name__} has no length, so expected the number of steps of an epoch, "
            "got None"
        )
    return -(-_length(dataset) // options.batch_size)


def _check_shares(model: Detector, train_set: Dataset[Any], options: TrainOptions, engine: Engine) -> None:
    """Check that synchronised batch normalisation has an image in each part of a step in each process."""
    if engine.processes == 1 or not syncs_norm(model):
        return
    if engine.device.type == "cpu":
        raise UsageError(
            f"backbone_norm: sync normalises over the images of {engine.processes} processes on GPUs only; "
            "choose frozen, eval or batch on the CPU"
        )
    if isinstance(train_set, IterableDataset) or not hasattr(train_set, "__len__"):
        return  # `Learner.plan` checks every step
    last = _length(train_set) % options.batch_size
    parts = min(options.accumulate, -(-last // engine.processes))
    if last < engine.processes * parts:
        raise UsageError(
            f"batch_size: the last batch of an epoch has {last} of {_length(train_set)} images, and backbone_norm sync "
            f"needs {engine.processes * parts}, one in each part of each of the {engine.processes} processes; choose "
            f"another batch size than {options.batch_size}, or another number of processes or parts (accumulate)"
        )


def check_data(
    model: Detector, train_set: Dataset[Any], val_set: DetectionDataset | None, options: TrainOptions
) -> None:
    """Check that a model can be trained and evaluated on some data.

    Raises:
        DataError: The classes are not those of the model, there is nothing to learn or to evaluate, or an image would
            vanish when it is resized.
    """
    source = getattr(train_set, "source", type(train_set).__name__)
    expected, got = model.config.class_names, tuple(getattr(train_set, "class_names", model.config.class_names))
    if expected != got:
        raise DataError(f"{source}: classes differ from the model's: expected {listed(expected)}; got {listed(got)}")
    transform, limit = options.transform, model.config.max_size
    if isinstance(train_set, DetectionDataset):
        check_learnable(train_set)
        check_resizable(train_set, model.transform.vanishes, limit, transform.crop, min(1.0, transform.scale[0]))
    elif hasattr(train_set, "__len__") and _length(train_set) == 0:
        raise DataError(f"{source}: nothing to learn from: no images")
    if val_set is not None:
        check_measurable(val_set, options.best_metric)
        check_resizable(val_set, model.transform.vanishes, limit)
