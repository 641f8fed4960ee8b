"""The command `retinanet detect`: it detects objects in pictures and writes annotated pictures and tables."""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retinanet.cli.arguments import add_device, add_views, natural_int, positive_int, share, use_device
from retinanet.cli.console import progress_bar
from retinanet.common.errors import DataError, UsageError
from retinanet.common.files import output_folder, replacing, write_json

if TYPE_CHECKING:
    from torch import Tensor

    from retinanet.detection.tiled import ImageDetections
    from retinanet.model.config import RetinaNetConfig
    from retinanet.model.network import RetinaNet

HELP = "detect objects in pictures"
DESCRIPTION = (
    "Detect objects in pictures and write annotated copies, detections.json (COCO results with file and class names) "
    "and detections.csv. A picture that cannot be read is reported and skipped, and the exit code is then 3."
)

CSV_HEADER = ("file_name", "x1", "y1", "x2", "y2", "score", "label", "class_name")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `retinanet detect`."""
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="pictures, or folders of pictures")
    parser.add_argument("--model", required=True, metavar="MODEL", help="model file, such as RUN_DIR/best.safetensors")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the results, created if missing")
    parser.add_argument(
        "--score", type=share, default=0.3, metavar="S", help="keep detections with a score above this (default: 0.3)"
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
    """Detect in every picture, and write the annotated pictures and the tables."""
    from retinanet.checkpoints.model_file import load_model
    from retinanet.detection.drawing import draw_detections, save_picture
    from retinanet.detection.tiled import detect_image

    if args.overlap is not None and (args.tile is None or args.overlap >= args.tile):
        tile = "no --tile" if args.tile is None else f"--tile {args.tile}"
        raise UsageError(f"--overlap: expected less than --tile, got --overlap {args.overlap} and {tile}")
    model = load_model(args.model, use_device(args))
    paths, problems = _pictures(args.images)
    folder = output_folder(args.output)
    for problem in problems:
        _report(problem)
    results: list[dict[str, Any]] = []
    rows: list[tuple[Any, ...]] = []
    names = _annotated_names(paths)
    done = 0
    for number, path in enumerate(progress_bar("detecting", "image")(paths), start=1):
        try:
            image = _read(path, model, args.tile)
        except DataError as error:
            _report(str(error))
            continue
        detections = detect_image(
            model, image, tile=args.tile, overlap=args.overlap, score_threshold=args.score, views=args.views
        )
        results += detection_results(detections, number, path, model.config)
        rows += detection_rows(detections, path, model.config)
        annotated = draw_detections(
            image, detections.boxes, detections.scores, detections.labels, model.config.class_names
        )
        save_picture(annotated, folder / names[path])
        _write_line(f"{path}: {len(detections.scores)} detections")
        done += 1
    if done:
        _write_tables(folder, results, rows)
        print(f"{folder}: {len(results)} detections; pictures, detections.json, detections.csv")
    return 0 if done == len(paths) and not problems else DataError.exit_code


def _read(path: Path, model: RetinaNet, tile: int | None) -> Tensor:  # [3, H, W] uint8
    """Read a picture.

    Raises:
        DataError: The picture cannot be read, or resizing it or its tiles for the model would leave a side of less than
            one pixel.
    """
    from retinanet.data import read_image

    # Even a large orthophoto is read whole, because the tiles are cut from it in memory.
    image = read_image(path, max_pixels=None)
    height, width = (min(side, tile or side) for side in image.shape[-2:])
    if model.transform.vanishes(height, width):
        raise DataError(
            f"{path}: size: {width} x {height} pixels are too elongated: resizing to the model's max_size "
            f"{model.config.max_size} leaves less than one pixel; crop the picture or choose smaller tiles (--tile)"
        )
    return image


def detection_results(
    detections: ImageDetections, image_id: int, path: Path, config: RetinaNetConfig
) -> list[dict[str, Any]]:
    """Return COCO results with the names of the file and of the class added."""
    columns = zip(detections.boxes.tolist(), detections.scores.tolist(), detections.labels.tolist(), strict=True)
    return [
        {
            "image_id": image_id,
            "file_name": str(path),
            "category_id": config.category_ids[label],
            "category_name": config.class_names[label],
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "score": score,
        }
        for (x1, y1, x2, y2), score, label in columns
    ]


def detection_rows(detections: ImageDetections, path: Path, config: RetinaNetConfig) -> list[tuple[Any, ...]]:
    """Return one row with the columns of `CSV_HEADER` for each detection."""
    columns = zip(detections.boxes.tolist(), detections.scores.tolist(), detections.labels.tolist(), strict=True)
    return [
        (str(path), *(f"{value:.2f}" for value in box), f"{score:.4f}", label, config.class_names[label])
        for box, score, label in columns
    ]


def _write_tables(folder: Path, results: list[dict[str, Any]], rows: list[tuple[Any, ...]]) -> None:
    write_json(folder / "detections.json", results)
    with replacing(folder / "detections.csv") as temporary:
        with temporary.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([CSV_HEADER, *rows])


def _pictures(arguments: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Return the pictures, including those in folders, and a message for each folder without pictures."""
    from retinanet.data.images import IMAGE_SUFFIXES

    paths: list[Path] = []
    problems: list[str] = []
    for text in arguments:
        path = Path(text)
        if not path.is_dir():
            paths.append(path)
            continue
        inside = sorted(entry for entry in path.iterdir() if entry.suffix.lower() in IMAGE_SUFFIXES)
        paths += inside
        if not inside:
            problems.append(f"{path}: expected pictures in this folder ({', '.join(IMAGE_SUFFIXES)}), got none")
    return list(dict.fromkeys(paths)), problems


def _annotated_names(paths: list[Path]) -> dict[Path, str]:
    """Return a unique file name for the annotated copy of each picture."""
    names: dict[Path, str] = {}
    taken: set[str] = set()
    for path in paths:
        name, number = f"{path.stem}_detections.png", 1
        while name in taken:
            number += 1
            name = f"{path.stem}_detections_{number}.png"
        taken.add(name)
        names[path] = name
    return names


def _report(problem: str) -> None:
    from tqdm import tqdm

    tqdm.write(f"retinanet: error: {problem}", file=sys.stderr)


def _write_line(text: str) -> None:
    from tqdm import tqdm

    tqdm.write(text, file=sys.stdout)
