"""Training: one function that runs the recipe, writes a run directory, and goes on exactly where it stopped.

A run directory holds `config.json` (model, options, data), `metrics.jsonl` (losses and COCO numbers),
`last.pt` (all state, between two steps), `last.safetensors` and `best.safetensors` (models). On the CPU with
a fixed number of threads, an interrupted and continued run and an uninterrupted one give the same weights,
bit for bit.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

import retinanet_ops as ops
from retinanet.checkpoints.model_file import load_state, save_model, save_state
from retinanet.common.devices import resolve_device
from retinanet.common.errors import DataError, DivergedError, UsageError, listed
from retinanet.common.files import output_folder, replacing, write_json
from retinanet.data import DetectionDataset
from retinanet.detection.evaluate import evaluate
from retinanet.model.network import RetinaNet
from retinanet.model.preprocessing import to_float
from retinanet.model.targets import pack_targets
from retinanet.training.batches import AugmentedImages, EpochBatches, Sample, batch_loader
from retinanet.training.ema import WeightAverage
from retinanet.training.interrupts import Interrupts
from retinanet.training.optimizer import build_optimizer, build_schedule
from retinanet.training.options import CHANGEABLE_ON_RESUME, TrainOptions

__all__ = ["TrainOptions", "TrainResult", "train"]

# Reading losses makes the host wait for the device; on a GPU that is done once in this many steps.
_STEPS_BETWEEN_READS = 20


@dataclass(frozen=True)
class TrainResult:
    """Where a run ended.

    Attributes:
        run_dir: The run directory.
        epochs: Epochs that are complete.
        best: The best value of `TrainOptions.best_metric`, or None without a validation set.
        best_epoch: The epoch, from 1, that gave it.
        stats: The COCO numbers of the last evaluation.
    """

    run_dir: Path
    epochs: int
    best: float | None
    best_epoch: int | None
    stats: dict[str, float] | None


_Padded = TypeVar("_Padded", ops.GroundTruth, ops.PaddedBoxes)


@dataclass
class _Progress:
    """What a run has done so far: the part of its state that is neither tensor nor generator."""

    epoch: int = 0
    step: int = 0  # inside the epoch
    best: float | None = None
    best_epoch: int | None = None
    stats: dict[str, float] | None = None
    lines: list[str] = field(default_factory=list)  # of metrics.jsonl
    epoch_sums: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])  # class loss, box loss, steps
    window_sums: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])  # since the last line of losses
    epoch_images: int = 0
    epoch_seconds: float = 0.0


class _Unread(NamedTuple):
    """Losses of a step that the host has not looked at."""

    values: Tensor  # [3]: class loss, box loss, gradient norm
    step: int  # of the run, from 1
    epoch: int  # from 1
    lr: float
    image_ids: list[Any]


def train(
    model: RetinaNet,
    train_set: DetectionDataset,
    val_set: DetectionDataset | None,
    options: TrainOptions,
    run_dir: str | os.PathLike[str],
    resume: bool = False,
    progress: Callable[..., Any] | None = tqdm,
) -> TrainResult:
    """Trains a model, evaluating and saving as it goes.

    Args:
        model: Trained in place. When a run is continued its weights are replaced by the run's.
        train_set: Images to train on; its classes must be the model's, in order.
        val_set: Images to evaluate on, or None.
        options: The recipe.
        run_dir: Made if it is not there.
        resume: Whether to continue the run in `run_dir`. Everything but the device and the number of workers
            must be as it was.
        progress: Makes the progress bar, as `tqdm` does; None shows none.

    Returns:
        Where the run ended.

    Raises:
        UsageError: `run_dir` holds a run and `resume` is False, or the reverse, or the options differ from
            the run's.
        DataError: The data or the classes do not fit the model or the run, or `last.pt` is damaged.
        DivergedError: A loss or a gradient is not finite; the message names the images. `last.pt` keeps the
            last good state.
        KeyboardInterrupt: After the state was saved.
    """
    _check_classes(model, train_set)
    if len(train_set) == 0:
        raise DataError(f"{train_set.source}: no images to train on")
    folder = output_folder(Path(run_dir))
    run = _Run(model, train_set, val_set, options, folder, progress)
    exists = run.state_path.exists()
    if resume and not exists:
        raise UsageError(f"{folder}: no run to resume: {run.state_path.name} is not there")
    if exists and not resume:
        raise UsageError(f"{folder}: holds a run already; resume it or name another folder")
    for leftover in folder.glob(".*.tmp"):
        leftover.unlink()
    if resume:
        run.restore()
    else:
        torch.manual_seed(options.seed)
        write_json(folder / "config.json", run.description)
        run.save()
    try:
        run.epochs()
    except KeyboardInterrupt:
        run.save()
        raise
    state = run.state
    return TrainResult(folder, state.epoch, state.best, state.best_epoch, state.stats)


class _Run:
    """One run: the model with its optimizer, the data, the files, and how far it has come."""

    def __init__(
        self,
        model: RetinaNet,
        train_set: DetectionDataset,
        val_set: DetectionDataset | None,
        options: TrainOptions,
        folder: Path,
        progress: Callable[..., Any] | None,
    ) -> None:
        self.device = resolve_device(options.device)
        memory_format = torch.channels_last if options.channels_last else torch.contiguous_format
        self.model = model.to(self.device).to(memory_format=memory_format)
        self.memory_format = memory_format
        self.train_set = train_set
        self.val_set = val_set
        self.options = options
        self.folder = folder
        self.progress = progress
        self.state_path = folder / "last.pt"
        self.metrics_path = folder / "metrics.jsonl"
        self.steps_per_epoch = -(-len(train_set) // options.batch_size)
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.average = None if options.ema_decay is None else WeightAverage(self.model, options.ema_decay)
        self.optimizer = build_optimizer(model, options)
        self.schedule = build_schedule(self.optimizer, options, options.epochs * self.steps_per_epoch)
        self.description = self.describe()
        self.state = _Progress()
        self.unread: list[_Unread] = []
        self.interrupts = Interrupts()

    def describe(self) -> dict[str, Any]:
        """What a continuation must have in common with this run, and what it need not."""
        sets = {"train": self.train_set} | ({"validation": self.val_set} if self.val_set is not None else {})
        return {
            "model": self.model.config.to_dict(),
            "options": self.options.to_dict(),
            "data": {name: _describe_set(dataset) for name, dataset in sets.items()},
        }

    @property
    def result(self) -> RetinaNet:
        """The model that is evaluated and saved: the trained one, or its average."""
        return self.model if self.average is None else self.average.model

    @property
    def total_step(self) -> int:
        """Steps done in the whole run."""
        return self.state.epoch * self.steps_per_epoch + self.state.step

    def epochs(self) -> None:
        """Trains to the end of the run."""
        state, options = self.state, self.options
        images = AugmentedImages(self.train_set, options.transform, options.seed, self.model.config.num_classes)
        batches = EpochBatches(
            len(self.train_set),
            options.batch_size,
            options.epochs,
            options.seed,
            epoch=state.epoch,
            step=state.step,
        )
        loader = iter(batch_loader(images, batches, options.workers, self.device.type == "cuda"))
        self.model.train()
        total = options.epochs * self.steps_per_epoch
        with self.interrupts, progress_bar(self.progress, total, self.total_step) as bar:
            while state.epoch < options.epochs:
                started = time.perf_counter()
                while state.step < self.steps_per_epoch:
                    samples = next(loader)
                    with self.interrupts.postponed():
                        self.step(samples)
                        now = time.perf_counter()
                        state.epoch_seconds += now - started
                        started = now
                    if bar is not None:
                        bar.set_postfix_str(self.summary(), refresh=False)
                        bar.update()
                if bar is not None:
                    bar.set_postfix_str(f"epoch {state.epoch + 1}/{options.epochs}, evaluating and saving")
                self.finish_epoch()

    def step(self, samples: list[Sample]) -> None:
        """One step of the optimizer."""
        # Boxes are scaled and padded on the host, where they are; one transfer for each padded tensor
        # follows.
        images = [to_float(image.to(self.device, non_blocking=True)) for image, _ in samples]
        batch, targets = self.model.transform(images, [target for _, target in samples])
        packed, packed_crowd = pack_targets(targets)
        ground_truth = _to_device(packed, self.device)
        crowd = None if packed_crowd is None else _to_device(packed_crowd, self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.precision == "bf16"):
            losses = self.model.losses(batch.tensors.contiguous(memory_format=self.memory_format), ground_truth, crowd)
        self.optimizer.zero_grad(set_to_none=True)
        (losses["classification"] + losses["bbox_regression"]).backward()
        norm = torch.nn.utils.clip_grad_norm_(self.trained, self.options.clip_norm or math.inf)
        lr = self.optimizer.param_groups[0]["lr"]
        self.optimizer.step()
        self.schedule.step()
        self.state.step += 1
        if self.average is not None:
            self.average.update(self.model, self.total_step)
        self.state.epoch_images += len(samples)
        values = torch.stack([losses["classification"].detach(), losses["bbox_regression"].detach(), norm.detach()])
        image_ids = [target["image_id"] for _, target in samples]
        self.unread.append(_Unread(values, self.total_step, self.state.epoch + 1, lr, image_ids))
        if self.device.type == "cpu" or len(self.unread) >= _STEPS_BETWEEN_READS:
            self.read_losses()

    def read_losses(self) -> None:
        """Brings the losses of the last steps to the host, where they are checked and added up."""
        if not self.unread:
            return
        rows = torch.stack([unread.values for unread in self.unread]).tolist()
        for (classification, box, norm), unread in zip(rows, self.unread, strict=True):
            if not all(map(math.isfinite, (classification, box, norm))):
                raise DivergedError(
                    f"step {unread.step} (epoch {unread.epoch}): training diverged: classification loss "
                    f"{classification}, box loss {box}, gradient norm {norm}, images "
                    f"{', '.join(map(str, unread.image_ids))}, learning rate {unread.lr:g}; try a lower one. "
                    f"{self.state_path} holds the last good state"
                )
            for sums in (self.state.epoch_sums, self.state.window_sums):
                for i, value in enumerate((classification, box, 1.0)):
                    sums[i] += value
            if self.options.log_every and unread.step % self.options.log_every == 0:
                self.write_line(
                    {"kind": "step", "epoch": unread.epoch, "step": unread.step, "lr": unread.lr},
                    "window_sums",
                )
        self.unread.clear()

    def finish_epoch(self) -> None:
        """Evaluates if it is time, writes the epoch's line, and saves."""
        state, options = self.state, self.options
        number = state.epoch + 1
        stats: dict[str, float] = {}
        if self.val_set is not None and (number % options.evaluate_every == 0 or number == options.epochs):
            stats = evaluate(self.result, self.val_set, batch_size=options.batch_size, workers=options.workers).stats
        with self.interrupts.postponed():
            self.read_losses()
            if stats:
                state.stats = stats
                value = stats[options.best_metric]
                if state.best is None or value > state.best:
                    state.best, state.best_epoch = value, number
                    save_model(self.folder / "best.safetensors", self.result)
            seconds = round(state.epoch_seconds, 3)
            speed = round(state.epoch_images / max(state.epoch_seconds, 1e-9), 3)
            line = {
                "kind": "epoch",
                "epoch": number,
                "step": self.total_step,
                "lr": self.optimizer.param_groups[0]["lr"],
            }
            self.write_line(line, "epoch_sums", {"seconds": seconds, "images_per_second": speed, **stats})
            state.epoch, state.step = number, 0
            state.epoch_images, state.epoch_seconds = 0, 0.0
            self.save()

    def write_line(self, head: dict[str, Any], sums_name: str, tail: dict[str, Any] | None = None) -> None:
        """Adds a line of mean losses to `metrics.jsonl`, and starts their sums anew."""
        classification, box, steps = getattr(self.state, sums_name)
        means = {"classification": classification / steps, "bbox_regression": box / steps}
        line = json.dumps({**head, "loss": sum(means.values()), **means, **(tail or {})})
        setattr(self.state, sums_name, [0.0, 0.0, 0.0])
        self.state.lines.append(line)
        with self.metrics_path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def summary(self) -> str:
        """Mean loss and speed of the epoch so far, and the best result, for the progress bar."""
        classification, box, steps = self.state.epoch_sums
        text = f"epoch {self.state.epoch + 1}/{self.options.epochs}"
        if steps:
            text += f", loss {(classification + box) / steps:.3f}"
        text += f", {self.state.epoch_images / max(self.state.epoch_seconds, 1e-9):.1f} images/s"
        if self.state.best is not None:
            text += f", best {self.options.best_metric} {self.state.best:.3f}"
        return text

    def save(self) -> None:
        """Writes the model and, last, the state: only that decides where a continued run starts."""
        with self.interrupts.postponed():
            self.read_losses()
            save_model(self.folder / "last.safetensors", self.result)
            save_state(
                self.state_path,
                {
                    "description": json.dumps(self.description),
                    "progress": asdict(self.state),
                    "model": dict(self.model.state_dict()),
                    "average": None if self.average is None else dict(self.average.model.state_dict()),
                    "optimizer": self.optimizer.state_dict(),
                    "schedule": {"last_epoch": self.schedule.last_epoch},
                    "rng": torch.get_rng_state(),
                    "cuda_rng": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
                },
            )

    def restore(self) -> None:
        """Puts everything back to where `save` left it, and makes `metrics.jsonl` agree."""
        saved = load_state(self.state_path)
        try:
            description = json.loads(saved["description"])
            progress, weights = _Progress(**saved["progress"]), saved["model"]
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{self.state_path}: not the state of a training run") from error
        _check_same(description, json.loads(json.dumps(self.description)), self.folder)
        self.state = progress
        self.model.load_state_dict(weights)
        if self.average is not None:
            self.average.model.load_state_dict(saved["average"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.schedule.last_epoch = saved["schedule"]["last_epoch"]
        torch.set_rng_state(saved["rng"])
        if saved["cuda_rng"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(saved["cuda_rng"], self.device)
        with replacing(self.metrics_path) as temporary:
            temporary.write_text("".join(line + "\n" for line in progress.lines), encoding="utf-8")


@contextmanager
def progress_bar(progress: Callable[..., Any] | None, total: int, initial: int) -> Iterator[Any]:
    """A bar over the steps of a run, closed at the end; None where `progress` is None."""
    if progress is None:
        yield None
        return
    bar = progress(total=total, initial=initial, unit="step", desc="training", dynamic_ncols=True)
    try:
        yield bar
    finally:
        bar.close()


def _to_device(part: _Padded, device: torch.device) -> _Padded:
    return type(part)(*(tensor.to(device, non_blocking=True) for tensor in part))


def _check_classes(model: RetinaNet, dataset: DetectionDataset) -> None:
    expected, got = model.config.class_names, tuple(dataset.class_names)
    if expected != got:
        raise DataError(
            f"{dataset.source}: classes differ from the model's: expected {listed(expected)}; got {listed(got)}"
        )


def _describe_set(dataset: DetectionDataset) -> dict[str, Any]:
    digest = hashlib.sha256(json.dumps([dataset.image_ids, dataset.coco["annotations"]]).encode()).hexdigest()
    return {
        "images": len(dataset),
        "class_names": list(dataset.class_names),
        "category_ids": list(dataset.category_ids),
        "sha256": digest,
    }


def _check_same(saved: dict[str, Any], current: dict[str, Any], folder: Path) -> None:
    before, now = _flat(saved), _flat(current)
    free = {f"options.{name}" for name in CHANGEABLE_ON_RESUME}
    for key in {**now, **before}:
        if key in free or before.get(key) == now.get(key):
            continue
        raise UsageError(
            f"{folder}: cannot resume: {key} was {before.get(key)!r} in this run, now it is {now.get(key)!r}"
        )


def _flat(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
