"""The command `retinanet detect`: it detects objects in pictures and videos, and writes annotated copies and tables."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from retinanet.cli.arguments import add_device, add_views, natural_int, positive_int, share, use_device
from retinanet.cli.console import progress_bar, step_bar
from retinanet.common.errors import DataError, UsageError, printable
from retinanet.common.files import check_output_folder
from retinanet.common.memory import is_out_of_memory
from retinanet.detection.table_formats import FORMATS

if TYPE_CHECKING:
    from retinanet.detection.files import FileDetector
    from retinanet.detection.inputs import Inputs
    from retinanet.model.detector import Detector

HELP = "detect objects in pictures and videos"
DESCRIPTION = (
    "Detect objects in pictures and videos, and write annotated copies and tables. A file that cannot be read is "
    "reported and skipped, and the exit code is then 3."
)

DEFAULT_FORMATS = ("csv", "coco")
DEFAULT_SCORE = 0.3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `retinanet detect`."""
    parser.add_argument("images", metavar="FILE", nargs="+", help="pictures, videos, or folders of these")
    parser.add_argument("--model", required=True, metavar="MODEL", help="model file, such as RUN_DIR/best.safetensors")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the results, created if missing")
    parser.add_argument("--recursive", action="store_true", help="enter the sub-folders of a folder")
    parser.add_argument(
        "--score",
        type=share,
        metavar="S",
        help="keep detections with a score above this (default: the threshold with the best F1 on the validation set, "
        f"from the model file; {DEFAULT_SCORE} if the file has none)",
    )
    parser.add_argument(
        "--format",
        type=_formats,
        nargs="+",
        default=[DEFAULT_FORMATS],
        metavar="NAME",
        help=f"tables to write: {', '.join(FORMATS)} (default: {' '.join(DEFAULT_FORMATS)})",
    )
    parser.add_argument("--no-pictures", action="store_true", help="write the tables only, no annotated copies")
    parser.add_argument(
        "--every", type=positive_int, default=1, metavar="N", help="of a video, take every N-th frame (default: 1)"
    )
    parser.add_argument(
        "--tile",
        type=positive_int,
        metavar="SIZE",
        help="cut larger pictures into tiles of SIZE x SIZE pixels and merge their detections (default: no tiles)",
    )
    parser.add_argument(
        "--overlap",
        type=natural_int,
        metavar="PIXELS",
        help="overlap of neighbouring tiles, which should exceed the largest object (default: a quarter of the tile)",
    )
    add_views(parser)
    add_device(parser)


def run(args: argparse.Namespace) -> int:
    """Detect in every file, and write the annotated copies and the tables."""
    from retinanet.checkpoints.model_file import load_model
    from retinanet.detection.files import FileDetector
    from retinanet.detection.inputs import find_inputs, is_video

    if args.overlap is not None and (args.tile is None or args.overlap >= args.tile):
        tile = "no --tile" if args.tile is None else f"--tile {args.tile}"
        raise UsageError(f"--overlap: expected less than --tile, got --overlap {args.overlap} and {tile}")
    folder = Path(args.output)
    check_output_folder(folder)
    inputs = find_inputs(args.images, recursive=args.recursive, excluded=folder)
    if not args.no_pictures:
        _check_apart(folder, inputs)
    model = load_model(args.model, use_device(args))
    score, origin = _score_threshold(args.score, model, args.model)
    for note in inputs.notes:
        _write_line(f"note: {note}", sys.stderr)
    for problem in inputs.problems:
        _report(problem)
    if inputs.files:
        print(f"score threshold {score:.4g}: {origin}")
    detector = FileDetector(
        model,
        folder,
        tuple(dict.fromkeys(name for names in args.format for name in names)),
        score,
        tile=args.tile,
        overlap=args.overlap,
        views=args.views,
        every=args.every,
        copies=not args.no_pictures,
        videos=any(map(is_video, inputs.files)),
        steps=step_bar,
    )
    done = _detect(detector, inputs.files)
    return 0 if done == len(inputs.files) and not inputs.problems else DataError.exit_code


def _detect(detector: FileDetector, files: list[Path]) -> int:
    """Detect in each file, print a line for each, and return the number of files without an error."""
    from retinanet.detection.files import counted

    done = 0
    try:
        for path in progress_bar("detecting", "file")(files):
            try:
                found = detector.detect(path)
            except DataError as error:
                _report(str(error))
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                _report(f"{printable(str(path))}: out of memory: choose --tile, or a smaller one")
            else:
                _write_line(f"{printable(str(path))}: {found}")
                done += 1
    finally:
        # After Ctrl-C, the tables hold what was found so far.
        detector.close()
        if detector.tables is not None:
            names = ", ".join((*(() if not detector.copies else ("annotated copies",)), *detector.tables.names))
            found = counted(detector.tables.count, "detection")
            print(f"{printable(str(detector.folder))}: {found}; {names}")
    return done


def _formats(text: str) -> tuple[str, ...]:
    names = tuple(name for name in text.lower().split(",") if name)
    unknown = [name for name in names if name not in FORMATS]
    if unknown or not names:
        raise argparse.ArgumentTypeError(f"expected one or more of {', '.join(FORMATS)}, got {text!r}")
    return names


def _check_apart(folder: Path, inputs: Inputs) -> None:
    """Raise UsageError if annotated copies would be written among the inputs."""
    from retinanet.detection.inputs import same_folder

    for source in dict.fromkeys([*inputs.folders, *(path.parent for path in inputs.files)]):
        if same_folder(source, folder):
            raise UsageError(
                f"--output {folder}: expected another folder than that of the inputs, because the next run would take "
                "the annotated copies for inputs; choose another folder, or --no-pictures"
            )


def _score_threshold(given: float | None, model: Detector, path: str) -> tuple[float, str]:
    """Return the score threshold and where it comes from. The model itself drops no detection above it."""
    if given is not None:
        if given < model.config.score_threshold:
            model.config = dataclasses.replace(model.config, score_threshold=given)
        return given, "from --score"
    if model.score_threshold is not None:
        return model.score_threshold, f"the best F1 on the validation set, from {path}"
    return DEFAULT_SCORE, f"the default, because {path} holds no threshold"


def _report(problem: str) -> None:
    for line in problem.splitlines():
        _write_line(f"retinanet: error: {line}", sys.stderr)


def _write_line(text: str, file: object = None) -> None:
    from tqdm import tqdm

    tqdm.write(text, file=sys.stdout if file is None else file)
