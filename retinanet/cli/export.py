"""The command `retinanet export`: it writes a model as one file for other engines and languages."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retinanet.cli.arguments import (
    READING,
    add_data,
    add_device,
    check_overwrites,
    open_data,
    output_file,
    positive_int,
    use_device,
)
from retinanet.cli.console import progress_bar
from retinanet.common.errors import ConfigError, DataError, UsageError
from retinanet.common.export_options import POSTPROCESSING, SUFFIXES

if TYPE_CHECKING:
    from retinanet.data import DetectionDataset
    from retinanet.export.verify import Verification

HELP = "write a model as one file for other engines: torch.export, ONNX or AOTInductor"
DESCRIPTION = (
    "Write a model as one file that runs without this package's Python code, with normalisation and post-processing "
    "inside. Its inputs are `images` [N, 3, H, W], float32 RGB in 0..1, resized and padded, and `sizes` [N, 2], the "
    "height and width of each image without its padding. Its outputs are `boxes` [N, D, 4], `scores` [N, D], `labels` "
    "[N, D] and `count` [N]."
)

DYNAMIC = "dynamic"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `retinanet export`."""
    parser.add_argument("model", metavar="MODEL", help="model file, such as RUN_DIR/best.safetensors")
    parser.add_argument("output", metavar="OUT", help="file to write: *.pt2 for pt2 and aoti, *.onnx for onnx")
    parser.add_argument(
        "--format",
        choices=tuple(SUFFIXES),
        help="pt2: torch.export; onnx: ONNX, opset 18; aoti: a package compiled by AOTInductor, which needs a C++ "
        "compiler (default: onnx for *.onnx, pt2 for *.pt2)",
    )
    parser.add_argument(
        "--size",
        nargs="+",
        default=[DYNAMIC],
        metavar="H W",
        help="height and width of the input, or dynamic for any multiples of the stride of the coarsest level "
        "(default: dynamic; an SSD has one size)",
    )
    parser.add_argument(
        "--batch", type=_batch, metavar="N", help="images of the input, or dynamic for any number (default: dynamic)"
    )
    parser.add_argument(
        "--postprocess",
        choices=POSTPROCESSING,
        default=POSTPROCESSING[0],
        help="nms: detections in fixed slots; raw: the outputs of the heads, for engines without NMS (default: nms)",
    )
    parser.add_argument(
        "--half",
        action="store_true",
        help="compute the network in half precision; inputs, outputs and post-processing stay float32",
    )
    parser.add_argument(
        "--verify",
        nargs="+",
        metavar="IMAGES",
        help="compare the file with the model on pictures, folders of pictures, or annotations as `retinanet "
        "evaluate` takes them; with annotations, print both average precisions. The exit code is 3 if they disagree, "
        "or if the model detects nothing, so that nothing is compared",
    )
    add_data(parser, "val")
    add_device(parser, default="cpu")


def run(args: argparse.Namespace) -> int:
    """Export the model, and compare the file with it if --verify is given."""
    from retinanet.checkpoints.model_file import load_model
    from retinanet.export import export_model

    output = output_file(args.output)
    check_overwrites(output, [args.model])
    size = _size(args.size)
    if args.verify is None:
        _refuse_data_options(args, "no --verify")
    images = None
    try:
        model = load_model(args.model, use_device(args))
        if args.verify is not None:
            # Wrong images are reported before the export, which may take minutes.
            images = _images(args, model.config.class_names)
        metadata = export_model(
            model,
            output,
            format=args.format,
            size=size,
            batch=args.batch,
            postprocess=args.postprocess,
            half=args.half,
        )
    except ConfigError as error:
        raise UsageError(f"--{error}") from error
    inputs = "any size" if metadata.size is None else f"{metadata.size[0]} x {metadata.size[1]} pixels"
    number = "any number of images" if metadata.batch is None else f"{metadata.batch} images"
    print(f"{output}: written; takes {number} of {inputs}, returns {', '.join(metadata.outputs)}")
    if images is None:
        return 0
    from retinanet.export.exporting import check_format
    from retinanet.export.runners import omitted_engines
    from retinanet.export.verify import verify_export

    checked = verify_export(
        model, output, images, format=args.format, progress=progress_bar("verifying", "batch", delay=2)
    )
    for verification in checked:
        _print(verification)
    for engine, reason in omitted_engines(check_format(output, args.format), metadata).items():
        print(f"{engine}: not compared, because {reason}")
    if not all(verification.compared for verification in checked):
        raise DataError(
            f"{output}: not verified, because the model detects nothing in the images of --verify; use images with "
            "objects of its classes"
        )
    wrong = [verification.engine for verification in checked if not verification.agrees]
    if wrong:
        raise DataError(f"{output}: {' and '.join(wrong)} and the model disagree by more than the tolerance")
    return 0


