"""The command `retinanet train`: it trains a model, or continues a run.

An option of the groups "model", "recipe" and "augmentation" is named after a field of `RetinaNetConfig`,
`TrainOptions` or `TrainTransform`. Such an option has no default. If it is not given, it is absent from the parsed
arguments, and its field keeps the value of the continued run, of the starting point or of the dataclass.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retinanet.cli.arguments import (
    add_device,
    add_images,
    config_fields,
    natural_int,
    number_list,
    positive_float,
    positive_int,
    share,
    use_device,
)
from retinanet.cli.console import print_stats, progress_bar
from retinanet.common.errors import DataError, UsageError
from retinanet.common.files import read_json

if TYPE_CHECKING:
    from retinanet.checkpoints.model_file import ModelFile
    from retinanet.data import DetectionDataset
    from retinanet.model.config import RetinaNetConfig
    from retinanet.training.options import TrainOptions

HELP = "train a model"
DESCRIPTION = (
    "Train a RetinaNet. The folder RUN_DIR receives config.json, metrics.jsonl, best.safetensors, last.safetensors and "
    "last.pt, the training state from which --resume continues. Ctrl-C saves this state before the command ends."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `retinanet train`."""
    _add_data(parser)
    _add_start(parser)
    _add_model(parser)
    _add_recipe(parser)
    _add_augmentation(parser)
    add_device(parser)


