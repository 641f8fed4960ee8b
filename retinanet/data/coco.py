"""COCO json: reading, and the checks that every data set passes before training starts.

Boxes in the file are `[x, y, width, height]` in pixels from the top left corner of the image. An image's box
may overhang its image by at most one pixel on each side (annotation tools round) and is clipped; a box that
overhangs further, or lies outside altogether, is an error.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from retinanet.common.errors import DataError
from retinanet.data.problems import Problems

MAX_OVERHANG = 1.0
_HUGE = 1e30  # float32 boxes; also catches NaN and integers that no float holds
_TABLES = ("images", "annotations", "categories")


@dataclass
class ImageRecord:
    """One image of a data set and its boxes (float, absolute xyxy pixels)."""

    image_id: int
    path: Path
    where: str
    height: int | None = None
    width: int | None = None
    boxes: list[tuple[float, float, float, float]] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    crowd_boxes: list[tuple[float, float, float, float]] = field(default_factory=list)


@dataclass
class Source:
    """COCO content together with the words that name its entries in error messages.

    `name_image` and `name_annotation` turn an entry into "file: entry".
    """

    path: Path
    content: dict[str, Any]
    name_image: Callable[[dict[str, Any]], str]
    name_annotation: Callable[[dict[str, Any]], str]


def read_json(path: Path) -> Any:
    """Reads a json file.

    Raises:
        DataError: it is missing, a folder, not permitted, or not json.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not json (it is not UTF-8 text)") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: line {error.lineno}: not json ({error.msg})") from error


