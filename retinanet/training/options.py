"""The options of a training run."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch

from retinanet.common.errors import ConfigError
from retinanet.common.validation import (
    as_tuples,
    check_fields,
    checked,
    flag,
    integer,
    is_number,
    number,
    one_of,
    optional,
)
from retinanet.data import TrainTransform
from retinanet.detection.coco_numbers import STAT_NAMES

OPTIMIZERS = ("sgd", "adamw")
LOGS = ("none", "tensorboard")
SCHEDULES = ("multistep", "cosine", "constant")
#: The dtype to which autocast converts convolutions, by precision.
AUTOCAST_DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
PRECISIONS = tuple(AUTOCAST_DTYPES)

#: Options that may differ between a run and its continuation. They decide how a step is computed, which changes its
#: result at most by rounding (except for `accumulate` with trained batch normalisation), what is recorded, and when the
#: run ends. `epochs` may grow, too, if the schedule is constant.
CHANGEABLE_ON_RESUME = ("device", "workers", "save_every", "accumulate", "patience", "log")


@dataclass(frozen=True)
class TrainOptions:
    """Options of a training run. The defaults are the usual recipe of RetinaNet, scaled to the batch size.

    Attributes:
        epochs: Passes over the training images.
        batch_size: Images in a step, those of all processes together.
        accumulate: Parts in which each process computes its share of a step, one after the other. More parts need less
            memory. The result is the same, except with trained batch normalisation, which sees one part at a time.
        steps_per_epoch: Steps of an epoch of an IterableDataset. None takes its length.
        optimizer: `sgd` (with momentum) or `adamw`.
        lr: Learning rate after warm-up. None gives 0.01 * batch_size / 16 for SGD and 1e-4 for AdamW.
        momentum: Momentum of SGD.
        weight_decay: Weight decay.
        norm_weight_decay: Weight decay of normalisation layers and biases. None gives `weight_decay`.
        backbone_lr_factor: Factor on the learning rate of the backbone without its pyramid.
        schedule: `multistep`, `cosine` (to 0 at the end of the run) or `constant`.
        milestones: Fractions of the run after which `multistep` multiplies the learning rate by `lr_gamma`.
        lr_gamma: Factor of each milestone.
        warmup_steps: Steps of linear warm-up, but at most a tenth of the run.
        warmup_factor: Factor on the learning rate at the start of warm-up.
        clip_norm: Total norm to which larger gradients are scaled down. None does not clip.
        ema_decay: Decay of an exponential moving average of the weights, such as 0.998. The average is then evaluated
            and saved as the model. None evaluates and saves the weights themselves.
        seed: Seed of data order and augmentation.
        precision: `fp32`, or `bf16` or `fp16` for autocast to bfloat16 or float16. Losses and boxes stay float32. For
            float16 the loss is scaled, and a step whose gradients overflow is left out and lowers the scale. Gradients
            that overflow at any scale are a divergence.
        channels_last: Whether the tensors of the network have channels innermost in memory.
        workers: Processes that load and augment images. 0 does so in the training process.
        device: A device such as `cpu` or `cuda:0`. `auto` takes a GPU if there is one.
        evaluate_every: Epochs between evaluations. The last epoch is always evaluated.
        best_metric: Name of the COCO number by which the best model is chosen.
        log_every: Steps between lines of losses in `metrics.jsonl`. 0 writes none.
        patience: Training stops when `best_metric` has been above 0 and has not risen in this many evaluations. None
            trains all epochs.
        log: `tensorboard` writes losses and COCO numbers for TensorBoard into the run folder, and `none` does not.
        save_every: Minutes between saves within an epoch. 0 saves after each epoch only.
        transform: Augmentation of the training images.

    Raises:
        ConfigError: An option is out of its range. The message names the option.
    """

    epochs: int = checked(12, integer(1))
    batch_size: int = checked(2, integer(1))
    accumulate: int = checked(1, integer(1))
    steps_per_epoch: int | None = checked(None, optional(integer(1)))
    optimizer: str = checked("sgd", one_of(OPTIMIZERS))
    lr: float | None = checked(None, optional(number(above=0)))
    momentum: float = checked(0.9, number(0, 1))
    weight_decay: float = checked(1e-4, number(0, 1))
    norm_weight_decay: float | None = checked(None, optional(number(0, 1)))
    backbone_lr_factor: float = checked(1.0, number(0, 1))
    schedule: str = checked("multistep", one_of(SCHEDULES))
    milestones: tuple[float, ...] = (2 / 3, 11 / 12)
    lr_gamma: float = checked(0.1, number(0, 1))
    warmup_steps: int = checked(1000, integer(0))
    warmup_factor: float = checked(0.001, number(0, 1))
    clip_norm: float | None = checked(10.0, optional(number(above=0)))
    ema_decay: float | None = checked(None, optional(number(0, 1)))
    seed: int = checked(0, integer(0))
    precision: str = checked("fp32", one_of(PRECISIONS))
    channels_last: bool = checked(False, flag())
    workers: int = checked(0, integer(0))
    device: str = "auto"
    evaluate_every: int = checked(1, integer(1))
    best_metric: str = checked("AP", one_of(STAT_NAMES))
    log_every: int = checked(10, integer(0))
    patience: int | None = checked(None, optional(integer(1)))
    log: str = checked("none", one_of(LOGS))
    save_every: float = checked(5.0, number(low=0))
    transform: TrainTransform = field(default_factory=TrainTransform)

    def __post_init__(self) -> None:
        """Turn lists into tuples and check every option."""
        as_tuples(self)
        check_fields(self)
        milestones = self.milestones
        if not isinstance(milestones, tuple) or not all(is_number(m) and 0 < m < 1 for m in milestones):
            raise ConfigError(f"milestones: expected fractions of the run between 0 and 1, got {milestones!r}")

    @property
    def learning_rate(self) -> float:
        """The learning rate after warm-up: `lr`, or the default of the optimizer."""
        if self.lr is not None:
            return self.lr
        return 0.01 * self.batch_size / 16 if self.optimizer == "sgd" else 1e-4

    def to_dict(self) -> dict[str, Any]:
        """Return the options by name, in a form that JSON can hold."""
        return dataclasses.asdict(self)
