"""COCO json: reading a file, and making the content of one from checked images and boxes.

Boxes in the file are `[x, y, width, height]` in pixels from the top left corner of the image.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from retinanet.common.errors import DataError
from retinanet.common.files import read_json
from retinanet.data.records import Box, BoxRecord, Source, are_finite, is_number

_TABLES = ("images", "annotations", "categories")


def read_coco(path: Path) -> Source:
    """Read a COCO json file; `retinanet.data.records` checks its entries.

    Raises:
        DataError: The file cannot be read, or lacks `images`, `annotations` or `categories`.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected a JSON object with {', '.join(_TABLES)}, got {_kind(content)}")
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

    images, annotations, categories = (content[table] for table in _TABLES)
    return Source(path, images, annotations, categories, name_image, name_annotation, _read_box)


def _read_box(entry: dict[str, Any]) -> tuple[Box, str]:
    """Return an annotation's `bbox` as xyxy, and its text for messages.

    Raises:
        ValueError: `bbox` is not four finite numbers with a width and a height above 0.
    """
    bbox = entry.get("bbox")
    if not isinstance(bbox, list) or len(bbox) != 4 or not all(is_number(value) for value in bbox):
        raise ValueError(f"bbox must be four numbers [x, y, width, height], got {bbox!r}")
    if not are_finite(bbox):
        raise ValueError(f"bbox {bbox} has a coordinate that is not finite")
    x, y, width, height = map(float, bbox)
    text = f"bbox [{', '.join(f'{value:g}' for value in bbox)}]"
    if width <= 0 or height <= 0:
        raise ValueError(f"{text} has width or height <= 0, expected [x, y, width, height]")
    return (x, y, x + width, y + height), text


def coco_content(
    images: Iterable[tuple[int, str, int, int]], boxes: Sequence[BoxRecord], categories: dict[int, str]
) -> dict[str, Any]:
    """Return the content of a COCO json.

    Args:
        images: Id, file name, height and width of each image.
        boxes: The boxes, whose labels are positions in `categories`.
        categories: Names by category id.

    Returns:
        The content. Annotations are numbered from 1, because pycocotools takes the annotation id 0 for "unmatched".
    """
    ids = list(categories)
    return {
        "images": [
            {"id": image_id, "file_name": name, "height": height, "width": width}
            for image_id, name, height, width in images
        ],
        "annotations": [
            {
                "id": number,
                "image_id": image_id,
                "category_id": ids[label],
                "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]],
                "area": area,
                "iscrowd": int(crowd),
            }
            for number, (image_id, label, box, area, crowd) in enumerate(boxes, start=1)
        ],
        "categories": [{"id": identity, "name": name} for identity, name in categories.items()],
    }


def _kind(value: Any) -> str:
    """Return a description of a JSON value, for messages."""
    names: tuple[tuple[type, str], ...] = ((list, "a list"), (dict, "an object"), (str, "a string"))
    for kind, name in names:
        if isinstance(value, kind):
            return name
    return "null" if value is None else repr(value)
