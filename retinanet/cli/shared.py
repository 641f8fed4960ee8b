"""What the commands do; `retinanet.cli.main` parses their arguments and reports their errors."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from retinanet.checkpoints.convert import convert_checkpoint
from retinanet.checkpoints.model_file import CheckpointError, load_model, read_model, save_model
from retinanet.checkpoints.transfer import transfer_weights
from retinanet.common.devices import resolve_device
from retinanet.common.errors import DataError, UsageError, listed
from retinanet.common.files import output_folder, replacing, write_json
from retinanet.data import DetectionDataset, TrainTransform, open_dataset, read_image
from retinanet.data.coco import read_json
from retinanet.data.images import IMAGE_SUFFIXES
from retinanet.data.tree_sample import fetch_trees
from retinanet.detection.drawing import draw_detections, save_picture
from retinanet.detection.evaluate import STAT_MEANINGS, EvaluationResult
from retinanet.detection.evaluate import evaluate as evaluate_model
from retinanet.detection.tiled import ImageDetections, detect_image
from retinanet.model.config import CUSTOM, ConfigError, RetinaNetConfig
from retinanet.model.network import RetinaNet
from retinanet.training.options import TrainOptions
from retinanet.training.run import train as train_model

CSV_HEADER = ("file_name", "x1", "y1", "x2", "y2", "score", "label", "class_name")

_MODEL_OPTIONS = (
    "backbone",
    "trainable_backbone_layers",
    "fpn_levels",
    "fpn_channels",
    "head_depth",
    "head_norm",
    "anchor_sizes",
    "aspect_ratios",
    "box_loss",
    "max_size",
    "max_detections",
)
_RECIPE_OPTIONS = (
    "epochs",
    "batch_size",
    "optimizer",
    "lr",
    "backbone_lr_factor",
    "weight_decay",
    "schedule",
    "warmup_steps",
    "clip_norm",
    "ema_decay",
    "precision",
    "seed",
    "evaluate_every",
    "workers",
)


def sample(args: argparse.Namespace) -> int:
    """`retinanet sample trees DEST`."""
    found = fetch_trees(args.dest, args.wheels)
    print(f"{found.root}: {'already there, all files verified' if found.cached else 'fetched and verified'}")
    for path in (found.train, found.val, found.val_photo, found.cross_site, found.two_class):
        content = read_json(path)
        print(f"  {path}: {len(content['images'])} images, {len(content['annotations'])} boxes")
    print(f"  {found.weights}: MobileNetV2, ImageNet")
    print(f"  {found.root / 'ATTRIBUTION.md'}: where it comes from, and the licences")
    return 0


def train(args: argparse.Namespace) -> int:
    """`retinanet train`."""
    set_threads(args.threads)
    _device(args.device)
    run_dir = Path(args.output)
    if run_dir.exists() and not run_dir.is_dir():
        raise UsageError(f"{run_dir}: the output must be a folder, and this is a file")
    stored = _stored_run(run_dir) if args.resume else {}
    train_set = open_dataset(args.train, args.images, progress=_checking())
    val_images = args.val_images or args.images
    val_set = open_dataset(args.val, val_images, class_names=train_set.class_names, progress=_checking())
    config = build_config(args, train_set, stored.get("model", {}))
    options = build_options(args, stored.get("options", {}))
    # The seed decides the weights that training starts from, too. A continued run replaces them by its own.
    torch.manual_seed(options.seed)
    model = RetinaNet(config, None if args.resume else args.backbone_weights)
    if args.weights is not None and not args.resume:
        print(f"{args.weights}: {transfer_weights(args.weights, model)}")
    print(f"{train_set.source}: {describe(train_set)}")
    print(f"{val_set.source}: {describe(val_set)}")
    result = train_model(model, train_set, val_set, options, run_dir, resume=args.resume, progress=tqdm)
    if result.stats is not None:
        print_stats(result.stats)
    best = f"best {options.best_metric} {result.best:.3f} (epoch {result.best_epoch})"
    print(f"{run_dir}: {result.epochs} epochs; {best}")
    return 0


def evaluate(args: argparse.Namespace) -> int:
    """`retinanet evaluate`."""
    set_threads(args.threads)
    output = None if args.output is None else _output_file(args.output)
    model = load_model(args.model, _device(args.device))
    names = model.config.class_names
    folder = Path(args.annotations).is_dir()
    dataset = open_dataset(args.annotations, args.images, class_names=names if folder else None, progress=_checking())
    unknown = [name for name in dataset.class_names if name not in names]
    if unknown:
        raise CheckpointError(
            f"{args.model}: classes: no class {unknown[0]!r} of {args.annotations}; it has {listed(names)}"
        )
    bar = partial(tqdm, desc="evaluating", unit="batch")
    result = evaluate_model(
        model, dataset, batch_size=args.batch_size, workers=args.workers, views=args.views, progress=bar
    )
    print(f"{dataset.source}: {describe(dataset)}; {len(result.detections)} detections by {args.model}")
    print_stats(result.stats)
    if output is not None:
        write_json(output, evaluation_record(args.model, dataset, result, args.views))
        print(f"written: {output}")
    return 0


def detect(args: argparse.Namespace) -> int:
    """`retinanet detect`."""
    set_threads(args.threads)
    if args.overlap is not None and (args.tile is None or args.overlap >= args.tile):
        raise UsageError(f"--overlap {args.overlap}: needs a --tile that is larger, got {args.tile}")
    model = load_model(args.model, _device(args.device))
    images, missing = _expand(args.images)
    folder = output_folder(args.output)
    # The pictures are the user's own; Pillow's guard against huge ones would refuse a large orthophoto.
    Image.MAX_IMAGE_PIXELS = None
    problems = [_report(text) for text in missing]
    results: list[dict[str, Any]] = []
    rows: list[tuple[Any, ...]] = []
    names = _picture_names(images)
    for number, path in enumerate(tqdm(images, desc="detecting", unit="image"), start=1):
        try:
            image = read_image(path)
            if args.tile is None and model.transform.vanishes(image.shape[-2], image.shape[-1]):
                raise DataError(
                    f"{path}: size: nothing is left of {image.shape[-1]} x {image.shape[-2]} pixels, resized"
                )
        except DataError as error:
            problems.append(_report(str(error)))
            continue
        found = detect_image(
            model, image, tile=args.tile, overlap=args.overlap, score_threshold=args.score, views=args.views
        )
        results += detection_results(found, number, path, model.config)
        rows += detection_rows(found, path, model.config)
        picture = draw_detections(image, found.boxes, found.scores, found.labels, model.config.class_names)
        save_picture(picture, folder / names[path])
        tqdm.write(f"{path}: {len(found.scores)} detections", file=sys.stdout)
    if len(problems) < len(images) + len(missing):
        write_json(folder / "detections.json", results)
        with replacing(folder / "detections.csv") as temporary:
            with temporary.open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([CSV_HEADER, *rows])
        print(f"{folder}: {len(results)} detections; pictures, detections.json, detections.csv")
    return DataError.exit_code if problems else 0


def convert(args: argparse.Namespace) -> int:
    """`retinanet convert`."""
    output = _output_file(args.model)
    if output.suffix != ".safetensors":
        raise UsageError(f"{output}: expected a name that ends in .safetensors")
    report_file = None if args.report is None else _output_file(args.report)
    read = [Path(name) for name in (args.source, args.config, args.class_names) if name is not None]
    for written, others in ((output, read), (report_file, [*read, output])):
        if written is not None and any(_same_file(written, other) for other in others):
            raise UsageError(f"{written}: what is written must be another file than what is read, or written before")
    if args.style is not None and args.project not in ("detectron2", "mmdet"):
        raise UsageError(f"--style: only for detectron2 and mmdet, got it for {args.project}")
    fields = None if args.config is None else read_json(Path(args.config))
    if fields is not None and not isinstance(fields, dict):
        raise DataError(f"{args.config}: expected a json object with fields of RetinaNetConfig")
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


def _same_file(path: Path, other: Path) -> bool:
    """Whether both names stand for one file, which need not exist yet."""
    return path.resolve() == other.resolve() or (path.exists() and other.exists() and path.samefile(other))


def build_config(args: argparse.Namespace, train_set: DetectionDataset, stored: dict[str, Any]) -> RetinaNetConfig:
    """The model's configuration: that of a continued run, a model or a file, overridden by the options given.

    Without any weights the backbone learns whole, with ordinary batch normalisation.

    Raises:
        UsageError: a value is wrong.
    """
    fields: dict[str, Any] = {}
    if not stored and args.weights is not None:
        fields = read_model(Path(args.weights))[0].to_dict()
    elif not stored and args.backbone_weights is None:
        fields = {"backbone_norm": "batch", "trainable_backbone_layers": None}
    if args.config is not None:
        content = read_json(Path(args.config))
        if not isinstance(content, dict):
            raise DataError(f"{args.config}: expected a json object with fields of RetinaNetConfig")
        fields |= content
    fields |= stored
    fields |= _given(args, _MODEL_OPTIONS)
    if args.min_size is not None:
        fields["min_size"] = (args.min_size,) if args.min_size else None
    if not stored:
        fields |= {"class_names": train_set.class_names, "category_ids": train_set.category_ids}
    try:
        config = RetinaNetConfig.from_dict(fields)
    except ConfigError as error:
        raise UsageError(f"{args.config or 'model'}: {error}") from error
    if config.backbone == CUSTOM:
        source = args.config or args.weights or "model"
        raise UsageError(f"{source}: backbone: {CUSTOM!r} is a module of the caller's, which no command has")
    return config


def build_options(args: argparse.Namespace, stored: dict[str, Any]) -> TrainOptions:
    """The recipe: that of a continued run, overridden by the options given.

    Raises:
        UsageError: a value is wrong.
    """
    fields = dict(stored)
    change = dict(fields.pop("transform", {})) | _given(
        args, [field.name for field in dataclasses.fields(TrainTransform)]
    )
    if "scale" in change:
        change["scale"] = tuple(change["scale"])
    fields |= _given(args, _RECIPE_OPTIONS)
    if "milestones" in fields:
        fields["milestones"] = tuple(fields["milestones"])
    fields["device"] = args.device
    try:
        return TrainOptions(**fields, transform=TrainTransform(**change))
    except ValueError as error:
        raise UsageError(str(error)) from error


def print_stats(stats: dict[str, float]) -> None:
    """Prints the twelve COCO numbers, one a line."""
    for name, value in stats.items():
        shown = "  n/a" if value < 0 else f"{value:.3f}"
        print(f"  {name:<6} {shown}  {STAT_MEANINGS[name]}{' (there are none)' if value < 0 else ''}")


def describe(dataset: DetectionDataset) -> str:
    """Numbers of images, boxes and classes, in words."""
    annotations = dataset.coco["annotations"]
    empty = len(dataset) - len({entry["image_id"] for entry in annotations})
    text = f"{len(dataset)} images, {len(annotations)} boxes, {len(dataset.class_names)} classes"
    return text + (f", {empty} images without boxes" if empty else "")


def evaluation_record(
    model_path: str | Path, dataset: DetectionDataset, result: EvaluationResult, views: int
) -> dict[str, Any]:
    """What `retinanet evaluate --output` writes; a number that is not defined is -1."""
    return {
        "model": str(model_path),
        "annotations": str(dataset.source),
        "images": len(dataset),
        "boxes": len(dataset.coco["annotations"]),
        "views": views,
        "detections": len(result.detections),
        "stats": result.stats,
    }


def detection_results(
    found: ImageDetections, image_id: int, path: Path, config: RetinaNetConfig
) -> list[dict[str, Any]]:
    """COCO results, with the file's and the class's name added."""
    columns = zip(found.boxes.tolist(), found.scores.tolist(), found.labels.tolist(), strict=True)
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


def detection_rows(found: ImageDetections, path: Path, config: RetinaNetConfig) -> list[tuple[Any, ...]]:
    """Rows under `CSV_HEADER`."""
    columns = zip(found.boxes.tolist(), found.scores.tolist(), found.labels.tolist(), strict=True)
    return [
        (str(path), *(f"{value:.2f}" for value in box), f"{score:.4f}", label, config.class_names[label])
        for box, score, label in columns
    ]


def set_threads(count: int | None) -> None:
    """Sets the number of CPU threads, if one is given."""
    if count is not None:
        torch.set_num_threads(count)


def _device(name: str) -> torch.device:
    try:
        return resolve_device(name)
    except ValueError as error:
        raise UsageError(f"--device: {error}") from error


def _checking() -> Callable[..., Iterable[Any]]:
    return partial(tqdm, desc="checking images", unit="image", delay=2)


def _given(args: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    return {name: value for name in names if (value := getattr(args, name, None)) is not None}


def _stored_run(run_dir: Path) -> dict[str, Any]:
    path = run_dir / "config.json"
    if not path.is_file():
        raise UsageError(f"{run_dir}: no run to resume: {path.name} is not there")
    content = read_json(path)
    if not isinstance(content, dict) or not {"model", "options"} <= content.keys():
        raise DataError(f"{path}: not the configuration of a run")
    return content


def _output_file(text: str) -> Path:
    path = Path(text)
    if path.is_dir():
        raise UsageError(f"{path}: the output must be a file, this is a folder")
    if not path.parent.is_dir():
        raise UsageError(f"{path}: the folder {path.parent} does not exist")
    return path


def _lines(path: Path) -> list[str]:
    """The lines of a text file that are not blank.

    Raises:
        DataError: There are none, or it is not UTF-8.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: expected text in UTF-8: {error.reason}") from error
    if not lines:
        raise DataError(f"{path}: expected one name a line, got none")
    return lines


def _expand(arguments: Sequence[str]) -> tuple[list[Path], list[str]]:
    """The pictures, folders replaced by the pictures in them; and a message for each folder that has none."""
    images: list[Path] = []
    missing: list[str] = []
    for text in arguments:
        path = Path(text)
        if not path.is_dir():
            images.append(path)
            continue
        inside = sorted(entry for entry in path.iterdir() if entry.suffix.lower() in IMAGE_SUFFIXES)
        images += inside
        if not inside:
            missing.append(f"{path}: no pictures in this folder ({', '.join(IMAGE_SUFFIXES)})")
    return list(dict.fromkeys(images)), missing


def _picture_names(images: list[Path]) -> dict[Path, str]:
    """A file name for each picture's annotated copy; never that of another, nor the picture's own."""
    names: dict[Path, str] = {}
    taken: set[str] = set()
    for path in images:
        name, number = f"{path.stem}_detections.png", 1
        while name in taken:
            number += 1
            name = f"{path.stem}_detections_{number}.png"
        taken.add(name)
        names[path] = name
    return names


def _report(message: str) -> str:
    tqdm.write(f"retinanet: error: {message}", file=sys.stderr)
    return message
