"""The command `retinanet evaluate`: it compares the detections of a model with the ground truth of a data set."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retinanet.cli.arguments import (
    DATA_FORMS,
    add_data,
    add_device,
    add_views,
    natural_int,
    open_data,
    output_file,
    positive_int,
    use_device,
)
from retinanet.cli.console import print_counts, print_stats, progress_bar
from retinanet.common.files import check_output_folder, output_folder, write_json

if TYPE_CHECKING:
    from retinanet.data import DetectionDataset
    from retinanet.detection.evaluate import EvaluationResult
    from retinanet.detection.score_curves import OperatingPoint

HELP = "compare the detections of a model with the ground truth of a data set"
DESCRIPTION = (
    "Compute the twelve COCO numbers (average precision and recall) of a model on a data set, and its precision, "
    "recall and F1 at the score threshold that the model carries and at the best one on this data set."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `retinanet evaluate`."""
    parser.add_argument("model", metavar="MODEL", help="model file, such as RUN_DIR/best.safetensors")
    parser.add_argument("annotations", metavar="ANN", help=DATA_FORMS)
    add_data(parser, "val")
    parser.add_argument("--output", metavar="FILE", help="write the numbers to this file as JSON")
    parser.add_argument(
        "--report",
        metavar="DIR",
        help="write DIR/report.html: numbers, plots and the worst images in one page that loads nothing from elsewhere",
    )
    parser.add_argument(
        "--engine",
        choices=("pycocotools", "hotcoco"),
        default="pycocotools",
        help="library that computes the COCO numbers; both give the same, hotcoco faster (default: pycocotools)",
    )
    parser.add_argument("--batch-size", type=positive_int, default=1, metavar="N", help="images per batch (default: 1)")
    parser.add_argument(
        "--workers", type=natural_int, default=0, metavar="N", help="processes that load images (default: 0)"
    )
    add_views(parser)
    add_device(parser)


def run(args: argparse.Namespace) -> int:
    """Evaluate the model and print the numbers."""
    from retinanet.checkpoints.model_file import load_model
    from retinanet.data import find_annotations
    from retinanet.detection.evaluate import evaluate
    from retinanet.detection.score_curves import operating_points

    output = None if args.output is None else output_file(args.output)
    if args.report is not None:
        check_output_folder(Path(args.report))
    model = load_model(args.model, use_device(args))
    # VOC and CSV annotations do not list the classes, so the labels follow the order of the model's classes.
    class_names = None if find_annotations(args.annotations).form.lists_classes else model.config.class_names
    checking = progress_bar("checking images", "image", delay=2)
    dataset = open_data(args, args.annotations, "val", class_names=class_names, progress=checking)
    result = evaluate(
        model,
        dataset,
        engine=args.engine,
        batch_size=args.batch_size,
        workers=args.workers,
        views=args.views,
        progress=progress_bar("evaluating", "batch"),
    )
    print(f"{dataset.source}: {dataset.summary()}; {len(result.detections)} detections by {args.model}")
    print_stats(result.stats)
    points = operating_points(result.curves, model.score_thresholds, model.config.class_names)
    print("precision, recall and F1 at IoU 0.5:")
    print_counts(points)
    if output is not None:
        write_json(output, evaluation_record(args.model, dataset, result, points, args.views))
        print(f"{output}: written")
    if args.report is not None:
        from retinanet.detection.report import REPORT, write_report

        report = output_folder(args.report) / REPORT
        write_report(report, Path(args.model).name, dataset, result, points)
        print(f"{report}: written")
    return 0


def evaluation_record(
    model_path: str | Path,
    dataset: DetectionDataset,
    result: EvaluationResult,
    points: Sequence[OperatingPoint],
    views: int,
) -> dict[str, Any]:
    """Return the content of the file that --output names; an undefined COCO number is -1, another one is null."""
    return {
        "model": str(model_path),
        "annotations": str(dataset.source),
        "images": len(dataset),
        "boxes": len(dataset.boxes),
        "views": views,
        "detections": len(result.detections),
        "stats": result.stats,
        "operating_points": [{"class": p.name, "chosen_by": p.note, **p.counts.to_dict()} for p in points],
    }
