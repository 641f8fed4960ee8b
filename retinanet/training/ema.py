"""An exponential moving average of a model's weights, which is steadier than the weights of any one step."""

from __future__ import annotations

import copy
from typing import Generic, TypeVar

import torch
from torch import nn

Model = TypeVar("Model", bound=nn.Module)


class WeightAverage(Generic[Model]):
    """Average of the weights over the steps of a run.

    The average follows the model quickly at first, when there is little worth remembering: the decay of step `t`
    is `min(decay, (1 + t) / (10 + t))`.

    Args:
        model: Its present weights start the average.
        decay: Share of the average that a step keeps, 0..1.
    """

    def __init__(self, model: Model, decay: float) -> None:
        """Copies the model."""
        self.model: Model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Takes in the model's weights after a step of the run, counted from 1."""
        decay = min(self.decay, (1 + step) / (10 + step))
        # Buffers too: running statistics belong to the weights that made them.
        for average, value in zip(self.model.state_dict().values(), model.state_dict().values(), strict=True):
            if average.is_floating_point():
                average.lerp_(value, 1 - decay)
            else:
                average.copy_(value)
