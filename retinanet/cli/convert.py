"""The command `retinanet convert`: it makes a model file from another project's checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path

from retinanet.cli.arguments import check_overwrites, config_fields, output_file
from retinanet.common.errors import DataError, UsageError
from retinanet.common.files import read_text, write_json

HELP = "convert another project's checkpoint to a model file"
DESCRIPTION = (
    "Convert a RetinaNet with a ResNet backbone from another project. The converted model gives the original's "
    "detections. Every known tensor of the checkpoint is used, or is reported as unused with the reason. An unknown "
    "tensor is an error. No code in the checkpoint is run."
)

# The converter's own lists are not imported, because they need torch, and --help must not wait for it.
PROJECTS = ("torchvision", "detectron2", "mmdet", "yhenon", "odtk")
STYLES = ("caffe", "pytorch")
#: Projects whose models come in both styles.
STYLED_PROJECTS = ("detectron2", "mmdet")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `retinanet convert`."""
    parser.add_argument(
        "source", metavar="IN", help="checkpoint: a file that torch.save wrote, a .pkl of detectron2 or a .safetensors"
    )
    parser.add_argument("model", metavar="OUT", help="model file to write, *.safetensors")
    parser.add_argument(
        "--from", dest="project", required=True, choices=PROJECTS, help="project that wrote the checkpoint"
    )
    parser.add_argument(
        "--classes",
        type=int,
        choices=(80,),
        help="keep only COCO's 80 categories of the 91 classes of torchvision's weights (default: keep all)",
    )
    parser.add_argument("--class-names", metavar="FILE", help="text file with the name of each class, one per line")
    parser.add_argument(
        "--style",
        choices=STYLES,
        help="for detectron2 and mmdet; caffe: BGR images in 0..255 and strides in 1x1 convolutions; pytorch: "
        "normalised RGB images and strides in 3x3 convolutions (default: caffe for detectron2; for mmdet the style in "
        "the checkpoint, else pytorch)",
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="JSON object with the fields of RetinaNetConfig in which the model differs from its project's defaults",
    )
    parser.add_argument(
        "--report",
        metavar="FILE",
        help="JSON file to write: for each tensor of the checkpoint, its name in the model or why it is unused",
    )


def run(args: argparse.Namespace) -> int:
    """Convert the checkpoint, write the model and print a report."""
    from retinanet.checkpoints.convert import convert_checkpoint
    from retinanet.checkpoints.model_file import save_model

    output = output_file(args.model)
    if output.suffix != ".safetensors":
        raise UsageError(f"{output}: expected an output file name that ends in .safetensors")
    report_file = None if args.report is None else output_file(args.report)
    inputs = (args.source, args.config, args.class_names)
    check_overwrites(output, inputs)
    if report_file is not None:
        check_overwrites(report_file, [*inputs, output])
    if args.style is not None and args.project not in STYLED_PROJECTS:
        raise UsageError(
            f"--style: expected only with --from {' or '.join(STYLED_PROJECTS)}, got --from {args.project}"
        )
    fields = config_fields(args.config)
    model, report = convert_checkpoint(
        args.source,
        args.project,
        classes=args.classes,
        class_names=None if args.class_names is None else _lines(Path(args.class_names)),
        style=args.style,
        fields=fields,
    )
    save_model(output, model)
    print(report)
    print(f"{output}: written")
    if report_file is not None:
        write_json(report_file, {"mapped": report.mapped, "unused": report.unused, "notes": report.notes})
        print(f"{report_file}: written")
    return 0


def _lines(path: Path) -> list[str]:
    """Return the lines of a text file that are not blank.

    Raises:
        DataError: All lines are blank, or the file cannot be read.
    """
    lines = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    if not lines:
        raise DataError(f"{path}: expected one class name per line, got only blank lines")
    return lines
