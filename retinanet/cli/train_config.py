"""The configuration and the recipe of `retinanet train`, made from its options, files and the continued run."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retinanet.cli.arguments import config_error, config_fields
from retinanet.cli.train_arguments import PYRAMIDS, RETINANET, split_model
from retinanet.common.errors import ConfigError, UsageError
from retinanet.common.validation import make_record

if TYPE_CHECKING:
    from retinanet.checkpoints.model_file import ModelFile
    from retinanet.data import DetectionDataset
    from retinanet.model.detector_config import DetectorConfig
    from retinanet.training.options import TrainOptions

_STORED = "config.json of the run to continue"


def build_config(
    args: argparse.Namespace, train_set: DetectionDataset, stored: dict[str, Any], start: ModelFile | None
) -> DetectorConfig:
    """Return the model's configuration.

    Later sources override earlier ones: the model file to start from, the continued run, --config, and the options. By
    default, a new run without any weights trains the whole backbone, with ordinary batch normalisation.

    Args:
        args: The parsed arguments.
        train_set: The data set with the model's classes.
        stored: The content of `config.json` of the continued run. Empty for a new run.
        start: The model file to start from, or None.

    Raises:
        UsageError: A value is wrong, or an option does not apply to the model.
        DataError: The file of --config cannot be read, or holds no JSON object.
    """
    from retinanet.model.compat import merge_fields
    from retinanet.model.detector_config import CONFIG_CLASSES, config_from_dict
    from retinanet.model.pyramid_config import CUSTOM

    written = getattr(args, "model", None)
    args = _with_backbone(args)
    from_file = config_fields(args.config)
    name = _model_name(args, written, stored, start, from_file)
    config_class = CONFIG_CLASSES[_architecture(name)]
    for other in CONFIG_CLASSES.values():
        _refuse_idle(_given(args, other).keys() - _given(args, config_class).keys(), written or name)
    fields: dict[str, Any] = {}
    if start is not None:
        fields = {**start.config.to_dict(), "class_weights": ()}
    elif not stored:
        fields = _new_fields(name, args.backbone_weights is not None)
    from_options = _given(args, config_class)
    if name not in PYRAMIDS and hasattr(args, "model"):
        from_options["network"] = name
    stored = stored.get("model", {})
    changes = [stored, from_file, from_options]
    if from_options.keys() & {"anchor_sizes", "aspect_ratios"}:
        changes.append({"anchor_shapes": ()})
    if args.class_weights_from is not None:
        changes.append({"class_weights": _class_weights(args.class_weights_from, train_set)})
    if not stored:
        changes.append({"class_names": train_set.class_names, "category_ids": train_set.category_ids})
    try:
        config = config_from_dict(merge_fields(fields, *changes), config_class.architecture)
        if config.backbone == CUSTOM:
            raise ConfigError(
                f"backbone: {CUSTOM!r} needs a Python module, which a command cannot take; use the Python API, or name "
                "a backbone of torchvision"
            )
    except ConfigError as error:
        raise UsageError(_with_source(error, args, from_options, from_file, stored)) from error
    return config


def _model_name(
    args: argparse.Namespace,
    written: str | None,
    stored: dict[str, Any],
    start: ModelFile | None,
    from_file: dict[str, Any],
) -> str:
    """Return the model that --model names, or else the one that the run, the model file or --config has.

    `written` is the name as it was given, perhaps with a backbone.

    Raises:
        UsageError: --model names another one than the run, or one of another architecture than the model file.
    """
    before, source = None, args.weights
    if stored:
        before, source = _name_of(stored.get("architecture", RETINANET), stored["model"]), _STORED
    elif start is not None:
        before = _name_of(start.config.architecture, start.config.to_dict())
    name = str(getattr(args, "model", before or from_file.get("network", RETINANET)))
    if before is not None and name != before and (stored or _architecture(name) != _architecture(before)):
        raise UsageError(f"--model {written}: expected {before}, which is the model of {source}")
    return name


def _with_backbone(args: argparse.Namespace) -> argparse.Namespace:
    """Return the options with --backbone in place of a backbone in the name of --model.

    Raises:
        UsageError: The name has an unknown backbone, or both name a backbone, and they differ.
    """
    from retinanet.model.pyramid_config import BACKBONE_STAGES

    model, backbone = split_model(getattr(args, "model", ""))
    if backbone is None:
        return args
    if backbone not in BACKBONE_STAGES:
        raise UsageError(f"--model {args.model}: expected {model}_ followed by one of {', '.join(BACKBONE_STAGES)}")
    if getattr(args, "backbone", backbone) != backbone:
        raise UsageError(
            f"--backbone {args.backbone}: expected {backbone}, which --model {args.model} names; give --model {model}"
        )
    return argparse.Namespace(**{**vars(args), "model": model, "backbone": backbone})


def _name_of(architecture: str, fields: Mapping[str, Any]) -> str:
    """Return the name for --model of a configuration."""
    return architecture if architecture in PYRAMIDS else str(fields["network"])


def _architecture(name: str) -> str:
    return name if name in PYRAMIDS else "ssd"


def _new_fields(name: str, has_weights: bool) -> dict[str, Any]:
    """Return the fields of a new run in which the defaults of the command are not those of the configuration."""
    if name in PYRAMIDS:
        return {} if has_weights else {"backbone_norm": "batch", "trainable_backbone_layers": None}
    # The ImageNet weights of MobileNetV3 are those of the whole network.
    return {"network": name, **({"reduced_tail": False} if has_weights and name == "ssdlite320" else {})}


def _refuse_idle(fields: AbstractSet[str], name: str) -> None:
    """Raise UsageError if an option was given for a field that the model does not have."""
    if fields:
        options = ", ".join(f"--{field.replace('_', '-')}" for field in sorted(fields))
        raise UsageError(f"{options}: {'does' if len(fields) == 1 else 'do'} not apply to --model {name}")


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
        return config_error(args.config, error, "give the --model that the file is for")
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
