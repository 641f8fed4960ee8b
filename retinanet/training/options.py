"""The options of a training run."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from retinanet.data import TrainTransform
from retinanet.detection.evaluate import STAT_NAMES

OPTIMIZERS = ("sgd", "adamw")
SCHEDULES = ("multistep", "cosine", "constant")
PRECISIONS = ("fp32", "bf16")

#: Options that may differ between a run and its continuation, because they do not change what is computed.
CHANGEABLE_ON_RESUME = ("device", "workers")


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