def read_coco(path: Path) -> Source:
    """Reads a COCO json file; its entries are checked later, by `collect_records`.

    Raises:
        DataError: the file cannot be read, or lacks `images`, `annotations` or `categories`.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected a json object with {', '.join(_TABLES)}, got {_kind(content)}")
    for table in _TABLES:
        if table not in content:
            raise DataError(f"{path}: has no `{table}`; a COCO json has {', '.join(_TABLES)}")
        if not isinstance(content[table], list):
            raise DataError(f"{path}: `{table}`: expected a list, got {_kind(content[table])}")
        for index, entry in enumerate(content[table]):
            if not isinstance(entry, dict):
                raise DataError(f"{path}: {table}[{index}]: expected an object, got {_kind(entry)}")

    def name_image(entry: dict[str, Any]) -> str:
        return f"{path}: image {entry.get('id')} ({entry.get('file_name')})"

    def name_annotation(entry: dict[str, Any]) -> str:
        if "id" in entry:
            return f"{path}: annotation {entry['id']}"
        return f"{path}: annotation without id on image {entry.get('image_id')}"

    return Source(path, content, name_image, name_annotation)


def collect_categories(source: Source, problems: Problems) -> dict[int, str]:
    """Category ids and names in ascending order of id; the position is the label."""
    names: dict[int, str] = {}
    for index, entry in enumerate(source.content["categories"]):
        where = f"{source.path}: categories[{index}]"
        identity, name = entry.get("id"), entry.get("name")
        if not _is_int(identity):
            problems.add(where, f"id must be an integer, got {identity!r}")
        elif not isinstance(name, str):
            problems.add(where, f"name must be a string, got {name!r}")
        elif identity in names:
            problems.add(where, f"category id {identity} is already used by {names[identity]!r}")
        elif name in names.values():
            problems.add(where, f"category name {name!r} is already used by another id than {identity}")
        else:
            names[identity] = name
    if not source.content["categories"]:
        problems.add(f"{source.path}: categories", "there are none, expected at least one")
    return dict(sorted(names.items()))


def collect_images(source: Source, images_dir: Path, problems: Problems) -> dict[int, ImageRecord]:
    """Image records by id, without boxes yet."""
    records: dict[int, ImageRecord] = {}
    for entry in source.content["images"]:
        where = source.name_image(entry)
        identity, file_name = entry.get("id"), entry.get("file_name")
        if not _is_int(identity):
            problems.add(where, f"image id must be an integer, got {identity!r}")
        elif not isinstance(file_name, str) or not file_name:
            problems.add(where, f"file_name must be a string, got {file_name!r}")
        elif identity in records:
            problems.add(where, f"image id {identity} is already used by {records[identity].path.name}")
        else:
            record = ImageRecord(identity, images_dir / file_name, where)
            record.height, record.width = entry.get("height"), entry.get("width")
            records[identity] = record
    if not source.content["images"]:
        problems.add(f"{source.path}: images", "there are none, expected at least one")
    return records


def check_sizes(
    source: Source,
    records: dict[int, ImageRecord],
    size_of: Callable[[Path], tuple[int, int]],
    problems: Problems,
) -> None:
    """Opens every image for its size, and compares that with what the annotations say, if they do."""
    for record in records.values():
        try:
            height, width = size_of(record.path)
        except DataError as error:
            problems.add(record.where, str(error))
            continue
        stated = (record.width, record.height)
        if all(_is_int(side) and side for side in stated) and stated != (width, height):
            problems.add(
                record.where,
                f"the annotations say {stated[0]} x {stated[1]} pixels, {record.path} is {width} x {height}"
                " (width x height, EXIF orientation applied)",
            )
        record.height, record.width = height, width


def collect_boxes(
    source: Source, records: dict[int, ImageRecord], categories: dict[int, str], problems: Problems
) -> list[dict[str, Any]]:
    """Puts every annotation into its image's record.

    Returns:
        The clean annotations, numbered from 1: pycocotools takes the annotation id 0 for "unmatched".
    """
    label_of = {identity: label for label, identity in enumerate(categories)}
    seen: set[Any] = set()
    clean: list[dict[str, Any]] = []
    for entry in source.content["annotations"]:
        where = source.name_annotation(entry)
        identity, category, image_id = entry.get("id"), entry.get("category_id"), entry.get("image_id")
        if "id" in entry:
            if not _is_int(identity):
                problems.add(where, f"annotation id must be an integer, got {identity!r}")
                continue
            if identity in seen:
                problems.add(where, f"annotation id {identity} is used more than once")
                continue
            seen.add(identity)
        if not _is_int(image_id) or image_id not in records:
            problems.add(where, f"image_id {image_id!r} is not the id of any image")
            continue
        if not _is_int(category) or category not in label_of:
            problems.add(where, f"category_id {category!r} is not the id of any category")
            continue
        if entry.get("iscrowd", 0) not in (0, 1):
            problems.add(where, f"iscrowd must be 0 or 1, got {entry['iscrowd']!r}")
            continue
        record = records[image_id]
        try:
            box = _checked_box(entry.get("bbox"), record)
        except ValueError as error:
            problems.add(where, str(error))
            continue
        crowd = bool(entry.get("iscrowd", 0))
        if crowd:
            record.crowd_boxes.append(box)
        else:
            record.boxes.append(box)
            record.labels.append(label_of[category])
        width, height = box[2] - box[0], box[3] - box[1]
        area = entry.get("area")
        clean.append(
            {
                "id": len(clean) + 1,
                "image_id": image_id,
                "category_id": category,
                "bbox": [box[0], box[1], width, height],
                "area": area if _is_number(area) and area > 0 else width * height,
                "iscrowd": int(crowd),
            }
        )
    return clean


def _checked_box(bbox: Any, record: ImageRecord) -> tuple[float, float, float, float]:
    """`[x, y, width, height]` of the file to xyxy inside the image; ValueError says what is wrong with it."""
    if not isinstance(bbox, list) or len(bbox) != 4 or not all(_is_number(value) for value in bbox):
        raise ValueError(f"bbox must be four numbers [x, y, width, height], got {bbox!r}")
    if not all(-_HUGE < value < _HUGE for value in bbox):
        raise ValueError(f"bbox {bbox} has a coordinate that is not finite")
    x, y, width, height = (float(value) for value in bbox)
    if width <= 0 or height <= 0:
        raise ValueError(f"bbox {_text(bbox)} has width or height <= 0, expected [x, y, width, height]")
    x2, y2 = x + width, y + height
    if not isinstance(record.width, int) or not isinstance(record.height, int):
        return x, y, x2, y2  # the image cannot be read and is reported itself
    overhang = max(-x, -y, x2 - record.width, y2 - record.height)
    clipped = max(x, 0.0), max(y, 0.0), min(x2, float(record.width)), min(y2, float(record.height))
    if clipped[2] <= clipped[0] or clipped[3] <= clipped[1]:
        raise ValueError(f"bbox {_text(bbox)} lies outside its image of {record.width} x {record.height} pixels")
    if overhang > MAX_OVERHANG:
        raise ValueError(
            f"bbox {_text(bbox)} reaches {overhang:g} pixels out of its image of"
            f" {record.width} x {record.height} pixels (up to {MAX_OVERHANG:g} is clipped)"
        )
    return clipped


def _text(bbox: list[Any]) -> str:
    return "[" + ", ".join(f"{value:g}" for value in bbox) + "]"


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _kind(value: Any) -> str:
    names: tuple[tuple[type, str], ...] = ((list, "a list"), (dict, "an object"), (str, "a string"))
    for kind, name in names:
        if isinstance(value, kind):
            return name
    return "null" if value is None else repr(value)
