"""Records of a data set, and the checks that every data set passes before training starts.

A box is xyxy in absolute continuous pixels. A box that overhangs its image is clipped, or left out if less than a pixel
of a side remains. Annotation tools round, so a box that is clipped by at most one pixel is not counted.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import numpy as np

from retinanet.common.errors import DataError, printable, shown
from retinanet.data.locate import Found
from retinanet.data.problems import Kind, Problems

#: Pixels by which a box may overhang its image without being counted.
MAX_OVERHANG = 1.0
#: Pixels of each side that must remain of a box that is clipped.
MIN_REMAINDER = 1.0
#: No coordinate is above this if all are shares of width and height, which are 1 at most but for rounding.
_LARGEST_SHARE = 1.01
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
        stated: Width and height as the source states them, if it does.
        height: Height in pixels after the EXIF orientation. It is 0 until `check_sizes`, and stays 0 if the image
            cannot be used.
        width: Width, in the same way.
        searched: As in `Found`.
    """

    image_id: int
    path: Path
    where: str
    stated: tuple[Any, Any] = (None, None)
    height: int = 0
    width: int = 0
    searched: tuple[Path, ...] = ()


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


class ReadBox(NamedTuple):
    """The box of an annotation, as its source states it.

    Attributes:
        box: xyxy in pixels; not yet clipped. Its sides are at least 0.
        text: Returns the box for messages, such as "bbox [5, 5, 0, 5]". It is called for faults only, because making
            the text takes longer than all checks of a box.
        kind: The fault that was mended to get the box, or None.
    """

    box: Box
    text: Callable[[], str]
    kind: Kind | None = None


@dataclass
class Source:
    """Entries of a data set as its files state them, and the functions that interpret an entry.

    Attributes:
        path: The annotation file or folder.
        form: The form of the annotations, in words.
        images: Entries with `id`, `file_name` and, perhaps, `width` and `height`.
        annotations: Entries with `image_id`, `category_id` and, perhaps, `id`, `area` and `iscrowd`, and with a box
            in the form that `read_box` understands.
        categories: Entries with `id` and `name`.
        find_image: Returns the file of an image. Raises ValueError, with the reason, if several files match.
        name_image: Returns the "file: entry" of an image.
        name_annotation: Returns the "file: entry" of an annotation.
        read_box: Returns the box of an annotation in an image. Raises ValueError, with the reason, if there is no valid
            box.
        description: What the source says of itself, such as "composed images"; may be empty.
    """

    path: Path
    form: str
    images: list[dict[str, Any]]
    annotations: list[dict[str, Any]]
    categories: list[dict[str, Any]]
    find_image: Callable[[dict[str, Any]], Found]
    name_image: Callable[[dict[str, Any]], str]
    name_annotation: Callable[[dict[str, Any]], str]
    read_box: Callable[[dict[str, Any], ImageRecord], ReadBox]
    description: str = ""


def collect_categories(source: Source, problems: Problems) -> dict[int, str]:
    """Return names by category id, in ascending order of id; the position is the label."""
    names: dict[int, str] = {}
    for index, entry in enumerate(source.categories):
        where = f"{source.path}: categories[{index}]"
        identity, name = entry.get("id"), entry.get("name")
        if not is_id(identity):
            problems.add(Kind.CLASS, where, f"id must be an integer, got {shown(identity)}")
        elif not isinstance(name, str):
            problems.add(Kind.CLASS, where, f"name must be a string, got {shown(name)}")
        elif identity in names:
            problems.add(Kind.CLASS, where, f"category id {identity} is already used by {shown(names[identity])}")
        elif name in names.values():
            problems.add(
                Kind.CLASS, where, f"category name {shown(name)} of id {identity} is already used by another id"
            )
        else:
            names[identity] = name
    if not source.categories and not problems.errors:
        problems.add(Kind.CLASS, f"{source.path}: categories", "expected at least one, got none")
    return dict(sorted(names.items()))


