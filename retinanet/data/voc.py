"""Pascal VOC: a folder of xml files, one an image, read into COCO content.

VOC counts pixels from 1 and includes both corners, so `(xmin - 1, ymin - 1, xmax, ymax)` is the continuous
box. Objects marked `difficult` become crowd boxes: neither training nor evaluation counts them for or
against.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from retinanet.common.errors import DataError
from retinanet.data.coco import Source
from retinanet.data.images import IMAGE_SUFFIXES
from retinanet.data.problems import Problems

_CORNERS = ("xmin", "ymin", "xmax", "ymax")


def read_voc(
    folder: Path, images_dir: Path, class_names: Sequence[str] | None = None, *, one_based: bool = True
) -> Source:
    """Reads every `*.xml` of a folder, in the order of their names.

    Args:
        folder: Where the xml files are.
        images_dir: Where the images are. The xml's `filename` counts; where no such file exists, an image
            with the xml's own name does.
        class_names: The classes in the order of their labels. None takes those that occur, sorted.
        one_based: False for files whose boxes are already 0-based corners.

    Returns:
        COCO content with category ids 1..K and image ids 1..N.

    Raises:
        DataError: there is no xml, one cannot be parsed, or has an object without name or box, or of a class
            that `class_names` has not.
    """
    paths = sorted(folder.glob("*.xml"))
    if not paths:
        raise DataError(f"{folder}: no xml file in this folder, expected Pascal VOC annotations")
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
            box = _box(node, where, problems)
            if not name:
                problems.add(where, "has no name")
            elif class_names is not None and name not in class_names:
                problems.add(where, f"class {name!r} is none of the known classes ({', '.join(class_names)})")
            elif box is not None:
                shift = 1.0 if one_based else 0.0
                x1, y1, x2, y2 = box[0] - shift, box[1] - shift, box[2], box[3]
                difficult = (node.findtext("difficult") or "0").strip() == "1"
                entry = {"id": len(objects) + 1, "image_id": image_id, "name": name, "where": where}
                objects.append(entry | {"bbox": [x1, y1, x2 - x1, y2 - y1], "iscrowd": int(difficult)})
    problems.raise_if_any()
    names = list(class_names) if class_names is not None else sorted({entry["name"] for entry in objects})
    if not names:
        raise DataError(f"{folder}: no xml file in this folder has an object")
    number_of = {name: number for number, name in enumerate(names, start=1)}
    for entry in objects:
        entry["category_id"] = number_of[entry["name"]]
    content = {
        "images": images,
        "annotations": objects,
        "categories": [{"id": number, "name": name} for name, number in number_of.items()],
    }
    return Source(folder, content, lambda entry: str(entry["xml"]), lambda entry: entry["where"])


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
    # Windows tools write backslashes, some write whole paths of another machine: the last part is what
    # counts.
    stated = (root.findtext("filename") or "").strip().replace("\\", "/").rsplit("/", 1)[-1]
    if stated and (images_dir / stated).is_file():
        return stated
    for suffix in IMAGE_SUFFIXES:
        for name in (path.stem + suffix, path.stem + suffix.upper()):
            if (images_dir / name).is_file():
                return name
    return stated or path.stem + ".jpg"


def _size(root: ElementTree.Element) -> dict[str, int]:
    # Many tools write 0 or nothing here; then the image itself says it.
    sides = {side: (root.findtext(f"size/{side}") or "").strip() for side in ("width", "height")}
    return {side: int(text) for side, text in sides.items() if text.isdigit() and int(text) > 0}


def _box(node: ElementTree.Element, where: str, problems: Problems) -> list[float] | None:
    texts = [node.findtext(f"bndbox/{corner}") for corner in _CORNERS]
    try:
        box = [float(text) for text in texts if text is not None]
    except ValueError:
        box = []
    if len(box) != 4:
        found = ", ".join(f"{corner} {text}" for corner, text in zip(_CORNERS, texts, strict=True))
        problems.add(where, f"bndbox must have four numbers {', '.join(_CORNERS)}, got {found}")
        return None
    if all(math.isfinite(value) for value in box) and (box[2] < box[0] or box[3] < box[1]):
        corners = " ".join(f"{value:g}" for value in box)
        problems.add(where, f"box (xmin ymin xmax ymax) {corners} is inverted")
        return None
    return box
