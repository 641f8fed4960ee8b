"""COCO json: reading a file, and making the content of one from checked images and boxes.

Boxes in the file are `[x, y, width, height]` in pixels from the top left corner of the image.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from retinanet.common.errors import DataError, printable, shown
from retinanet.common.files import read_json
from retinanet.data.locate import ImageFinder
from retinanet.data.problems import Kind, Problems
from retinanet.data.records import Box, BoxRecord, ImageRecord, ReadBox, Source, are_finite, is_int, is_number

_TABLES = ("images", "annotations", "categories")
_EXPECTED = "[x, y, width, height]"
_LARGEST_MASK = 2**31  # pixels; pycocotools counts them in 32 bits


def read_coco(path: Path, images_dir: Path, problems: Problems) -> Source:
    """Read a COCO json file; `retinanet.data.records` checks its entries.

    Raises:
        DataError: The file cannot be read, or lacks `images`, `annotations` or `categories`.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected a JSON object with {', '.join(_TABLES)}, got {_kind(content)}")
    tables: dict[str, list[dict[str, Any]]] = {}
    for table in _TABLES:
        if table not in content:
            raise DataError(f"{path}: has no `{table}`; a COCO json has {', '.join(_TABLES)}")
        if not isinstance(content[table], list):
            raise DataError(f"{path}: `{table}`: expected a list, got {_kind(content[table])}")
        tables[table] = []
        for index, entry in enumerate(content[table]):
            if isinstance(entry, dict):
                tables[table].append(entry)
            else:
                kind = {"images": Kind.IMAGE_ENTRY, "categories": Kind.CLASS}.get(table, Kind.ENTRY)
                problems.add(kind, f"{path}: {table}[{index}]", f"expected an object, got {_kind(entry)}")

    def name_image(entry: dict[str, Any]) -> str:
        return f"{path}: image {_short(entry.get('id'))} ({_short(entry.get('file_name'))})"

    def name_annotation(entry: dict[str, Any]) -> str:
        if "id" in entry:
            return f"{path}: annotation {_short(entry['id'])}"
        return f"{path}: annotation without id on image {_short(entry.get('image_id'))}"

    finder = ImageFinder(images_dir)
    return Source(
        path=path,
        form="COCO json",
        images=tables["images"],
        annotations=tables["annotations"],
        categories=tables["categories"],
        find_image=lambda entry: finder.find(entry["file_name"]),
        name_image=name_image,
        name_annotation=name_annotation,
        read_box=_read_box,
        description=_description(content.get("info")),
    )


def _description(info: Any) -> str:
    text = info.get("description") if isinstance(info, dict) else None
    return printable(text, 100) if isinstance(text, str) else ""


def _read_box(entry: dict[str, Any], _: ImageRecord) -> ReadBox:
    """Return an annotation's `bbox` as xyxy or, if it has none, the box of its `segmentation`.

    Raises:
        ValueError: `bbox` is not four finite numbers with a width and a height of at least 0, or `segmentation` is
            neither polygons nor a run-length encoded mask.
    """
    bbox = entry.get("bbox")
    if bbox in (None, []) and entry.get("segmentation"):
        return ReadBox(_box_of_segmentation(entry["segmentation"]), lambda: "segmentation", Kind.SEGMENTATION)
    if not isinstance(bbox, list) or len(bbox) != 4 or not all(is_number(value) for value in bbox):
        raise ValueError(f"bbox must be four numbers {_EXPECTED}, got {shown(bbox)}")
    if not are_finite(bbox):
        raise ValueError(f"bbox {shown(bbox)} has a coordinate that is not finite")
    x, y, width, height = map(float, bbox)
    text = partial(_text, bbox)
    if width < 0 or height < 0:
        raise ValueError(f"{text()} has a negative width or height, expected {_EXPECTED}")
    return ReadBox((x, y, x + width, y + height), text)


def _text(bbox: list[float]) -> str:
    return f"bbox [{', '.join(f'{value:g}' for value in bbox)}]"


def _box_of_segmentation(segmentation: Any) -> Box:
    """Return the box of polygons `[[x, y, x, y, ...], ...]`, or of a run-length encoded mask.

    Raises:
        ValueError: The segmentation is neither.
    """
    if isinstance(segmentation, dict):
        return _box_of_mask(segmentation)
    polygons = segmentation if isinstance(segmentation, list) else []
    for polygon in polygons:
        if not (isinstance(polygon, list) and len(polygon) >= 6 and len(polygon) % 2 == 0):
            polygons = []
            break
    values = [value for polygon in polygons for value in polygon]
    if not values or not all(is_number(value) for value in values) or not are_finite(values):
        raise ValueError(
            "has no bbox, and its segmentation is no list of polygons [x, y, x, y, x, y, ...]: "
            f"got {shown(segmentation)}; add a bbox"
        )
    xs = [float(x) for polygon in polygons for x in polygon[0::2]]
    ys = [float(y) for polygon in polygons for y in polygon[1::2]]
    return min(xs), min(ys), max(xs), max(ys)


def _box_of_mask(mask: dict[str, Any]) -> Box:
    """Return the box of a mask `{"size": [height, width], "counts": ...}`, whose counts are a list or compressed text.

    Raises:
        ValueError: The mask is damaged. pycocotools would read beyond its memory.
    """
    from pycocotools import mask as pycoco

    size, counts = mask.get("size"), mask.get("counts")
    if isinstance(size, list) and len(size) == 2 and all(is_int(side) and side > 0 for side in size):
        pixels = size[0] * size[1]
        encoded = None
        if isinstance(counts, list) and all(is_int(count) and count >= 0 for count in counts):
            if sum(counts) == pixels < _LARGEST_MASK:
                encoded = pycoco.frPyObjects({"size": size, "counts": counts}, *size)
        # Characters "0" to "o" carry six bits each; the last of a number is below "P".
        elif isinstance(counts, str) and counts and all("0" <= c <= "o" for c in counts) and counts[-1] < "P":
            if pixels < _LARGEST_MASK:
                encoded = {"size": size, "counts": counts.encode()}
                encoded = encoded if int(pycoco.area(encoded)) <= pixels else None
        if encoded is not None:
            x, y, width, height = np.asarray(pycoco.toBbox(encoded), dtype=float).tolist()
            return x, y, x + width, y + height
    raise ValueError(
        "has no bbox, and its segmentation is no run-length encoded mask "
        f'{{"size": [height, width], "counts": ...}}: got {shown(mask)}; add a bbox'
    )


def _short(value: Any) -> str:
    """Return an id or a file name for messages."""
    return printable(value, 100) if isinstance(value, str) else shown(value)


def coco_content(
    images: Iterable[tuple[int, str, int, int]],
    boxes: Sequence[BoxRecord],
    categories: dict[int, str],
    description: str = "",
) -> dict[str, Any]:
    """Return the content of a COCO json.

    Args:
        images: Id, file name, height and width of each image.
        boxes: The boxes, whose labels are positions in `categories`.
        categories: Names by category id.
        description: What the data set is, for its `info`; if empty, there is no `info`.

    Returns:
        The content. Annotations are numbered from 1, because pycocotools takes the annotation id 0 for "unmatched".
    """
    ids = list(categories)
    return {
        **({"info": {"description": description}} if description else {}),
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
    return "null" if value is None else shown(value)