def _add_data(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data")
    group.add_argument("--train", required=True, metavar="ANN", help="COCO json, or folder of Pascal VOC xml files")
    group.add_argument("--val", required=True, metavar="ANN", help="validation data, in one of the same forms")
    add_images(group)
    group.add_argument("--val-images", metavar="DIR", help="folder of the validation images (default: as --images)")
    group.add_argument("--output", required=True, metavar="RUN_DIR", help="folder of the run, created if missing")
    group.add_argument(
        "--resume", action="store_true", help="continue the run in RUN_DIR where it stopped, with its options"
    )


def _add_start(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("starting point (default: an untrained model)")
    group.add_argument(
        "--config", metavar="FILE", help="JSON object with fields of RetinaNetConfig; the options below override it"
    )
    weights = group.add_mutually_exclusive_group()
    weights.add_argument(
        "--weights",
        metavar="FILE",
        help="start from the weights and the configuration of this model file (.safetensors); classes are matched by "
        "name",
    )
    weights.add_argument(
        "--backbone-weights", metavar="FILE", help="start from torchvision's ImageNet weights of the backbone (.pth)"
    )


def _add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "model (defaults: torchvision's retinanet_resnet50_fpn)", argument_default=argparse.SUPPRESS
    )
    group.add_argument(
        "--backbone",
        metavar="NAME",
        help="such as resnet18, resnext50_32x4d or mobilenet_v3_large (default: resnet50)",
    )
    group.add_argument(
        "--trainable-backbone-layers",
        type=natural_int,
        metavar="N",
        help="train only the last N stages of the backbone (default: 3 with --backbone-weights, all without weights)",
    )
    group.add_argument(
        "--fpn-levels",
        type=positive_int,
        nargs="+",
        metavar="L",
        help="pyramid levels, such as 3 4 5 (default: 3 to 7)",
    )
    group.add_argument("--fpn-channels", type=positive_int, metavar="N", help="pyramid channels (default: 256)")
    group.add_argument("--head-depth", type=natural_int, metavar="N", help="convolutions of each head (default: 4)")
    group.add_argument("--head-norm", metavar="NAME", help="normalisation in the heads: none or group (default: none)")
    group.add_argument(
        "--anchor-sizes",
        type=number_list,
        nargs="+",
        metavar="A,B,C",
        help="anchor sizes in pixels, one list per level (default: three per octave, from 32 on level 3)",
    )
    group.add_argument(
        "--aspect-ratios",
        type=positive_float,
        nargs="+",
        metavar="R",
        help="height / width of the anchors (default: 0.5 1 2)",
    )
    group.add_argument("--box-loss", metavar="NAME", help="l1, smooth_l1, giou, diou or ciou (default: l1)")
    group.add_argument(
        "--min-size",
        type=_min_size,
        metavar="PIXELS",
        help="length to which the shorter image side is resized; 0 never resizes (default: 800)",
    )
    group.add_argument(
        "--max-size", type=positive_int, metavar="PIXELS", help="limit of the longer side when resizing (default: 1333)"
    )
    group.add_argument("--max-detections", type=positive_int, metavar="N", help="detections per image (default: 300)")


def _min_size(text: str) -> tuple[int, ...] | None:
    """Parse --min-size as the field `min_size` of `RetinaNetConfig`."""
    size = natural_int(text)
    return (size,) if size else None


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("recipe", argument_default=argparse.SUPPRESS)
    group.add_argument("--epochs", type=positive_int, metavar="N", help="passes over the training images (default: 12)")
    group.add_argument("--batch-size", type=positive_int, metavar="N", help="images per step (default: 2)")
    group.add_argument("--optimizer", metavar="NAME", help="sgd or adamw (default: sgd)")
    group.add_argument(
        "--lr",
        type=positive_float,
        metavar="X",
        help="learning rate (default: 0.01 * batch size / 16 for sgd, 0.0001 for adamw)",
    )
    group.add_argument(
        "--backbone-lr-factor", type=share, metavar="F", help="factor on the backbone's learning rate (default: 1)"
    )
    group.add_argument("--weight-decay", type=share, metavar="F", help="weight decay (default: 0.0001)")
    group.add_argument("--schedule", metavar="NAME", help="multistep, cosine or constant (default: multistep)")
    group.add_argument(
        "--warmup-steps",
        type=natural_int,
        metavar="N",
        help="steps of linear warm-up, at most a tenth of the run (default: 1000)",
    )
    group.add_argument(
        "--clip-norm", type=positive_float, metavar="X", help="limit of the gradient's norm (default: 10)"
    )
    group.add_argument(
        "--ema-decay",
        type=share,
        metavar="F",
        help="evaluate and save a moving average of the weights with this decay, such as 0.998 (default: no average)",
    )
    group.add_argument("--precision", metavar="NAME", help="fp32, or bf16 for bfloat16 autocast (default: fp32)")
    group.add_argument("--seed", type=natural_int, metavar="N", help="seed of all random numbers (default: 0)")
    group.add_argument(
        "--evaluate-every", type=positive_int, metavar="EPOCHS", help="epochs between evaluations (default: 1)"
    )
    group.add_argument(
        "--workers", type=natural_int, metavar="N", help="processes that load and augment images (default: 0)"
    )


def _add_augmentation(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("augmentation", argument_default=argparse.SUPPRESS)
    group.add_argument(
        "--crop", type=positive_int, metavar="PIXELS", help="side of a random square crop (default: none)"
    )
    group.add_argument(
        "--crop-on-object",
        type=share,
        metavar="P",
        help="probability that a crop is placed around an object (default: 0)",
    )
    group.add_argument(
        "--scale", type=positive_float, nargs=2, metavar=("LOW", "HIGH"), help="range of random scaling (default: 1 1)"
    )
    group.add_argument(
        "--horizontal-flip", type=share, metavar="P", help="probability of a mirror image (default: 0.5)"
    )
    group.add_argument(
        "--vertical-flip", type=share, metavar="P", help="probability of an upside-down image (default: 0)"
    )
    group.add_argument("--quarter-turns", action="store_true", help="rotate by 0, 90, 180 or 270 degrees at random")
    for name in ("brightness", "contrast", "saturation", "hue"):
        group.add_argument(f"--{name}", type=share, metavar="F", help=f"largest random change of {name} (default: 0)")


def run(args: argparse.Namespace) -> int:
    """Check the data and the options, then train."""
    import torch
    from tqdm import tqdm

    from retinanet.checkpoints.model_file import read_model
    from retinanet.checkpoints.transfer import copy_weights
    from retinanet.data import open_dataset
    from retinanet.model.network import RetinaNet
    from retinanet.training.run import train

    use_device(args)
    run_dir = Path(args.output)
    if run_dir.exists() and not run_dir.is_dir():
        raise UsageError(f"{run_dir}: expected a folder for the output, got a file")
    stored = _stored_run(run_dir) if args.resume else {}
    checking = progress_bar("checking images", "image", delay=2)
    train_set = open_dataset(args.train, args.images, progress=checking)
    val_images = args.val_images or args.images
    val_set = open_dataset(args.val, val_images, class_names=train_set.class_names, progress=checking)
    start = None if args.weights is None or args.resume else read_model(args.weights)
    config = build_config(args, train_set, stored.get("model", {}), start)
    options = build_options(args, stored.get("options", {}))
    # The seed also determines the initial weights. A continued run replaces these by its saved weights.
    torch.manual_seed(options.seed)
    model = RetinaNet(config, None if args.resume else args.backbone_weights)
    if start is not None:
        print(f"{args.weights}: {copy_weights(start, model)}")
    if args.resume and (unread := args.weights or args.backbone_weights):
        print(f"{unread}: not read, because a resumed run continues with its own weights and configuration")
    print(f"{train_set.source}: {train_set.summary()}")
    print(f"{val_set.source}: {val_set.summary()}")
    result = train(model, train_set, val_set, options, run_dir, resume=args.resume, progress=tqdm)
    if result.stats is not None:
        print_stats(result.stats)
    best = f"best {options.best_metric} {result.best:.3f} (epoch {result.best_epoch})"
    print(f"{run_dir}: {result.epochs} epochs; {best}")
    return 0


def _stored_run(run_dir: Path) -> dict[str, Any]:
    """Return the content of the run's `config.json`.

    Raises:
        UsageError: The folder holds no run.
        DataError: The file is not the configuration of a run.
    """
    path = run_dir / "config.json"
    if not path.is_file():
        raise UsageError(f"{run_dir}: no run to resume: the folder has no {path.name}")
    content = read_json(path)
    if not isinstance(content, dict) or not {"model", "options"} <= content.keys():
        raise DataError(f"{path}: expected the configuration of a run, a JSON object with `model` and `options`")
    return content


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
    from retinanet.model.config import CUSTOM, ConfigError, RetinaNetConfig

    fields: dict[str, Any] = {}
    if start is not None:
        fields = start.config.to_dict()
    elif not stored and args.backbone_weights is None:
        fields = {"backbone_norm": "batch", "trainable_backbone_layers": None}
    changes = [stored, config_fields(args.config), _given(args, RetinaNetConfig)]
    if not stored:
        changes.append({"class_names": train_set.class_names, "category_ids": train_set.category_ids})
    try:
        config = RetinaNetConfig.from_dict(merge_fields(fields, *changes))
    except ConfigError as error:
        raise UsageError(f"{args.config or 'model'}: {error}") from error
    if config.backbone == CUSTOM:
        source = args.config or args.weights or "model"
        raise UsageError(
            f"{source}: backbone: {CUSTOM!r} needs a Python module, which a command cannot take; use the Python API, "
            "or name a backbone of torchvision"
        )
    return config


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
    for values, name in ((transform, "scale"), (fields, "milestones")):
        if name in values:
            values[name] = tuple(values[name])
    try:
        return TrainOptions(**fields, transform=TrainTransform(**transform))
    except ValueError as error:
        raise UsageError(str(error)) from error


def _given(args: argparse.Namespace, record: type[Any]) -> dict[str, Any]:
    """Return the fields of a dataclass for which an option was given, by name."""
    names = (field.name for field in dataclasses.fields(record))
    return {name: getattr(args, name) for name in names if hasattr(args, name)}
