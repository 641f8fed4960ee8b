"""The forms of annotations: which one a path leads to, and its reader."""

from __future__ import annotations

import os
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

from retinanet.common.errors import DataError
from retinanet.data.coco import read_coco
from retinanet.data.csv_table import read_csv
from retinanet.data.problems import Problems
from retinanet.data.records import Source
from retinanet.data.voc import read_voc
from retinanet.data.yolo import read_yolo, yolo_splits

if TYPE_CHECKING:
    from retinanet.data.opening import ReadOptions


class Form(Enum):
    """A form of annotations."""

    COCO = "COCO json"
    VOC = "Pascal VOC xml"
    YOLO = "YOLO data.yaml"
    CSV = "CSV table"

    @property
    def lists_classes(self) -> bool:
        """Whether the annotations list the classes and their order, also those without boxes."""
        return self in (Form.COCO, Form.YOLO)


_SUFFIXES = {
    ".xml": Form.VOC,
    ".txt": Form.VOC,
    ".yaml": Form.YOLO,
    ".yml": Form.YOLO,
    ".csv": Form.CSV,
    ".tsv": Form.CSV,
}


def form_of(path: str | Path) -> Form:
    """Return the form of the annotations that a path leads to, judged by its suffix or, for a folder, by its files."""
    path = Path(path)
    if os.path.isdir(path):
        return Form.YOLO if _data_yaml(path) else Form.VOC
    return _SUFFIXES.get(path.suffix.lower(), Form.COCO)


def read_source(path: Path, images_dir: Path | None, options: ReadOptions, problems: Problems) -> Source:
    """Return the entries of a data set of any form.

    Raises:
        DataError: Nothing can be read.
    """
    if images_dir is not None and not os.path.isdir(images_dir):
        raise DataError(f"{images_dir}: expected a folder of images, got no folder of this name")
    form = form_of(path)
    if form is Form.VOC:
        return read_voc(path, images_dir, problems, options.class_names, one_based=options.voc_one_based)
    if form is Form.YOLO:
        return read_yolo(_data_yaml(path) or path, images_dir, problems, options.split)
    if form is Form.CSV:
        return read_csv(path, images_dir or path.parent, problems, options.class_names, options.csv_columns)
    return read_coco(path, images_dir or path.parent, problems)


def _data_yaml(folder: Path) -> Path | None:
    """Return the data.yaml in a folder, or None."""
    names = ("data.yaml", "data.yml", "dataset.yaml")
    return next((folder / name for name in names if os.path.isfile(folder / name)), None)


def parts_of(path: str | Path) -> list[str | None]:
    """Return the parts of a data set: those of a YOLO data set by name, or None for the whole of any other.

    Raises:
        DataError: The data.yaml cannot be read.
    """
    path = Path(path)
    if form_of(path) is not Form.YOLO:
        return [None]
    return list(yolo_splits(_data_yaml(path) or path)) or [None]
