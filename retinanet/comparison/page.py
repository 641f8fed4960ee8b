"""The page of a comparison: Markdown with a table, curves and pictures, and the same numbers as JSON."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined

from retinanet.common.files import output_folder, replacing, write_json
from retinanet.comparison.plots import curves_svg
from retinanet.comparison.results import ModelResult, conclusions, table
from retinanet.data import DetectionDataset
from retinanet.detection.coco_input import CocoInput
from retinanet.detection.detection_table import DetectionTable
from retinanet.detection.image_errors import match_image
from retinanet.detection.report_pictures import model_pictures

#: File names inside the folder of a comparison.
PAGE, NUMBERS, CURVES, PICTURES = "comparison.md", "comparison.json", "curves.svg", "pictures"
_PICTURES = 4
_SIDE = 360


@dataclass(frozen=True)
class Setting:
    """What all models of a comparison share.

    Attributes:
        command: The command of the comparison.
        train: Source and summary of the training data.
        val: Source and summary of the validation data.
        epochs: Passes over the training images.
        batch_size: Images in a step.
        steps: Steps of a run.
        seeds: Seeds of the runs.
        machine: Device, CPU threads, and version of PyTorch.
    """

    command: str
    train: str
    val: str
    epochs: int
    batch_size: int
    steps: int
    seeds: Sequence[int]
    machine: str


@dataclass(frozen=True)
class Shown:
    """The detections of a model that the pictures show.

    Attributes:
        detections: Detections in the validation data.
        threshold: Score threshold of the detections that are drawn.
    """

    detections: DetectionTable
    threshold: float


def write_comparison(
    folder: Path,
    setting: Setting,
    models: Sequence[ModelResult],
    differences: Sequence[tuple[str, list[str]]],
    dataset: DetectionDataset,
    shown: Sequence[Shown],
) -> Path:
    """Write `comparison.md`, `comparison.json`, `curves.svg` and `pictures/` into a folder.

    Args:
        folder: The folder.
        setting: What the models share.
        models: The results of each model.
        differences: Options in which the recipes differ, each with its value in every recipe.
        dataset: The validation data.
        shown: The detections of each model that the pictures show.

    Returns:
        The path of the page.
    """
    write_json(folder / NUMBERS, {**vars(setting), "models": [model.to_dict() for model in models]})
    with replacing(folder / CURVES) as temporary:
        temporary.write_text(curves_svg(models), encoding="utf-8")
    page = _template().render(
        setting=setting,
        models=models,
        rows=table(models),
        conclusions=conclusions(models),
        differences=differences,
        curves=CURVES,
        pictures=_write_pictures(output_folder(folder / PICTURES), [m.title for m in models], dataset, shown),
    )
    path = folder / PAGE
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def _write_pictures(
    folder: Path, titles: Sequence[str], dataset: DetectionDataset, shown: Sequence[Shown]
) -> list[dict[str, Any]]:
    """Write the pictures of a few images with objects, evenly spaced in the data, and return their places and names."""
    contents = [CocoInput.from_coco(dataset.coco, s.detections).above(s.threshold) for s in shown]
    order = contents[0].image_ids
    with_objects = sorted({int(image) for image in contents[0].objects.images})
    chosen = np.linspace(0, len(with_objects) - 1, min(_PICTURES, len(with_objects))).round().astype(int)
    position = {identity: index for index, identity in enumerate(dataset.image_ids)}
    pictures = []
    for number, choice in enumerate(chosen, 1):
        image = with_objects[choice]
        index = position[order[image]]
        matches = [match_image(content, image) for content in contents]
        picture = model_pictures(dataset.load(index)[0], matches, titles, contents[0].class_names, _SIDE)
        path = folder / f"{number}.jpg"
        with replacing(path) as temporary:
            temporary.write_bytes(picture)
        pictures.append({"place": f"{PICTURES}/{path.name}", "name": dataset.paths[index].name})
    return pictures


def _template() -> Any:
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False)
    environment.filters["text"] = lambda text: re.sub(r"([\\`*_|<\[])", r"\\\1", str(text))
    return environment.from_string((files(__package__) / "comparison_template.md").read_text(encoding="utf-8"))
