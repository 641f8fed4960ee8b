"""The arguments of `retinanet train`.

Apart from --model, an option of the model, the recipe and the augmentation is named after a field of a model's
configuration, of `TrainOptions` or of `TrainTransform`. Such an option has no default. If it is not given, it is absent
from the parsed arguments, and its field keeps the value of the continued run, of the starting point or of the
dataclass.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

from retinanet.cli.arguments import (
    DATA_FORMS,
    READING,
    add_device,
    add_images,
    add_list,
    add_reading,
    natural_float,
    natural_int,
    number_list,
    positive_float,
    positive_int,
    share,
)

#: The default of --model.
RETINANET = "retinanet"
#: Architectures with a feature pyramid on any --backbone.
PYRAMIDS = (RETINANET, "fcos", "fasterrcnn")
#: What --model accepts, besides a pyramid with its backbone such as fcos_resnet50. The others are the networks of
#: `SSDConfig`.
MODELS = (
    *PYRAMIDS,
    "ssd300_vgg16",
    "ssd512_vgg16",
    "ssdlite320",
    "ssd300_mobilenet_v2",
    "ssd512_mobilenet_v2",
    "ssdlite320_mobilenet_v2",
)
#: Paths of the data. A run keeps them and the options of `READING`, so that --resume needs none of them.
DATA_PATHS = ("train", "val", "images", "val_images")


def split_model(name: str) -> tuple[str, str | None]:
    """Return the model and the backbone that a name such as fcos_resnet50 stands for; other names have no backbone."""
    model, _, backbone = name.partition("_")
    return (model, backbone) if model in PYRAMIDS and backbone else (name, None)


def _model_name(text: str) -> str:
    """Parse --model."""
    if split_model(text)[0] not in MODELS:
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(MODELS)}, got {text!r}")
    return text


def data_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options of the data by name, with absolute paths; those not given are left out."""
    given = {name: value for name in DATA_PATHS + READING if (value := getattr(args, name)) is not None}
    return {name: os.path.abspath(value) if name in DATA_PATHS else value for name, value in given.items()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `retinanet train`."""
    _add_data(parser)
    _add_start(parser)
    _add_model(parser)
    _add_recipe(parser)
    _add_augmentation(parser)
    add_device(parser)


def add_train_and_val(group: argparse._ActionsContainer) -> None:
    """Add the options of the training and the validation data: those of `DATA_PATHS` and `READING`."""
    group.add_argument("--train", metavar="ANN", help=DATA_FORMS)
    group.add_argument("--val", metavar="ANN", help="validation data, in one of the same forms")
    add_images(group)
    group.add_argument("--val-images", metavar="DIR", help="folder of the validation images (default: as --images)")
    add_reading(group)


def _add_data(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data")
    add_train_and_val(group)
    group.add_argument("--output", metavar="RUN_DIR", help="folder of the run, created if missing")
    group.add_argument(
        "--resume",
        nargs="?",
        const=True,
        metavar="RUN_DIR",
        help="continue the run in RUN_DIR (or --output) where it stopped, with its data and options",
    )
    group.add_argument(
        "--save-every",
        type=natural_float,
        metavar="MINUTES",
        default=argparse.SUPPRESS,
        help="minutes between saves within an epoch; 0 saves after each epoch only (default: 5)",
    )


def _add_start(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("starting point (default: random weights, which need many more steps)")
    group.add_argument(
        "--config",
        metavar="FILE",
        help="JSON object with fields of the model's configuration; the options below override it",
    )
    weights = group.add_mutually_exclusive_group()
    weights.add_argument(
        "--weights",
        metavar="FILE",
        help="start from the weights and the configuration of this model file (.safetensors); classes are matched by "
        "name",
    )
    weights.add_argument(
        "--backbone-weights",
        metavar="FILE",
        help="start from ImageNet weights of the backbone: a file of torchvision (.pth), or `imagenet`, which "
        "downloads it",
    )


def _add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model", argument_default=argparse.SUPPRESS)
    group.add_argument(
        "--model",
        type=_model_name,
        metavar="NAME",
        help=f"{', '.join(MODELS)}; fcos_resnet50 stands for fcos with --backbone resnet50, and so on (default: "
        f"{RETINANET}, or as --weights)",
    )
    group.add_argument(
        "--trainable-backbone-layers",
        type=natural_int,
        metavar="N",
        help="train only the last N stages of the backbone (default: 3 with --backbone-weights, except in an SSD; else "
        "all)",
    )
    group.add_argument(
        "--max-detections",
        type=positive_int,
        metavar="N",
        help="detections per image, by default 300 (SSD: 200, FCOS and Faster R-CNN: 100)",
    )
    group = parser.add_argument_group("SSD", argument_default=argparse.SUPPRESS)
    group.add_argument(
        "--cls-loss",
        metavar="NAME",
        help="mining: softmax and hard negatives; focal: sigmoid focal loss of all default boxes (default: mining)",
    )
    group.add_argument(
        "--negative-ratio", type=natural_float, metavar="R", help="hard negatives per matched default box (default: 3)"
    )
    group.add_argument(
        "--min-negatives",
        type=natural_int,
        metavar="N",
        help="least hard negatives of an image, for images without objects (default: 0)",
    )
    group = parser.add_argument_group("RetinaNet, FCOS and Faster R-CNN", argument_default=argparse.SUPPRESS)
    group.add_argument(
        "--backbone",
        metavar="NAME",
        help="such as resnet18, resnext50_32x4d or mobilenet_v3_large (default: resnet50)",
    )
    add_list(
        group,
        "--fpn-levels",
        positive_int,
        metavar="L",
        help="pyramid levels, such as 3 4 5 or 3,4,5 (default: 3 to 7, in a Faster R-CNN 2 to 6)",
    )
    group.add_argument("--fpn-channels", type=positive_int, metavar="N", help="pyramid channels (default: 256)")
    add_list(
        group,
        "--min-size",
        natural_int,
        convert=_min_size,
        metavar="PIXELS",
        help="length to which the shorter image side is resized; training draws one of several; 0 never resizes "
        "(default: 800)",
    )
    group.add_argument(
        "--max-size", type=positive_int, metavar="PIXELS", help="limit of the longer side when resizing (default: 1333)"
    )
    group = parser.add_argument_group("RetinaNet and Faster R-CNN", argument_default=argparse.SUPPRESS)
    group.add_argument(
        "--anchor-sizes",
        type=number_list,
        nargs="+",
        metavar="A,B,C",
        help="anchor sizes in pixels, one list per level (default: three per octave, from 32 on level 3; in a Faster "
        "R-CNN one per octave, from 32 on level 2)",
    )
    add_list(
        group,
        "--aspect-ratios",
        positive_float,
        metavar="R",
        help="height / width of the anchors (default: 0.5 1 2)",
    )
    group = parser.add_argument_group("RetinaNet and FCOS", argument_default=argparse.SUPPRESS)
    group.add_argument("--head-depth", type=natural_int, metavar="N", help="convolutions of each head (default: 4)")
    group = parser.add_argument_group("RetinaNet", argument_default=argparse.SUPPRESS)
    group.add_argument("--head-norm", metavar="NAME", help="normalisation in the heads: none or group (default: none)")
    group.add_argument("--box-loss", metavar="NAME", help="l1, smooth_l1, giou, diou or ciou (default: l1)")


def _min_size(sizes: tuple[int, ...]) -> tuple[int, ...] | None:
    """Return the field `min_size` of a configuration for the values of --min-size."""
    if sizes == (0,):
        return None
    if not sizes or 0 in sizes:
        raise ValueError(f"expected sizes above 0, or 0 alone, got {' '.join(map(str, sizes))}")
    return sizes


def _lr(text: str) -> float | None:
    """Parse --lr as the field `lr` of `TrainOptions`."""
    return None if text == "auto" else positive_float(text)


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("recipe", argument_default=argparse.SUPPRESS)
    group.add_argument("--epochs", type=positive_int, metavar="N", help="passes over the training images (default: 12)")
    group.add_argument(
        "--batch-size",
        type=positive_int,
        metavar="N",
        help="images per step, those of all processes together (default: 2)",
    )
    group.add_argument(
        "--accumulate",
        type=positive_int,
        metavar="N",
        help="compute each step in N parts, which saves memory; the result is the same, except with trained batch "
        "normalisation and in a Faster R-CNN, which draws other samples (default: 1)",
    )
    group.add_argument("--optimizer", metavar="NAME", help="sgd or adamw (default: sgd)")
    group.add_argument(
        "--lr",
        type=_lr,
        metavar="X",
        help="learning rate, or auto for 0.01 * batch size / 16 with sgd and 0.0001 with adamw (default: auto)",
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
    group.add_argument(
        "--class-weights",
        dest="class_weights_from",
        metavar="FILE",
        default=None,
        help="weights of the classes in the class loss: a JSON object of weights by class name, or `auto`, which "
        "favours rare classes (default: 1 for all)",
    )
    group.add_argument(
        "--patience",
        type=positive_int,
        metavar="N",
        help="stop when the best AP is N evaluations old (default: none)",
    )
    group.add_argument(
        "--log", metavar="NAME", help="none, or tensorboard for curves in RUN_DIR/tensorboard (default: none)"
    )
    group.add_argument("--precision", metavar="NAME", help="fp32, or bf16 or fp16 for autocast (default: fp32)")
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
    add_list(
        group,
        "--scale",
        positive_float,
        convert=_range,
        metavar=("LOW", "HIGH"),
        help="range of random scaling (default: 1 1)",
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


def _range(values: tuple[float, ...]) -> tuple[float, ...]:
    if len(values) != 2:
        raise ValueError(f"expected two numbers, the smallest and the largest, got {len(values)}")
    return values
