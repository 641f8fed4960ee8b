"""Records of a data set, and the checks that every data set passes before training starts.

A box is xyxy in absolute continuous pixels. Annotation tools round, so a box that overhangs its image by at most one
pixel is clipped. A box that overhangs further, or lies outside its image, is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from retinanet.common.errors import DataError
from retinanet.data.problems import Problems

#: Pixels by which a box may overhang its image.
MAX_OVERHANG = 1.0
#: Bound on the magnitude of coordinates, which float32 can hold. It also excludes NaN, and integers that are too large
#: for a float.
_HUGE = 1e30

Box = tuple[float, float, float, float]


@dataclass
class ImageRecord:
    """One image of a data set.

    Attributes:
        image_id: Id in the source.
        path: File.
        where: "file: entry" for messages.
        height: Height in pixels after the EXIF orientation. Until `check_sizes`, it is the value in the source, if any.
        width: Width, in the same way.
    """

    image_id: int
    path: Path
    where: str
    height: int | None = None
    width: int | None = None


class BoxRecord(NamedTuple):
    """One box of a data set.

    Attributes:
        image_id: Id of its image.
        label: Position of its class in the list of classes, counted from 0.
        box: xyxy, inside the image.
        area: Area of the object in square pixels: what the source states, else that of the box.
        crowd: Whether the box surrounds a crowd, which counts neither for nor against a detector.
    """

    image_id: int
    label: int
    box: Box
    area: float
    crowd: bool


@dataclass
class Source:
    """Entries of a data set as its files state them, and the functions that interpret an entry.

    Attributes:
        path: The annotation file or folder.
        images: Entries with `id`, `file_name` and, perhaps, `width` and `height`.
        annotations: Entries with `image_id`, `category_id` and, perhaps, `id`, `area` and `iscrowd`, and with a box
            in the form that `read_box` understands.
        categories: Entries with `id` and `name`.
        name_image: Returns the "file: entry" of an image.
        name_annotation: Returns the "file: entry" of an annotation.
        read_box: Returns the xyxy box of an annotation and its text for messages. Raises ValueError, with the reason,
            if there is no valid box.
    """

    path: Path
    images: list[dict[str, Any]]
    annotations: list[dict[str, Any]]
    categories: list[dict[str, Any]]
    name_image: Callable[[dict[str, Any]], str]
    name_annotation: Callable[[dict[str, Any]], str]
    read_box: Callable[[dict[str, Any]], tuple[Box, str]]


def collect_categories(source: Source, problems: Problems) -> dict[int, str]:
    """Return names by category id, in ascending order of id; the position is the label."""
    names: dict[int, str] = {}
    for index, entry in enumerate(source.categories):
        where = f"{source.path}: categories[{index}]"
        identity, name = entry.get("id"), entry.get("name")
        if not _is_int(identity):
            problems.add(where, f"id must be an integer, got {identity!r}")
        elif not isinstance(name, str):
            problems.add(where, f"name must be a string, got {name!r}")
        elif identity in names:
            problems.add(where, f"category id {identity} is already used by {names[identity]!r}")
        elif name in names.values():
            problems.add(where, f"category name {name!r} of id {identity} is already used by another id")
        else:
            names[identity] = name
    if not source.categories:
        problems.add(f"{source.path}: categories", "expected at least one, got none")
    return dict(sorted(names.items()))


def collect_images(source: Source, images_dir: Path, problems: Problems) -> dict[int, ImageRecord]:
    """Return the images by id, with the sizes that the source states."""
    records: dict[int, ImageRecord] = {}
    for entry in source.images:
        where = source.name_image(entry)
        identity, file_name = entry.get("id"), entry.get("file_name")
        if not _is_int(identity):
            problems.add(where, f"image id must be an integer, got {identity!r}")
        elif not isinstance(file_name, str) or not file_name:
            problems.add(where, f"file_name must be a string, got {file_name!r}")
        elif identity in records:
            problems.add(where, f"image id {identity} is already used by {records[identity].path.name}")
        else:
            path = images_dir / file_name
            records[identity] = ImageRecord(identity, path, where, entry.get("height"), entry.get("width"))
    if not source.images:
        problems.add(f"{source.path}: images", "expected at least one, got none")
    return records


def check_sizes(
    records: dict[int, ImageRecord], size_of: Callable[[Path], tuple[int, int]], problems: Problems
) -> None:
    """Set every record's size to that of its file, and compare it with the size that the source states, if any.

    Args:
        records: The images by id.
        size_of: Returns height and width of a file. Raises DataError for a file that is no image.
        problems: Receives a line for each file that is no image or has another size.
    """
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
) -> list[BoxRecord]:
    """Return the boxes that are free of problems, in the order of the source."""
    label_of = {identity: label for label, identity in enumerate(categories)}
    seen: set[int] = set()
    boxes: list[BoxRecord] = []
    for entry in source.annotations:
        image_id, category, crowd = entry.get("image_id"), entry.get("category_id"), entry.get("iscrowd", 0)
        try:
            _check_id(entry, seen)
            if not _is_int(image_id) or image_id not in records:
                raise ValueError(f"image_id {image_id!r} is not the id of any image")
            if not _is_int(category) or category not in label_of:
                raise ValueError(f"category_id {category!r} is not the id of any category")
            if crowd not in (0, 1):
                raise ValueError(f"iscrowd must be 0 or 1, got {crowd!r}")
            box = _clipped(*source.read_box(entry), records[image_id])
        except ValueError as error:
            problems.add(source.name_annotation(entry), str(error))
            continue
        area = entry.get("area")
        if not (is_number(area) and area > 0):
            area = (box[2] - box[0]) * (box[3] - box[1])
        boxes.append(BoxRecord(image_id, label_of[category], box, area, bool(crowd)))
    return boxes


def _check_id(entry: dict[str, Any], seen: set[int]) -> None:
    """Add an annotation's id to `seen`; raise ValueError if it is not an integer or is in `seen` already."""
    if "id" not in entry:
        return
    identity = entry["id"]
    if not _is_int(identity):
        raise ValueError(f"annotation id must be an integer, got {identity!r}")
    if identity in seen:
        raise ValueError(f"annotation id {identity} is used more than once")
    seen.add(identity)


def _clipped(box: Box, text: str, record: ImageRecord) -> Box:
    """Return a box clipped to its image.

    Raises:
        ValueError: The box lies outside the image, or overhangs it by more than `MAX_OVERHANG`.
    """
    if not isinstance(record.width, int) or not isinstance(record.height, int):
        return box  # The size is unknown, because the image cannot be read, which is reported separately.
    x1, y1, x2, y2 = box
    overhang = max(-x1, -y1, x2 - record.width, y2 - record.height)
    clipped = max(x1, 0.0), max(y1, 0.0), min(x2, float(record.width)), min(y2, float(record.height))
    if clipped[2] <= clipped[0] or clipped[3] <= clipped[1]:
        raise ValueError(f"{text} lies outside its image of {record.width} x {record.height} pixels")
    if overhang > MAX_OVERHANG:
        raise ValueError(
            f"{text} reaches {overhang:g} pixels out of its image of {record.width} x {record.height} pixels"
            f" (up to {MAX_OVERHANG:g} is clipped)"
        )
    return clipped


def are_finite(values: Sequence[float]) -> bool:
    """Return whether coordinates are finite and of a magnitude that float32 holds."""
    return all(-_HUGE < value < _HUGE for value in values)


def is_number(value: Any) -> TypeGuard[float]:
    """Return whether a value from a file is an integer or floating-point number."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_int(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)