def collect_images(source: Source, problems: Problems) -> dict[int, ImageRecord]:
    """Return the images by id, with the sizes that the source states."""
    records: dict[int, ImageRecord] = {}
    owners: dict[Path, ImageRecord] = {}
    for entry in source.images:
        where = source.name_image(entry)
        identity, file_name = entry.get("id"), entry.get("file_name")
        if not is_id(identity):
            problems.add(Kind.IMAGE_ENTRY, where, f"image id must be an integer, got {shown(identity)}")
        elif not isinstance(file_name, str) or not file_name:
            problems.add(Kind.IMAGE_ENTRY, where, f"file_name must be a string, got {shown(file_name)}")
        elif identity in records:
            reason = f"image id {identity} is already used by {records[identity].path.name}"
            # Either image may be that of the annotations.
            problems.add(Kind.IMAGE_ENTRY, where, reason, identity)
        else:
            try:
                found = source.find_image(entry)
            except ValueError as error:
                problems.add(Kind.IMAGE_ENTRY, where, str(error))
                continue
            if found.path in owners:
                reason = f"the file {found.path} is also that of {owners[found.path].where}; merge the two entries"
                # The annotations of the other entry are missing from those of the first.
                problems.add(Kind.IMAGE_ENTRY, where, reason, owners[found.path].image_id)
                continue
            if found.kind is not None:
                problems.mend(found.kind, where, f"no file {file_name}; {found.path} fits")
            stated = entry.get("width"), entry.get("height")
            record = ImageRecord(identity, found.path, where, stated, searched=found.searched)
            records[identity] = owners[found.path] = record
    if not source.images and not problems.errors:
        problems.add(Kind.IMAGE_ENTRY, f"{source.path}: images", "expected at least one, got none")
    return records


def check_sizes(
    records: Sequence[ImageRecord], sizes: Iterable[tuple[int, int] | DataError], problems: Problems
) -> None:
    """Set every record's size to that of its file, and compare it with the size that the source states, if any.

    Args:
        records: The images.
        sizes: Height and width of the file of each image, or the error that reading it raised.
        problems: Receives a line for each file that is no image or has another size.
    """
    for record, size in zip(records, sizes, strict=True):
        if isinstance(size, DataError):
            hint = ""
            if not os.path.exists(record.path):
                folders = " and ".join(map(str, record.searched or (record.path.parent,)))
                hint = f"; looked in {folders}, name another folder of images with --images"
            problems.add(Kind.IMAGE, record.where, f"{image_reason(record, size)}{hint}")
            continue
        height, width = size
        if all(is_int(side) and side for side in record.stated) and record.stated != (width, height):
            problems.add(
                Kind.IMAGE_SIZE,
                record.where,
                f"the annotations say {shown(record.stated[0])} x {shown(record.stated[1])} pixels,"
                f" {record.path} is {width} x {height} (width x height, EXIF orientation applied)",
            )
        else:
            record.height, record.width = height, width


def image_reason(record: ImageRecord, error: DataError) -> str:
    """Return an error of reading an image without the file, if `where` names it already."""
    return str(error).removeprefix(f"{printable(record.where)}: ")


def collect_boxes(
    source: Source, records: dict[int, ImageRecord], categories: dict[int, str], problems: Problems
) -> list[BoxRecord]:
    """Return the boxes that are free of errors and whose image can be used, in the order of the source."""
    label_of = {identity: label for label, identity in enumerate(categories)}
    # The entries of wrong images and classes are errors already. Their annotations are none.
    images = {entry.get("id") for entry in source.images if is_id(entry.get("id"))}
    classes = {entry.get("id") for entry in source.categories if is_id(entry.get("id"))}
    seen: set[int] = set()
    boxes: list[BoxRecord] = []
    largest, fractional = -math.inf, False
    for entry in source.annotations:
        image_id, category = entry.get("image_id"), entry.get("category_id")
        crowd = 0 if entry.get("iscrowd") is None else entry["iscrowd"]
        try:
            repeated = _is_repeated(entry, seen)
            if not is_int(image_id) or image_id not in images:
                raise _Wrong(Kind.ENTRY, f"image_id {shown(image_id)} is not the id of any image")
            if not is_int(category) or category not in classes:
                raise _Wrong(Kind.ENTRY, f"category_id {shown(category)} is not the id of any category")
            if crowd not in (0, 1):
                raise _Wrong(Kind.ENTRY, f"iscrowd must be 0 or 1, got {shown(crowd)}")
            record = records.get(image_id)
            read = source.read_box(entry, record or _UNKNOWN)
        except _Wrong as error:
            problems.add(error.kind, source.name_annotation(entry), str(error), image_id)
            continue
        except ValueError as error:
            problems.add(Kind.BOX, source.name_annotation(entry), str(error), image_id)
            continue
        if repeated:
            problems.mend(
                Kind.REPEATED_ID,
                source.name_annotation(entry),
                f"annotation id {entry['id']} is used more than once",
            )
        if read.kind is not None:
            problems.mend(read.kind, source.name_annotation(entry), f"has no bbox, only a {read.text()}")
        if record is not None and record.height:
            largest = max(largest, *read.box)
            fractional = fractional or any(value % 1 for value in read.box)
        box = _clipped(read, record or _UNKNOWN, partial(source.name_annotation, entry), problems)
        if box is None or record is None or not record.height:
            continue
        if category not in label_of:
            problems.incomplete.add(image_id)  # The entry of the class is an error already.
            continue
        area = entry.get("area")
        if not (is_number(area) and are_finite([area]) and area > 0):
            area = (box[2] - box[0]) * (box[3] - box[1])
        boxes.append(BoxRecord(image_id, label_of[category], box, area, bool(crowd)))
    if fractional and largest <= _LARGEST_SHARE:
        problems.add(
            Kind.BOX, str(source.path), "no coordinate is above 1; expected pixels, got shares of width and height"
        )
    return boxes


