"""Pascal VOC: a folder of xml files, one for each image.

VOC counts pixels from 1 and includes both corners, so `(xmin - 1, ymin - 1, xmax, ymax)` is the box in continuous
pixels. Objects marked `difficult` become crowd boxes, which neither training nor evaluation counts for or against.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from retinanet.common.errors import DataError, listed
from retinanet.data.images import IMAGE_SUFFIXES
from retinanet.data.problems import Problems
from retinanet.data.records import Box, Source, are_finite

_CORNERS = ("xmin", "ymin", "xmax", "ymax")


def read_voc(
    folder: Path, images_dir: Path, class_names: Sequence[str] | None = None, *, one_based: bool = True
) -> Source:
    """Read every `*.xml` of a folder, in the order of their names; `retinanet.data.records` checks the entries.

    Args:
        folder: The folder of the xml files.
        images_dir: The folder of the images. The image is the file that the xml's `filename` names or, where that does
            not exist, an image with the name of the xml file.
        class_names: The classes in the order of their labels. None takes those that occur, sorted.
        one_based: False for files whose boxes are already 0-based corners.

    Returns:
        The entries, with category ids 1..K and image ids 1..N.

    Raises:
        DataError: The folder has no xml file, a file cannot be parsed, or an object has no name, no box, or a class
            that is not in `class_names`.
    """
    paths = sorted(folder.glob("*.xml"))
    if not paths:
        raise DataError(f"{folder}: expected Pascal VOC annotations, got a folder without xml files")
    problems = Problems(folder)
    images: list[dict[str, Any]] = []
    objects: list[dict[str, Any]] = []
    for image_id, path in enumerate(paths, start=1):
        root = _parse(path, problems)
        if root is None:
            continue
        images.append({"id": image_id, "file_name": _image_name(root, path, images_dir), "xml": path, **_size(root)})
        for number, node in enumerate(root.iter("object"), start=1):
            where = f"{path}: object {number}"
            name = (node.findtext("name") or "").strip()
            corners = _corners(node, where, problems)
            if not name:
                problems.add(where, "expected a class in <name>, got nothing")
            elif class_names is not None and name not in class_names:
                problems.add(where, f"expected a class among {listed(class_names)}, got {name!r}")
            elif corners is not None:
                difficult = (node.findtext("difficult") or "0").strip() == "1"
                entry = {"id": len(objects) + 1, "image_id": image_id, "name": name, "where": where}
                objects.append(entry | {"corners": corners, "iscrowd": int(difficult)})
    problems.raise_if_any()
    names = list(class_names) if class_names is not None else sorted({entry["name"] for entry in objects})
    if not names:
        raise DataError(f"{folder}: expected at least one object in the xml files, got none")
    number_of = {name: number for number, name in enumerate(names, start=1)}
    for entry in objects:
        entry["category_id"] = number_of[entry["name"]]
    return Source(
        path=folder,
        images=images,
        annotations=objects,
        categories=[{"id": number, "name": name} for name, number in number_of.items()],
        name_image=lambda entry: str(entry["xml"]),
        name_annotation=lambda entry: entry["where"],
        read_box=lambda entry: _read_box(entry["corners"], 1.0 if one_based else 0.0),
    )


def _parse(path: Path, problems: Problems) -> ElementTree.Element | None:
    try:
        root = ElementTree.parse(path).getroot()
    except ElementTree.ParseError as error:
        problems.add(f"{path}: line {error.position[0]}", f"not well-formed xml ({error})")
    except OSError as error:
        problems.add(str(path), f"cannot be read ({error.strerror})")
    else:
        if root.tag == "annotation":
            return root
        problems.add(str(path), f"the root element must be <annotation>, got <{root.tag}>")
    return None


def _image_name(root: ElementTree.Element, path: Path, images_dir: Path) -> str:
    # Tools for Windows write backslashes, and some write whole paths of another machine: only the last part is used.
    stated = (root.findtext("filename") or "").strip().replace("\\", "/").rsplit("/", 1)[-1]
    if stated and (images_dir / stated).is_file():
        return stated
    for suffix in IMAGE_SUFFIXES:
        for name in (path.stem + suffix, path.stem + suffix.upper()):
            if (images_dir / name).is_file():
                return name
    return stated or path.stem + ".jpg"


def _size(root: ElementTree.Element) -> dict[str, int]:
    # Many tools write 0 or nothing; the size is then read from the image.
    sides = {side: (root.findtext(f"size/{side}") or "").strip() for side in ("width", "height")}
    return {side: int(text) for side, text in sides.items() if text.isdigit() and int(text) > 0}


def _corners(node: ElementTree.Element, where: str, problems: Problems) -> list[float] | None:
    """Return the four numbers of an object's `bndbox`; if they are no box, add a problem and return None."""
    texts = [node.findtext(f"bndbox/{corner}") for corner in _CORNERS]
    try:
        corners = [float(text) for text in texts if text is not None]
    except ValueError:
        corners = []
    if len(corners) != 4:
        stated = ", ".join(f"{corner} {text}" for corner, text in zip(_CORNERS, texts, strict=True))
        problems.add(where, f"bndbox must have four numbers {', '.join(_CORNERS)}, got {stated}")
        return None
    if all(map(math.isfinite, corners)) and (corners[2] < corners[0] or corners[3] < corners[1]):
        problems.add(where, f"{_text(corners)} is inverted")
        return None
    return corners


def _read_box(corners: list[float], shift: float) -> tuple[Box, str]:
    """Return the corners of an object as a box, and their text for messages.

    Raises:
        ValueError: A corner is not finite, or the box has no area.
    """
    text = _text(corners)
    if not are_finite(corners):
        raise ValueError(f"{text} has a coordinate that is not finite")
    box = corners[0] - shift, corners[1] - shift, corners[2], corners[3]
    if box[2] <= box[0] or box[3] <= box[1]:
        raise ValueError(f"{text} has width or height <= 0")
    return box, text


def _text(corners: list[float]) -> str:
    return f"bndbox ({' '.join(_CORNERS)}) {' '.join(f'{value:g}' for value in corners)}"
