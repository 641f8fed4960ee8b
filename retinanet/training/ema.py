"""An exponential moving average of the weights of a model, which varies less from step to step than the weights."""

from __future__ import annotations

import copy
from typing import Generic, TypeVar

import torch
from torch import nn

Model = TypeVar("Model", bound=nn.Module)


class WeightAverage(Generic[Model]):
    """Average of the weights over the steps of a run.

    The decay of step `t` is `min(decay, (1 + t) / (10 + t))`, so that the first steps soon outweigh the initial
    weights.

    Args:
        model: The model, whose current weights start the average.
        decay: Fraction of the average that a step keeps, in 0..1.
    """

    def __init__(self, model: Model, decay: float) -> None:
        """Copy the model."""
        self.model: Model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Update the average with the weights after a step of the run, counted from 1."""
        decay = min(self.decay, (1 + step) / (10 + step))
        # Buffers are averaged, too, because running statistics belong to the weights that produced them.
        for average, value in zip(self.model.state_dict().values(), model.state_dict().values(), strict=True):
            if average.is_floating_point():
                average.lerp_(value, 1 - decay)
            else:
                average.copy_(value)