#: Stands for an image that cannot be used, so that its annotations are checked all the same.
_UNKNOWN = ImageRecord(0, Path(), "")


class _Wrong(ValueError):
    """What is wrong with an annotation, and the kind of the finding."""

    def __init__(self, kind: Kind, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


def _is_repeated(entry: dict[str, Any], seen: set[int]) -> bool:
    """Add an annotation's id to `seen`, and return whether it was there; raise _Wrong if it is not an integer."""
    if "id" not in entry:
        return False
    identity = entry["id"]
    if not is_int(identity):
        raise _Wrong(Kind.ENTRY, f"annotation id must be an integer, got {shown(identity)}")
    repeated = identity in seen
    seen.add(identity)
    return repeated


def _clipped(read: ReadBox, record: ImageRecord, where: Callable[[], str], problems: Problems) -> Box | None:
    """Return a box clipped to its image, or None if it is left out; what is mended is counted."""
    x1, y1, x2, y2 = read.box
    if x2 <= x1 or y2 <= y1:
        problems.mend(Kind.NO_AREA, where(), f"{read.text()} has width or height 0")
        return None
    if not record.height:
        return read.box  # The size is unknown, because the image cannot be used, which is an error already.
    overhang = max(-x1, -y1, x2 - record.width, y2 - record.height)
    clipped = max(x1, 0.0), max(y1, 0.0), min(x2, float(record.width)), min(y2, float(record.height))
    size = f"its image of {record.width} x {record.height} pixels"
    side = min(clipped[2] - clipped[0], clipped[3] - clipped[1])
    if side <= 0:
        problems.mend(Kind.OUTSIDE, where(), f"{read.text()} lies outside {size}")
        return None
    if overhang > 0 and side < MIN_REMAINDER:
        problems.mend(Kind.OUTSIDE, where(), f"{read.text()} has less than {MIN_REMAINDER:g} pixel in {size}")
        return None
    rounded = [np.float32(value) for value in clipped]
    if rounded[2] <= rounded[0] or rounded[3] <= rounded[1]:
        problems.mend(Kind.NO_AREA, where(), f"{read.text()} has width or height 0 in single precision")
        return None
    if overhang > MAX_OVERHANG:
        problems.mend(Kind.OVERHANG, where(), f"{read.text()} reaches {overhang:g} pixels out of {size}")
    return clipped


def are_finite(values: Sequence[float]) -> bool:
    """Return whether coordinates are finite and of a magnitude that float32 holds."""
    return all(-_HUGE < value < _HUGE for value in values)


def is_number(value: Any) -> TypeGuard[float]:
    """Return whether a value from a file is an integer or floating-point number."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_int(value: Any) -> TypeGuard[int]:
    """Return whether a value from a file is an integer."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_id(value: Any) -> TypeGuard[int]:
    """Return whether a value from a file can be an id: an integer of at most 64 bits."""
    return is_int(value) and -(2**63) <= value < 2**63
