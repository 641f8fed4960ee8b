"""The part of a training run that learns: the model with its optimizer, learning-rate schedule and moving average."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from retinanet.common.devices import resolve_device
from retinanet.model.network import RetinaNet
from retinanet.training.batches import Sample
from retinanet.training.ema import WeightAverage
from retinanet.training.optimizer import build_optimizer, build_schedule
from retinanet.training.options import TrainOptions


class Learner:
    """A model in training: one call of `step` is one step of the optimizer.

    Args:
        model: The model; it is moved to the device of the options and trained in place.
        options: The recipe.
        total_steps: Number of steps in the whole run, which the learning rate depends on.

    Raises:
        ValueError: The options name a device that this machine does not have.
    """

    def __init__(self, model: RetinaNet, options: TrainOptions, total_steps: int) -> None:
        """Move the model to its device and make the optimizer."""
        self.options = options
        self.device = resolve_device(options.device)
        self.memory_format = torch.channels_last if options.channels_last else torch.contiguous_format
        self.model = model.to(self.device).to(memory_format=self.memory_format)
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.average = None if options.ema_decay is None else WeightAverage(self.model, options.ema_decay)
        self.optimizer = build_optimizer(model, options)
        self.schedule = build_schedule(self.optimizer, options, total_steps)

    @property
    def result(self) -> RetinaNet:
        """The model that is evaluated and saved: the moving average if there is one, else the trained model."""
        return self.model if self.average is None else self.average.model

    @property
    def learning_rate(self) -> float:
        """Learning rate of the first parameter group in the next step."""
        return float(self.optimizer.param_groups[0]["lr"])

    def step(self, samples: list[Sample]) -> Tensor:  # [3] on the device: class loss, box loss, gradient norm
        """Do one step of the optimizer without synchronising with the device."""
        batch = self.model.prepare([image for image, _ in samples], [target for _, target in samples], self.device)
        assert batch.ground_truth is not None
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.precision == "bf16"):
            pixels = batch.pixels.contiguous(memory_format=self.memory_format)
            losses = self.model.losses(pixels, batch.ground_truth, batch.crowds)
        self.optimizer.zero_grad(set_to_none=True)
        (losses["classification"] + losses["bbox_regression"]).backward()
        norm = torch.nn.utils.clip_grad_norm_(self.trained, self.options.clip_norm or math.inf)
        self.optimizer.step()
        self.schedule.step()
        if self.average is not None:
            self.average.update(self.model, self.schedule.last_epoch)
        return torch.stack([losses["classification"].detach(), losses["bbox_regression"].detach(), norm.detach()])

    def state(self) -> dict[str, Any]:
        """Return everything that decides how training continues, random generators included."""
        return {
            "model": dict(self.model.state_dict()),
            "average": None if self.average is None else dict(self.average.model.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "schedule": {"last_epoch": self.schedule.last_epoch},
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
        self.model.load_state_dict(state["model"])
        if self.average is not None:
            self.average.model.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.last_epoch = state["schedule"]["last_epoch"]
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)
