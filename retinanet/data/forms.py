"""The forms of annotations: which one a path leads to, and its reader."""

from __future__ import annotations

import os
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from retinanet.common.errors import DataError, listed
from retinanet.common.files import unreadable
from retinanet.data.coco import read_coco
from retinanet.data.csv_table import read_csv
from retinanet.data.problems import Problems
from retinanet.data.records import Source
from retinanet.data.voc import is_annotation, read_voc
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


_DATA_FILES = ("data.yaml", "data.yml", "dataset.yaml")
_SUFFIXES = {
    ".xml": Form.VOC,
    ".txt": Form.VOC,
    ".yaml": Form.YOLO,
    ".yml": Form.YOLO,
    ".csv": Form.CSV,
    ".tsv": Form.CSV,
}


class NoAnnotationsError(DataError):
    """A folder holds no annotations of any form."""


class Annotations(NamedTuple):
    """Annotations: the path of their file or folder, and their form."""

    path: Path
    form: Form


def find_annotations(path: str | Path) -> Annotations:
    """Return the annotations that a path leads to: itself, or what is in it.

    The form of a file is that of its suffix. A folder is a YOLO data set if it has a data.yaml, and a folder of VOC
    annotations if it has a folder `Annotations`, or xml files and no json or CSV file. Otherwise, the only json or CSV
    file in it counts.

    Raises:
        NoAnnotationsError: A folder has none of these.
        DataError: A folder has several files that could be meant, or labels of YOLO without a data.yaml.
    """
    path = Path(path)
    if not os.path.isdir(path):
        return Annotations(path, _SUFFIXES.get(path.suffix.lower(), Form.COCO))
    try:
        names = sorted(name for name in os.listdir(path) if not name.startswith("."))
    except OSError as error:
        raise DataError(f"{path}: {unreadable(error)}") from error
    for name in _DATA_FILES:
        if name in names:
            return Annotations(path / name, Form.YOLO)
    files = [path / name for name in names if name.lower().endswith((".json", ".csv", ".tsv"))]
    if os.path.isdir(path / "Annotations"):
        return Annotations(path, Form.VOC)
    if _has_xml(path):
        if files:
            others = listed([file.name for file in files])
            reason = f"expected one form of annotations, got xml files and {others}; name the file to use, or move it"
            raise DataError(f"{path}: {reason} out of the folder to use the xml files")
        return Annotations(path, Form.VOC)
    if len(files) == 1:
        return Annotations(files[0], Form.CSV if files[0].suffix.lower() != ".json" else Form.COCO)
    if files:
        raise DataError(
            f"{path}: expected one file of annotations, got {listed([file.name for file in files])}; name one"
        )
    reason = f"{path}: expected annotations, got a folder without xml, json or CSV files"
    if "labels" in names:
        raise DataError(f"{reason}; YOLO needs a {_DATA_FILES[0]} with the names of the classes")
    raise NoAnnotationsError(reason)


def _has_xml(folder: Path) -> bool:
    """Return whether a folder or one of its sub-folders has an xml file that may be an annotation."""
    for _, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        if any(map(is_annotation, names)):
            return True
    return False


def read_source(path: Path, images_dir: Path | None, options: ReadOptions, problems: Problems) -> Source:
    """Return the entries of a data set of any form.

    Raises:
        DataError: Nothing can be read.
    """
    if images_dir is not None and not os.path.isdir(images_dir):
        raise DataError(f"{images_dir}: expected a folder of images, got no folder of this name")
    path, form = find_annotations(path)
    if form is Form.VOC:
        return read_voc(path, images_dir, problems, options.class_names, one_based=options.voc_one_based)
    if form is Form.YOLO:
        return read_yolo(path, images_dir, problems, options.split)
    if form is Form.CSV:
        return read_csv(path, images_dir or path.parent, problems, options.class_names, options.csv_columns)
    return read_coco(path, images_dir or path.parent, problems)


def parts_of(path: str | Path) -> list[str | None]:
    """Return the parts of a data set: those of a YOLO data set by name, or None for the whole of any other.

    Raises:
        DataError: There are no annotations, or the data.yaml cannot be read.
    """
    file, form = find_annotations(path)
    return list(yolo_splits(file)) or [None] if form is Form.YOLO else [None]
