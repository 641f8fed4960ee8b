"""How a model is trained: the options of a run, its optimizer and its learning rate."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from retinanet.data import TrainTransform
from retinanet.detection.evaluate import STAT_NAMES
from retinanet.model.network import RetinaNet

OPTIMIZERS = ("sgd", "adamw")
SCHEDULES = ("multistep", "cosine", "constant")
PRECISIONS = ("fp32", "bf16")

#: Options that may differ between a run and its continuation, because they do not change what is computed.
FREE_OPTIONS = ("device", "workers")


@dataclass(frozen=True)
class TrainOptions:
    """Options of a training run. The defaults are the usual recipe of RetinaNet, scaled to the batch size.

    Attributes:
        epochs: Passes over the training images.
        batch_size: Images in a step.
        optimizer: `sgd` (with momentum) or `adamw`.
        lr: Learning rate after warm-up; None gives 0.01 * batch_size / 16 for SGD and 1e-4 for AdamW.
        momentum: Momentum of SGD.
        weight_decay: Weight decay.
        norm_weight_decay: Weight decay of normalisation layers and biases; None gives `weight_decay`.
        backbone_lr_factor: The backbone (not the pyramid) learns at this share of the learning rate.
        schedule: `multistep`, `cosine` (to 0 at the end of the run) or `constant`.
        milestones: Shares of the run after which `multistep` multiplies the learning rate by `lr_gamma`.
        lr_gamma: See `milestones`.
        warmup_steps: Steps of linear warm-up, but at most a tenth of the run.
        warmup_factor: Share of the learning rate that warm-up starts from.
        clip_norm: Gradients are scaled down to this total norm; None never does.
        ema_decay: Decay of an exponential moving average of the weights, such as 0.998; it is what is evaluated
            and saved as a model. None: the weights themselves are.
        seed: Decides data order and augmentation.
        precision: `fp32`, or `bf16` for autocast to bfloat16 (losses and boxes stay float32).
        channels_last: Whether the network's tensors have channels innermost in memory.
        workers: Processes that load and augment images; 0 does that in the training process.
        device: Such as `cpu` or `cuda:0`; `auto` takes a GPU if there is one.
        evaluate_every: Epochs between evaluations; the last epoch is always evaluated.
        best_metric: The COCO number by which the best checkpoint is chosen.
        log_every: Steps between lines of losses in `metrics.jsonl`; 0 writes none.
        transform: Augmentation.

    Raises:
        ValueError: An option is out of its range; the message names it.
    """

    epochs: int = 12
    batch_size: int = 2
    optimizer: str = "sgd"
    lr: float | None = None
    momentum: float = 0.9
    weight_decay: float = 1e-4
    norm_weight_decay: float | None = None
    backbone_lr_factor: float = 1.0
    schedule: str = "multistep"
    milestones: tuple[float, ...] = (2 / 3, 11 / 12)
    lr_gamma: float = 0.1
    warmup_steps: int = 1000
    warmup_factor: float = 0.001
    clip_norm: float | None = 10.0
    ema_decay: float | None = None
    seed: int = 0
    precision: str = "fp32"
    channels_last: bool = False
    workers: int = 0
    device: str = "auto"
    evaluate_every: int = 1
    best_metric: str = "AP"
    log_every: int = 10
    transform: TrainTransform = field(default_factory=TrainTransform)

    def __post_init__(self) -> None:
        """Checks every option."""
        for name, low in (
            ("epochs", 1),
            ("batch_size", 1),
            ("evaluate_every", 1),
            ("warmup_steps", 0),
            ("workers", 0),
            ("log_every", 0),
            ("seed", 0),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or value < low:
                raise ValueError(f"{name}: expected an integer of at least {low}, got {value!r}")
        for name in ("lr", "clip_norm"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name}: expected a number above 0, got {value!r}")
        for name in (
            "momentum",
            "weight_decay",
            "norm_weight_decay",
            "backbone_lr_factor",
            "lr_gamma",
            "warmup_factor",
            "ema_decay",
        ):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name}: expected a number in 0..1, got {value!r}")
        for name, choices in (
            ("optimizer", OPTIMIZERS),
            ("schedule", SCHEDULES),
            ("precision", PRECISIONS),
            ("best_metric", STAT_NAMES),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {getattr(self, name)!r}")
        if not all(0 < m < 1 for m in self.milestones):
            raise ValueError(f"milestones: expected shares of the run between 0 and 1, got {self.milestones!r}")

    @property
    def learning_rate(self) -> float:
        """The learning rate after warm-up, chosen if `lr` is None."""
        if self.lr is not None:
            return self.lr
        return 0.01 * self.batch_size / 16 if self.optimizer == "sgd" else 1e-4

    def to_dict(self) -> dict[str, Any]:
        """The options by name, in a form that JSON can hold."""
        return dataclasses.asdict(self)


def resolve_device(name: str) -> torch.device:
    """The device called `name`; `auto` is the GPU if there is one, else the CPU.

    Raises:
        ValueError: There is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device: expected auto, cpu, cuda or cuda:N, got {name!r}") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device: expected one of {torch.cuda.device_count()} CUDA devices, got {name!r}")
    return device


def build_optimizer(model: RetinaNet, options: TrainOptions) -> torch.optim.Optimizer:
    """The optimizer, with up to four groups: backbone or not, normalisation and biases or not."""
    normalisations = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)
    unusual = {id(p) for m in model.modules() if isinstance(m, normalisations) for p in m.parameters(recurse=False)}
    unusual |= {id(p) for name, p in model.named_parameters() if name.endswith(".bias")}
    backbone = {id(p) for p in model.body.parameters()}
    base = options.learning_rate
    unusual_decay = options.weight_decay if options.norm_weight_decay is None else options.norm_weight_decay
    groups = []
    for in_backbone in (False, True):
        for is_unusual in (False, True):
            parameters = [
                p
                for p in model.parameters()
                if p.requires_grad and (id(p) in backbone) == in_backbone and (id(p) in unusual) == is_unusual
            ]
            if parameters:
                groups.append(
                    {
                        "params": parameters,
                        "lr": base * (options.backbone_lr_factor if in_backbone else 1.0),
                        "weight_decay": unusual_decay if is_unusual else options.weight_decay,
                    }
                )
    if options.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=base, momentum=options.momentum)
    return torch.optim.AdamW(groups, lr=base)


def build_schedule(optimizer: torch.optim.Optimizer, options: TrainOptions, total_steps: int) -> LambdaLR:
    """Sets each group's learning rate before the first step; call `step()` after each step."""
    return LambdaLR(optimizer, lambda step: lr_factor(step, total_steps, options))


def lr_factor(step: int, total_steps: int, options: TrainOptions) -> float:
    """Share of the learning rate in force at a step.

    Args:
        step: 0 for the first step.
        total_steps: Steps of the whole run.
        options: Give warm-up and schedule.
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