def _print(found: Verification) -> None:
    limit = found.tolerance
    detections = "" if found.outputs else f", {found.detections} detections by the model"
    print(f"{found.engine}: {found.images} images{detections}")
    if not found.compared:
        print("  NOT VERIFIED, because there is nothing to compare")
        return
    for name, value in found.outputs.items():
        print(f"  {name}: largest difference {value:.1e} of the largest value (allowed: {limit.outputs:.0e})")
    if not found.outputs:
        share = f" and {limit.share:.0%} of the box" if limit.share else ""
        print(f"  boxes: largest difference {found.boxes:.1e} pixels (allowed: {limit.boxes:g}{share})")
        print(f"  scores: largest difference {found.scores:.1e} (allowed: {limit.scores:g})")
        print(f"  labels: {found.unpaired} detections that only one has (allowed: {limit.unpaired:.0%})")
        print(f"  counts: different in {found.counts} images")
    if found.ap is not None:
        print(
            "  AP: " + ", ".join(f"{v:.4f} by the {name}" for v, name in zip(found.ap, ("model", "file"), strict=True))
        )
    print(f"  {'the file and the model agree' if found.agrees else 'THE FILE AND THE MODEL DISAGREE'}")


def _batch(text: str) -> int | None:
    if text == DYNAMIC:
        return None
    try:
        return positive_int(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, or {DYNAMIC}, got {text!r}") from None


def _size(values: Sequence[str]) -> tuple[int, int] | None:
    """Return the height and width that --size gives, or None for `dynamic`.

    Raises:
        UsageError: It gives something else.
    """
    if list(values) == [DYNAMIC]:
        return None
    if len(values) == 2 and all(value.isdecimal() for value in values):
        return int(values[0]), int(values[1])
    raise UsageError(f"--size: expected a height and a width, or {DYNAMIC}, got {' '.join(values)}")


def _refuse_data_options(args: argparse.Namespace, got: str) -> None:
    """Raise UsageError if an option of a data set is given, although --verify leads to none."""
    for name in ("images", "split", *READING):
        if getattr(args, name) is not None:
            raise UsageError(
                f"--{name.replace('_', '-')}: expected only if --verify names annotations, got {got}; leave it out"
            )


def _images(args: argparse.Namespace, class_names: Sequence[str]) -> DetectionDataset | list[Path]:
    """Return the data set or the pictures that --verify names.

    Raises:
        UsageError: An option of a data set is given with pictures.
        DataError: A picture cannot be found, or anything is wrong with the data set.
    """
    from retinanet.data import find_annotations
    from retinanet.detection.evaluate import dataset_labels
    from retinanet.detection.inputs import find_inputs, is_video

    if len(args.verify) == 1 and _has_annotations(Path(args.verify[0])):
        options: dict[str, Any] = {}
        if not find_annotations(args.verify[0]).form.lists_classes:
            options["class_names"] = class_names
        dataset = open_data(args, args.verify[0], "val", **options)
        dataset_labels(class_names, dataset)
        return dataset
    _refuse_data_options(args, "pictures")
    inputs = find_inputs(args.verify)
    videos = [f"{path}: expected a picture, got a video" for path in inputs.files if is_video(path)]
    if inputs.problems or videos:
        raise DataError("\n".join([*inputs.problems, *videos]))
    return inputs.files


def _has_annotations(path: Path) -> bool:
    """Return whether a path leads to annotations rather than to pictures.

    Raises:
        DataError: A folder has several annotations that could be meant.
    """
    from retinanet.data import find_annotations
    from retinanet.data.forms import NoAnnotationsError
    from retinanet.data.images import IMAGE_SUFFIXES

    if not path.is_dir():
        return path.exists() and path.suffix.lower() not in IMAGE_SUFFIXES
    try:
        find_annotations(path)
    except NoAnnotationsError:
        return False
    return True
