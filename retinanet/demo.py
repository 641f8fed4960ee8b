"""The demonstration: `python -m retinanet.demo --seed 0` trains a detector of trees and shows its detections.

It fetches the sample, trains MobileNetV2 with a small pyramid, evaluates on the held-out photograph and on other sites,
and writes a folder with the numbers, the loss curve and annotated pictures. It uses the functions of the command line.
The number of steps is fixed, so the result depends only on the seed and the machine's arithmetic. A second run with the
same output continues an interrupted training, or repeats the evaluation of a complete one.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import retinanet_ops as ops
from retinanet.checkpoints.model_file import load_model
from retinanet.cli.arguments import CommandParser, natural_int, positive_int
from retinanet.cli.console import print_stats
from retinanet.cli.errors import report_errors
from retinanet.common.devices import resolve_device
from retinanet.common.errors import RetinaNetError
from retinanet.common.files import output_folder, replacing, write_json
from retinanet.data import DetectionDataset, TrainTransform, open_dataset
from retinanet.data.tree_sample import TILE, TreeSample, fetch_trees
from retinanet.detection.coco_input import CocoInput
from retinanet.detection.coco_numbers import STAT_MEANINGS
from retinanet.detection.drawing import draw_comparison, save_curve
from retinanet.detection.evaluate import evaluate
from retinanet.detection.image_errors import match_image
from retinanet.detection.picture_format import save_picture
from retinanet.detection.score_curves import score_curves
from retinanet.detection.tiled import ImageDetections, detect_image
from retinanet.model.config import RetinaNetConfig
from retinanet.model.detector import Detector
from retinanet.model.network import RetinaNet
from retinanet.training.options import TrainOptions
from retinanet.training.run import train

EPOCHS = 40
VIEWS = 4  # Includes upside-down views, because pictures from above have no upright position.
_RATIOS = (("precision", "precision"), ("recall", "recall"), ("F1", "f1"))
LOWEST_AP50 = 0.45  # A working training reaches this AP50 on the validation tiles with any seed.


@dataclass(frozen=True)
class _Picture:
    """A picture with a ground truth, on which detections are drawn and counted."""

    key: str
    annotations: Path
    title: str


def tree_config(dataset: DetectionDataset) -> RetinaNetConfig:
    """Return the configuration of a small network for trees of 8 to 108 pixels in photographs that are not resized."""
    return RetinaNetConfig(
        class_names=dataset.class_names,
        category_ids=dataset.category_ids,
        backbone="mobilenet_v2",
        backbone_norm="eval",
        trainable_backbone_layers=None,
        fpn_levels=(3, 4, 5),
        fpn_channels=128,
        head_depth=2,
        head_norm="group",
        head_norm_groups=16,
        anchor_sizes=((20, 25, 32), (40, 51, 64), (81, 102, 128)),
        aspect_ratios=(1.0,),
        box_loss="l1",
        loss_normaliser="batch",
        min_size=None,
        # Crowns seen from above lie side by side: no two boxes of the training photograph have an IoU of 0.1 or more.
        nms_threshold=0.3,
    )


def tree_options(seed: int, epochs: int = EPOCHS) -> TrainOptions:
    """Return the recipe; it is short because the hand-drawn boxes are loose, and longer training overfits to them."""
    return TrainOptions(
        epochs=epochs,
        batch_size=2,
        optimizer="adamw",
        lr=1e-3,
        weight_decay=1e-4,
        backbone_lr_factor=0.2,
        schedule="cosine",
        warmup_steps=100,
        # With a single training photograph, weights vary from step to step; an average of a few hundred is stable.
        ema_decay=0.998,
        evaluate_every=max(1, epochs // 4),
        best_metric="AP50",
        seed=seed,
        transform=TrainTransform(
            vertical_flip=0.5,
            quarter_turns=True,
            # Equals the side of the validation tiles after padding.
            crop=416,
            # Half of the training photograph has hardly any trees.
            crop_on_object=0.8,
            brightness=0.4,
            contrast=0.4,
            saturation=0.4,
            hue=0.05,
        ),
    )


def demo(sample_dir: Path, output: Path, seed: int, epochs: int = EPOCHS) -> dict[str, Any]:
    """Fetch the sample, train, evaluate and draw.

    Args:
        sample_dir: Folder of the sample, which is created if missing.
        output: Folder for everything else.
        seed: Seed of the training.
        epochs: Passes over the 30 training tiles.

    Returns:
        The content of `metrics.json`.

    Raises:
        RetinaNetError: A step failed, or the validation AP50 is lower than a working training gives.
    """
    sample = fetch_trees(sample_dir)
    print(f"sample: {sample.root}{' (already there, verified)' if sample.cached else ''}")
    train_set, val_set = open_dataset(sample.train), open_dataset(sample.val)
    run_dir = output_folder(output / "run")
    options = tree_options(seed, epochs)
    device = resolve_device(options.device)
    print(f"training on {train_set.summary()}; {_hardware(device)}")
    torch.manual_seed(seed)
    model: Detector = RetinaNet(tree_config(train_set), sample.weights)
    resume = (run_dir / "last.pt").exists()
    train(model, train_set, val_set, options, run_dir, resume=resume)

    # Evaluate the last model, because the best one was chosen on the very pictures that the report evaluates.
    model = load_model(run_dir / "last.safetensors", device)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    passes = [line for line in lines if line["kind"] == "epoch"]
    record: dict[str, Any] = {
        "seed": seed,
        "epochs": epochs,
        "steps": passes[-1]["step"],
        "crops": f"{options.batch_size} crops of {options.transform.crop} pixels",
        "training_seconds": round(sum(line["seconds"] for line in passes), 1),
        "environment": _environment(device),
        "evaluations": {
            "validation tiles": evaluate(model, val_set, views=VIEWS).stats,
            "validation tiles, one view": evaluate(model, val_set).stats,
            "other site (OSBS)": evaluate(model, open_dataset(sample.cross_site), views=VIEWS).stats,
        },
        "pictures": _draw_and_count(_pictures(sample), model, output),
    }
    _save_loss_curve(output / "loss.png", passes, seed)
    write_json(output / "metrics.json", record)
    with replacing(output / "report.md") as temporary:
        temporary.write_text(report(record), encoding="utf-8")
    for name, stats in record["evaluations"].items():
        print(f"{name}:")
        print_stats(stats)
    for picture in record["pictures"].values():
        print(_counted(picture))
    ap50 = record["evaluations"]["validation tiles"]["AP50"]
    if epochs >= EPOCHS and ap50 < LOWEST_AP50:
        raise RetinaNetError(
            f"{output}: the training failed: expected a validation AP50 of at least {LOWEST_AP50}, got {ap50:.3f}"
        )
    return record


def _pictures(sample: TreeSample) -> list[_Picture]:
    return [
        _Picture("validation_photograph", sample.val_photo, "held-out photograph of the training site, whole"),
        _Picture("other_site", sample.cross_site, "another site (OSBS)"),
        _Picture("third_site", sample.two_class, "a third site (SOAP), living and dead trees taken together"),
    ]


def _draw_and_count(pictures: Sequence[_Picture], model: Detector, output: Path) -> dict[str, dict[str, Any]]:
    """Detect in each picture, in tiles of the validation size; draw and count the detections.

    The score threshold of a picture is the one with the best F1 on the other pictures, as it would be for a photograph
    without drawn boxes.
    """
    loaded = [open_dataset(picture.annotations).load(0) for picture in pictures]
    found = [detect_image(model, image, tile=TILE, views=VIEWS) for image, _ in loaded]
    truths = [target["boxes"] for _, target in loaded]
    records = {}
    for index, (picture, (image, _)) in enumerate(zip(pictures, loaded, strict=True)):
        others = [other for other in range(len(pictures)) if other != index]
        curve = score_curves(CocoInput.of_one_class([truths[i] for i in others], [found[i] for i in others])).overall
        threshold = curve.best_threshold() or 0.0
        kept = found[index].scores > threshold
        boxes, scores = found[index].boxes[kept], found[index].scores[kept]
        labels = found[index].labels[kept]
        content = CocoInput.of_one_class([truths[index]], [ImageDetections(boxes, scores, labels)])
        drawn = draw_comparison(image, boxes, scores, truths[index], (match_image(content, 0).correct > 0).tolist())
        path = output / f"{picture.key}.png"
        save_picture(drawn, path)
        counts = score_curves(content).overall.at(threshold).to_dict()
        sizes = {"drawn": len(truths[index]), "detected": len(boxes)}
        records[picture.key] = {"title": picture.title, "file": path.name, **sizes, **counts}
    return records


def _save_loss_curve(path: Path, passes: list[dict[str, Any]], seed: int) -> None:
    epochs = [line["epoch"] for line in passes]
    names = {"loss": "sum", "classification": "classification (focal)", "bbox_regression": "boxes (L1)"}
    curves = {label: (epochs, [line[key] for line in passes]) for key, label in names.items()}
    save_curve(path, curves, x_label="epoch", y_label="training loss", title=f"Tree crowns, seed {seed}")


def report(record: dict[str, Any]) -> str:
    """Return the numbers as a page of Markdown."""
    environment = record["environment"]
    evaluations = record["evaluations"]
    minutes = record["training_seconds"] / 60
    lines = [
        "# Tree crowns in aerial photographs",
        "",
        f"Seed {record['seed']}, {record['epochs']} epochs ({record['steps']} steps of {record['crops']}),"
        f" {minutes:.1f} minutes of training.",
        "",
        "| " + " | ".join(["number", *evaluations, "meaning"]) + " |",
        "|---" * (len(evaluations) + 2) + "|",
    ]
    for name, meaning in STAT_MEANINGS.items():
        values = ["n/a" if stats[name] < 0 else f"{stats[name]:.3f}" for stats in evaluations.values()]
        lines.append("| " + " | ".join([name, *values, meaning]) + " |")
    lines += [
        "",
        "Detections in whole photographs. The score threshold of a photograph is the one with the best F1 on the other"
        " two. A detection is correct if it matches a box of the ground truth, at IoU 0.5 or more, that no better one"
        " matches:",
        "",
    ]
    for picture in record["pictures"].values():
        lines += [f"- {_counted(picture)}: [{picture['file']}]({picture['file']})"]
    lines += [
        "",
        "White boxes are drawn by hand, green boxes are matched detections, and red boxes are unmatched detections.",
        "",
        "![training loss](loss.png)",
        "",
        f"How to read this: the detections of {VIEWS} mirrored views of each picture were merged (`--views`), except"
        " where the column says otherwise. The model is that of the last step, and was not chosen by these numbers."
        " The recipe, however, was chosen on the same validation tiles, so the other site is a better test for new"
        " pictures. The validation tiles come from one photograph of the training site, and each other site is one"
        " picture: single numbers vary by several hundredths from seed to seed. `n/a` means that no object has this"
        " size.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in environment.items()),
        "",
    ]
    return "\n".join(lines)


def _counted(picture: dict[str, Any]) -> str:
    shown = (f"{name} {'undefined' if picture[key] is None else f'{picture[key]:.2f}'}" for name, key in _RATIOS)
    return (
        f"{picture['title']}: {picture['detected']} detections with a score above {picture['threshold']:.2f} for"
        f" {picture['drawn']} trees ({picture['detected'] / picture['drawn'] - 1:+.0%}),"
        f" {picture['true_positives']} of them correct ({', '.join(shown)})"
    )


def _hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{model}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def _environment(device: torch.device) -> dict[str, str]:
    info = ops.build_info()
    return {
        "hardware": _hardware(device),
        "system": platform.platform(),
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": version("torchvision"),
        "retinanet-ops": ops.__version__,
        "kernels": json.dumps(info, default=str),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demonstration, print where the results are, and return the exit code."""
    parser = CommandParser(
        prog="python -m retinanet.demo", description="Train a detector of tree crowns and show the result."
    )
    parser.add_argument("--seed", type=natural_int, default=0, metavar="N", help="seed of the training (default: 0)")
    parser.add_argument("--output", metavar="DIR", help="folder for the results (default: demo/seed-N)")
    parser.add_argument(
        "--sample",
        default="demo/trees",
        metavar="DIR",
        help="folder of the sample, fetched if missing (default: demo/trees)",
    )
    parser.add_argument(
        "--epochs",
        type=positive_int,
        default=EPOCHS,
        metavar="N",
        help=f"passes over the training tiles (default: {EPOCHS})",
    )
    args = parser.parse_args(argv)

    def work() -> int:
        output = output_folder(args.output or f"demo/seed-{args.seed}")
        record = demo(Path(args.sample), output, args.seed, args.epochs)
        pictures = ", ".join(picture["file"] for picture in record["pictures"].values())
        print(f"\nThe results are in {output.resolve()}:\n  report.md, metrics.json, loss.png, {pictures}, run/")
        return 0

    return report_errors(work)


if __name__ == "__main__":
    sys.exit(main())
