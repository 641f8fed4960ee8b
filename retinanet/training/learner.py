"""The part of a training run that learns: the model with its optimizer, learning-rate schedule and moving average."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import retinanet_ops as ops
from retinanet.common.devices import resolve_device
from retinanet.common.errors import DataError, UsageError
from retinanet.common.memory import is_out_of_memory
from retinanet.common.torch_files import unwrapped
from retinanet.model.detector import Detector
from retinanet.model.losses import ImageLosses
from retinanet.model.targets import Batch
from retinanet.model.thresholds import ScoreThresholds
from retinanet.training.batches import Sample, generator_for, seed_for
from retinanet.training.ema import WeightAverage
from retinanet.training.engine import Engine
from retinanet.training.optimizer import build_optimizer, build_schedule
from retinanet.training.options import AUTOCAST_DTYPES, TrainOptions
from retinanet.training.seeding import seeded

# The scaler of fp16 starts at 2**16 and halves its scale whenever gradients overflow. A scale below this has helped
# nothing: the gradients are not finite at any scale.
_LEAST_SCALE = 2.0**-14


class StepPlan(NamedTuple):
    """What all processes agree on before a step."""

    images: int  # of the whole batch
    parts: int  # in which each process computes its share, at most one for each image of the largest share
    min_size: int | None  # to which the shorter side of every image is resized; None leaves the images as they are
    size: tuple[int, int]  # height and width to which every part of the batch is padded
    stop: bool  # whether a process was asked to stop


class Learner:
    """A model in training: one call of `step` is one step of the optimizer.

    A batch is shared among the processes of the engine, and each process computes its share in `options.accumulate`
    parts. The result depends on neither number, except for rounding, because every part is padded to the size of the
    whole batch and losses are averaged over the whole batch. There are two exceptions. Batch normalisation that is
    trained sees one part at a time (`backbone_norm="batch"`), or the parts of all processes (`sync`). The losses of a
    Faster R-CNN are means over the samples of a part, and each part draws samples of its own.

    A model may draw from the global random generators in its forward pass. They are seeded for each part of each step,
    so what it draws does not depend on what came before, such as an interruption.

    Args:
        model: The model; it is moved to the device of the engine and trained in place.
        options: The recipe.
        total_steps: Number of steps in the whole run, which the learning rate depends on.
        engine: The processes that train together. None is this process alone on the device of the options.

    Raises:
        ValueError: The options name a device that this machine does not have.
        UsageError: A batch has fewer images than parts.
    """

    def __init__(self, model: Detector, options: TrainOptions, total_steps: int, engine: Engine | None = None) -> None:
        """Move the model to its device and make the optimizer."""
        self.options = options
        self.engine = engine or Engine(resolve_device(options.device))
        parts = self.engine.processes * options.accumulate
        if options.batch_size < parts:
            raise UsageError(
                f"batch_size: expected at least {parts} images, one for each part of a step ({self.engine.processes} "
                f"processes, accumulate {options.accumulate}), got {options.batch_size}"
            )
        self.device = self.engine.device
        self.memory_format = torch.channels_last if options.channels_last else torch.contiguous_format
        self.model = model.to(self.device).to(memory_format=self.memory_format)
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.losses = self.engine.wrap(_ImageLosses(self.model))
        self.average = None if options.ema_decay is None else WeightAverage(self.model, options.ema_decay)
        self.optimizer = build_optimizer(model, options)
        self.schedule = build_schedule(self.optimizer, options, total_steps)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=options.precision == "fp16")

    @property
    def result(self) -> Detector:
        """The model that is evaluated and saved: the moving average if there is one, else the trained model."""
        return self.model if self.average is None else self.average.model

    @property
    def learning_rate(self) -> float:
        """Learning rate of the first parameter group in the next step."""
        return float(self.optimizer.param_groups[0]["lr"])

    def plan(self, samples: Sequence[Sample], *, stop: bool = False) -> StepPlan:
        """Agree with the other processes on the next step.

        Args:
            samples: This process's share of the batch.
            stop: Whether this process was asked to stop.

        Raises:
            DataError: Batch normalisation is synchronised, and a process has an image for some of the parts only.
        """
        transform = self.model.transform
        min_size = self._draw_min_size()
        sizes = [transform.resized_size(image.shape[-2], image.shape[-1], min_size) for image, _ in samples]
        height, width = transform.padded_size([(1, 1), *sizes])
        rows = self.engine.exchange([len(samples), height, width, int(stop)])
        counts, heights, widths, stops = zip(*rows, strict=True)
        parts = max(1, min(self.options.accumulate, max(counts)))
        if max(counts) > 0 and min(counts) < parts and syncs_norm(self.model) and not any(stops):
            raise DataError(
                f"the training set has {min(counts)} of the {sum(counts)} images of a step for process "
                f"{counts.index(min(counts))}, and synchronised batch normalisation needs {parts} in every process; "
                "give the number of whole steps as steps_per_epoch"
            )
        return StepPlan(sum(counts), parts, min_size, self._widened(max(heights), max(widths)), any(stops))

    def _draw_min_size(self) -> int | None:
        sizes = self.model.config.min_size
        if sizes is None:
            return None
        # The paths of the order of images, of their augmentation and of the parts of a step have other lengths.
        rng = generator_for(self.options.seed, self.schedule.last_epoch, 0, 0)
        return sizes[int(torch.randint(len(sizes), (1,), generator=rng))]

    def _widened(self, height: int, width: int) -> tuple[int, int]:
        """Return a size of which batch normalisation sees more than one value per channel, even of one image."""
        cell = self.model.config.size_divisible
        return (height, 2 * cell) if (height, width) == (cell, cell) and self._trains_norm() else (height, width)

    def _trains_norm(self) -> bool:
        return any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training for m in self.model.modules())

    def step(self, samples: Sequence[Sample], plan: StepPlan | None = None) -> Tensor:
        """Do one step of the optimizer without synchronising with the device.

        Args:
            samples: This process's share of the batch; may be empty if there are other processes.
            plan: What `plan` returned for them; None agrees on it now.

        Returns:
            The losses of the whole batch in the order of the model's `loss_names`, and the norm of the gradient, as one
            tensor on the device.

        Raises:
            UsageError: There is not enough memory. The message says what needs less.
        """
        plan = plan or self.plan(samples)
        try:
            return self._step(samples, plan)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            advice = self._memory_advice(plan, len(samples))
        # Outside the block above, whose exception keeps the tensors of the step alive.
        raise UsageError(advice)

    def _memory_advice(self, plan: StepPlan, samples: int) -> str:
        height, width = plan.size
        samples = max(1, samples)  # an image stands in for none
        images = -(-samples // plan.parts)
        text = f"out of memory in a step: {images} images of {height} x {width} pixels at a time"
        more = min(2 * self.options.accumulate, self.options.batch_size // self.engine.processes)
        if -(-samples // more) < images:
            same = "" if self._trains_norm() else " with the same result"
            text += f"; --accumulate {more} computes fewer at a time{same}"
        smaller = "--batch-size" if self.model.config.fixed_size else "--batch-size, --min-size or --crop"
        return f"{text}; a smaller {smaller}, or --precision bf16, also needs less"

    def _step(self, samples: Sequence[Sample], plan: StepPlan) -> Tensor:  # [losses + 1]
        self.optimizer.zero_grad(set_to_none=True)
        normaliser = self.model.normaliser
        per_image, late = normaliser.rule == "per_image", self.options.accumulate > 1
        names = self.model.loss_names
        sums = torch.zeros(len(names) + 1, device=self.device)  # the losses and the number of positives
        divisor = torch.ones((), device=self.device)
        # All processes compute equally many parts, because each forward pass may synchronise them.
        for i in range(plan.parts):
            own_samples = samples[i :: plan.parts]
            with self.engine.without_sum(self.losses) if i + 1 < plan.parts else nullcontext():
                with seeded(self._part_seed(i), self.device):
                    losses = self._forward(own_samples, plan)
                if not own_samples:  # An image stands in for none, so that the gradients can be summed.
                    losses = ImageLosses({name: 0 * losses.sums[name] for name in names}, 0 * losses.num_positive)
                own = losses.num_positive.clamp(min=1) if per_image else 1
                part = torch.stack([(losses.sums[name] / own).sum() for name in names])
                sums += torch.cat([part.detach(), losses.num_positive.sum()[None]]).to(sums.dtype)
                if not (per_image or late):
                    divisor = normaliser.common(self.engine.total(sums[-1]) / plan.images)
                # The engine divides the gradients by the number of processes.
                scale = self.engine.processes / plan.images
                self.scaler.scale(part.sum() / divisor * scale).backward()
        sums = self.engine.total(sums)
        if late and not per_image:
            divisor = normaliser.common(sums[-1] / plan.images)
            torch._foreach_div_([p.grad for p in self.trained if p.grad is not None], divisor)
        norm = self._update()
        return torch.cat([sums[:-1] / (plan.images * divisor), norm[None]])

    def _part_seed(self, part: int) -> int:
        """Return a seed that no other part of a step has, in this or another process."""
        return seed_for(self.options.seed, self.schedule.last_epoch, self.engine.rank, part, 0, 0)

    def _forward(self, samples: Sequence[Sample], plan: StepPlan) -> ImageLosses:
        """Return the losses of a part of the batch, or of a black image if the part is empty."""
        images: list[Tensor] = [image for image, _ in samples]
        targets: list[dict[str, Any]] = [target for _, target in samples]
        if not samples:
            images = [torch.zeros(3, *plan.size)]
            targets = [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}]
        batch = self.model.prepare(images, targets, self.device, min_size=plan.min_size, least_size=plan.size)
        assert batch.ground_truth is not None
        dtype = AUTOCAST_DTYPES[self.options.precision]
        with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
            losses: ImageLosses = self.losses(self._pixels(batch), batch.ground_truth, batch.crowds, batch.image_sizes)
        return losses

    def _pixels(self, batch: Batch) -> Tensor:  # [N, 3, H, W]
        return batch.pixels.contiguous(memory_format=self.memory_format)

    def _update(self) -> Tensor:  # scalar
        """Clip the gradients, do a step of the optimizer, the schedule and the average, and return the norm."""
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.trained, self.options.clip_norm or math.inf)
        if self.scaler.is_enabled() and self.scaler.get_scale() >= _LEAST_SCALE:
            # The scaler leaves out a step whose gradients overflow, and lowers its scale.
            norm = norm.where(norm.isfinite(), 0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
            self.schedule.step()
        if self.average is not None:
            self.average.update(self.model, self.schedule.last_epoch)
        # They were chosen for the weights before the step.
        self.model.score_thresholds = self.result.score_thresholds = None
        return norm.detach()

    def state(self) -> dict[str, Any]:
        """Return everything that decides how training continues, random generators included."""
        thresholds = self.result.score_thresholds
        return {
            "model": dict(self.model.state_dict()),
            "average": None if self.average is None else dict(self.average.model.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "schedule": {"last_epoch": self.schedule.last_epoch},
            "scaler": self.scaler.state_dict(),
            "score_thresholds": None if thresholds is None else thresholds.to_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        }

    def state_bytes(self) -> tuple[int, int]:
        """Return the sizes of a state and of a model file after the first step, in bytes and without small parts."""
        model = sum(tensor.nbytes for tensor in self.model.state_dict().values())
        moments = (1 if self.options.optimizer == "sgd" else 2) * sum(p.nbytes for p in self.trained)
        return model * (1 if self.average is None else 2) + moments, model

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from what `state` returned."""
        _load(self.model, state["model"])
        if self.average is not None:
            _load(self.average.model, state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.last_epoch = state["schedule"]["last_epoch"]
        if state.get("scaler"):
            self.scaler.load_state_dict(state["scaler"])
        # Runs of earlier versions have no thresholds in their state.
        thresholds = state.get("score_thresholds")
        self.model.score_thresholds = None
        if thresholds is not None:
            thresholds = ScoreThresholds.from_dict(thresholds, self.model.config.num_classes)
        self.result.score_thresholds = thresholds
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)

    def share_state(self) -> None:
        """Give the other processes the state of the main one, each with random numbers of its own."""
        if self.engine.processes == 1:
            return
        # A tensor of a GPU would go to the same GPU in every process.
        state = self.engine.from_main(_on_cpu(self.state()) if self.engine.is_main else {})
        if not self.engine.is_main:
            self.load_state(state)
            torch.manual_seed(self.options.seed + self.schedule.last_epoch + self.engine.rank)


class _ImageLosses(nn.Module):
    """The losses as a call of a module, which is where DistributedDataParallel sets up the sum of the gradients."""

    def __init__(self, model: Detector) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        pixels: Tensor,  # [N, 3, H, W]
        ground_truth: ops.GroundTruth,
        crowds: ops.PaddedBoxes | None,
        image_sizes: list[tuple[int, int]],
    ) -> ImageLosses:
        return self.model.image_losses(pixels, ground_truth, crowds, image_sizes)


def syncs_norm(model: nn.Module) -> bool:
    """Return whether a model normalises over the images of all processes, which then need an image in each part."""
    return any(isinstance(module, nn.SyncBatchNorm) for module in model.modules())


def _on_cpu(value: Any) -> Any:
    """Return a state whose tensors are on the CPU."""
    if isinstance(value, dict):
        return {key: _on_cpu(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_on_cpu, value))
    return value.cpu() if isinstance(value, Tensor) else value


def _load(model: Detector, state: dict[str, Tensor]) -> None:
    """Load a state dict into a model; the modules that were compiled may be others than now."""
    model.load_state_dict(unwrapped(state, "the training state", model.state_dict().keys()))
