"""The optimizer of a training run, and its learning rate at each step."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from retinanet.model.detector import Detector
from retinanet.training.options import TrainOptions

_NORMALISATIONS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


def build_optimizer(model: Detector, options: TrainOptions) -> torch.optim.Optimizer:
    """Make the optimizer of a model's trainable parameters.

    Args:
        model: The model. `body` is its backbone without the pyramid.
        options: Optimizer, learning rates and weight decays.

    Returns:
        The optimizer with up to four parameter groups. In the backbone and in the rest of the model, normalisation
        layers and biases form one group, and the other parameters form another.
    """
    norms_and_biases = {
        id(p) for m in model.modules() if isinstance(m, _NORMALISATIONS) for p in m.parameters(recurse=False)
    }
    norms_and_biases |= {id(p) for name, p in model.named_parameters() if name.endswith(".bias")}
    backbone = {id(p) for p in model.body.parameters()}
    base = options.learning_rate
    norm_decay = options.weight_decay if options.norm_weight_decay is None else options.norm_weight_decay
    groups = []
    for in_backbone in (False, True):
        for is_norm_or_bias in (False, True):
            parameters = [
                p
                for p in model.parameters()
                if p.requires_grad
                and (id(p) in backbone) == in_backbone
                and (id(p) in norms_and_biases) == is_norm_or_bias
            ]
            if parameters:
                groups.append(
                    {
                        "params": parameters,
                        "lr": base * (options.backbone_lr_factor if in_backbone else 1.0),
                        "weight_decay": norm_decay if is_norm_or_bias else options.weight_decay,
                    }
                )
    if options.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=base, momentum=options.momentum)
    return torch.optim.AdamW(groups, lr=base)


def build_schedule(optimizer: torch.optim.Optimizer, options: TrainOptions, total_steps: int) -> LambdaLR:
    """Make the learning-rate schedule, whose `step()` is to be called after each step of the optimizer."""
    return LambdaLR(optimizer, lambda step: lr_factor(step, total_steps, options))


def lr_factor(step: int, total_steps: int, options: TrainOptions) -> float:
    """Return the factor on the learning rate at a step.

    Args:
        step: The step, counted from 0.
        total_steps: Number of steps in the whole run.
        options: Warm-up and schedule.
    """
    warmup = min(options.warmup_steps, total_steps // 10)
    if step < warmup:
        return options.warmup_factor + (1 - options.warmup_factor) * step / warmup
    done = step / total_steps
    if options.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total_steps - warmup)))
    if options.schedule == "multistep":
        return options.lr_gamma ** sum(done >= milestone for milestone in options.milestones)
    return 1.0
