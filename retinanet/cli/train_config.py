"""The configuration and the recipe of `retinanet train`, made from its options, files and the continued run."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retinanet.cli.arguments import config_fields
from retinanet.common.errors import ConfigError, UsageError
from retinanet.common.validation import make_record

if TYPE_CHECKING:
    from retinanet.checkpoints.model_file import ModelFile
    from retinanet.data import DetectionDataset
    from retinanet.model.config import RetinaNetConfig
    from retinanet.training.options import TrainOptions

_STORED = "config.json of the run to continue"


def build_config(
    args: argparse.Namespace, train_set: DetectionDataset, stored: dict[str, Any], start: ModelFile | None
) -> RetinaNetConfig:
    """Return the model's configuration.

    Later sources override earlier ones: the model file to start from, the continued run, --config, and the options. By
    default, a new run without any weights trains the whole backbone, with ordinary batch normalisation.

    Args:
        args: The parsed arguments.
        train_set: The data set with the model's classes.
        stored: The configuration of the continued run. Empty for a new run.
        start: The model file to start from, or None.

    Raises:
        UsageError: A value is wrong.
        DataError: The file of --config cannot be read, or holds no JSON object.
    """
    from retinanet.model.compat import merge_fields
    from retinanet.model.config import CUSTOM, RetinaNetConfig

    fields: dict[str, Any] = {}
    if start is not None:
        fields = {**start.config.to_dict(), "class_weights": ()}
    elif not stored and args.backbone_weights is None:
        fields = {"backbone_norm": "batch", "trainable_backbone_layers": None}
    from_file, from_options = config_fields(args.config), _given(args, RetinaNetConfig)
    changes = [stored, from_file, from_options]
    if from_options.keys() & {"anchor_sizes", "aspect_ratios"}:
        changes.append({"anchor_shapes": ()})
    if args.class_weights_from is not None:
        changes.append({"class_weights": _class_weights(args.class_weights_from, train_set)})
    if not stored:
        changes.append({"class_names": train_set.class_names, "category_ids": train_set.category_ids})
    try:
        config = RetinaNetConfig.from_dict(merge_fields(fields, *changes))
        if config.backbone == CUSTOM:
            raise ConfigError(
                f"backbone: {CUSTOM!r} needs a Python module, which a command cannot take; use the Python API, or name "
                "a backbone of torchvision"
            )
    except ConfigError as error:
        raise UsageError(_with_source(error, args, from_options, from_file, stored)) from error
    return config


def _with_source(
    error: ConfigError,
    args: argparse.Namespace,
    from_options: dict[str, Any],
    from_file: dict[str, Any],
    stored: dict[str, Any],
) -> str:
    """Return an error's message with the option or the file that the wrong value came from."""
    name, _, reason = str(error).partition(":")
    field = name.removeprefix("compat.")
    if field in from_options:
        return f"--{field.replace('_', '-')}:{reason}"
    if field in from_file or field in from_file.get("compat", {}):
        return f"{args.config}: {error}"
    return f"{_STORED if field in stored else args.weights or 'model'}: {error}"


def _class_weights(source: str, train_set: DetectionDataset) -> tuple[float, ...]:
    """Return the weights that --class-weights asks for: `auto`, or those of a file."""
    from retinanet.training.class_weights import balanced_weights, read_weights

    if source != "auto":
        return read_weights(Path(source), train_set.class_names)
    counts = [0] * len(train_set.class_names)
    for record in train_set.boxes:
        counts[record.label] += not record.crowd
    return balanced_weights(counts)


def build_options(args: argparse.Namespace, stored: dict[str, Any]) -> TrainOptions:
    """Return the recipe: the defaults, overridden by the recipe of a continued run and then by the options.

    Args:
        args: The parsed arguments.
        stored: The recipe of the continued run. Empty for a new run.

    Raises:
        UsageError: A value is wrong.
    """
    from retinanet.data import TrainTransform
    from retinanet.training.options import TrainOptions

    fields = dict(stored)
    transform = fields.pop("transform", {}) | _given(args, TrainTransform)
    fields |= _given(args, TrainOptions)
    try:
        made = make_record(TrainTransform, transform, "augmentation")
        return make_record(TrainOptions, {**fields, "transform": made}, "recipe")
    except ConfigError as error:
        name, _, reason = str(error).partition(":")
        if hasattr(args, name):
            raise UsageError(f"--{name.replace('_', '-')}:{reason}") from error
        raise UsageError(f"{_STORED}: {error}" if stored else str(error)) from error


def _given(args: argparse.Namespace, record: type[Any]) -> dict[str, Any]:
    """Return the fields of a dataclass for which an option was given, by name."""
    names = (field.name for field in dataclasses.fields(record))
    return {name: getattr(args, name) for name in names if hasattr(args, name)}
