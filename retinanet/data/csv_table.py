"""Tables of boxes as keras-retinanet reads them: `path,x1,y1,x2,y2,class`, one box a line, in pixels counted from 0.

A line with a path alone is an image without boxes. The first line may name the columns, in any order.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from retinanet.common.errors import DataError, one_line, shown
from retinanet.common.files import read_text
from retinanet.data.class_names import is_class, number_classes
from retinanet.data.locate import ImageFinder
from retinanet.data.problems import Kind, Problems
from retinanet.data.records import ImageRecord, ReadBox, Source, are_finite

#: Columns of a table without a header.
COLUMNS = ("path", "x1", "y1", "x2", "y2", "class")
_CORNERS = COLUMNS[1:5]
_OTHER_NAMES = {
    "path": ("file", "filename", "file_name", "image", "image_name", "image_path", "img", "img_path", "frame"),
    "x1": ("xmin", "x_min", "left"),
    "y1": ("ymin", "y_min", "top"),
    "x2": ("xmax", "x_max", "right"),
    "y2": ("ymax", "y_max", "bottom"),
    "class": ("class_name", "label", "name", "category"),
    "width": ("image_width",),
    "height": ("image_height",),
}
_NAMES = {other: name for name, others in _OTHER_NAMES.items() for other in (name, *others)}
_DELIMITERS = ",;\t "


def column_positions(names: Sequence[str]) -> dict[str, int]:
    """Return the positions of the columns in a table by their names in `COLUMNS`, `width` and `height`.

    Args:
        names: The names of the columns in their order. Known are those of `COLUMNS`, and `filename`, `xmin`, `label`
            and the like, in any case. Columns of other names are ignored.

    Raises:
        ValueError: A column of `COLUMNS` is missing or named twice.
    """
    positions: dict[str, int] = {}
    for position, text in enumerate(names):
        name = _NAMES.get(text.strip().lower())
        if name in positions:
            raise ValueError(f"two columns are a {name}: {names[positions[name]]} and {text}")
        if name is not None:
            positions[name] = position
    missing = [name for name in COLUMNS if name not in positions]
    if missing:
        raise ValueError(
            f"no column is a {missing[0]} (known names: {', '.join((missing[0], *_OTHER_NAMES[missing[0]]))})"
        )
    return positions


def read_csv(
    path: Path,
    images_dir: Path,
    problems: Problems,
    class_names: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
) -> Source:
    """Read a table of boxes; `retinanet.data.records` checks its entries.

    Args:
        path: The table: fields separated by commas, semicolons, tabs or blanks.
        images_dir: The folder to which paths are relative.
        problems: Receives the lines that are no box and no path.
        class_names: The classes in the order of their labels. None takes those that occur, sorted.
        columns: Names of the columns in their order, see `column_positions`. None takes those of the header, or
            `COLUMNS` if there is none.

    Returns:
        The entries, with category ids 1..K and image ids 1..N.

    Raises:
        DataError: The file cannot be read, has no line, or has a header without the needed columns.
        ValueError: `columns` lacks a column.
    """
    rows = _rows(path)
    positions, has_names = _positions(path, rows, columns)
    images: dict[str, dict[str, Any]] = {}
    boxes: list[dict[str, Any]] = []
    for line, fields in rows:
        where = f"{path}: line {line}"
        entry: dict[str, Any] = {name: fields[i] if i < len(fields) else "" for name, i in positions.items()}
        if not entry["path"]:
            problems.add(Kind.ENTRY, where, "expected the path of an image, got nothing")
            continue
        image = images.setdefault(entry["path"], _image(entry, len(images) + 1, where))
        if not has_names and any(fields[len(COLUMNS) :]):
            reason = f"expected {len(COLUMNS)} columns {','.join(COLUMNS)}, got {len(fields)}"
            reason += "; name the columns with a header or --csv-columns"
            problems.add(Kind.ENTRY, where, reason, image["id"])
            continue
        if not any(entry[name] for name in COLUMNS[1:]):
            continue
        if is_class(entry["class"], class_names, where, image["id"], problems):
            boxes.append({**entry, "image_id": image["id"], "where": where})
    categories = number_classes(boxes, class_names)
    if not categories and not problems.errors:
        raise DataError(f"{path}: expected at least one box, got none")
    finder = ImageFinder(images_dir)
    return Source(
        path=path,
        form="CSV table",
        images=list(images.values()),
        annotations=boxes,
        categories=categories,
        find_image=lambda entry: finder.find(entry["file_name"]),
        name_image=lambda entry: entry["where"],
        name_annotation=lambda entry: entry["where"],
        read_box=_read_box,
    )


def _rows(path: Path) -> list[tuple[int, list[str]]]:
    """Return the lines that are not empty, as their number and their fields.

    Raises:
        DataError: There are none, or the file is no table.
    """
    text = read_text(path)
    first = next((line for line in text.splitlines() if line.strip()), "")
    delimiter = max(_DELIMITERS, key=first.count)
    if first.count(",") >= len(COLUMNS) - 1:
        delimiter = ","  # Paths and classes may have blanks.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
    rows = []
    try:
        for fields in reader:
            stripped = [field.strip() for field in fields]
            if any(stripped):
                rows.append((reader.line_num, stripped))
    except csv.Error as error:
        raise DataError(f"{path}: line {reader.line_num}: not a line of a table ({one_line(error)})") from error
    if not rows:
        raise DataError(f"{path}: expected lines {','.join(COLUMNS)}, got an empty file")
    return rows


def _positions(
    path: Path, rows: list[tuple[int, list[str]]], columns: Sequence[str] | None
) -> tuple[dict[str, int], bool]:
    """Return the positions of the columns, and whether a header or `columns` names them.

    A header is removed from `rows`.
    """
    positions = column_positions(COLUMNS if columns is None else columns)
    line, first = rows[0]
    corners = [first[positions[name]] for name in _CORNERS if positions[name] < len(first)]
    has_header = len(corners) == len(_CORNERS) and not any(not field or _is_number(field) for field in corners)
    if has_header:
        del rows[0]
        if columns is None:
            try:
                positions = column_positions(first)
            except ValueError as error:
                reason = (
                    f"expected a header with the columns {','.join(COLUMNS)}, got {shown(','.join(first))}: {error}"
                )
                raise DataError(f"{path}: line {line}: {reason}; name the columns with --csv-columns") from error
    return positions, has_header or columns is not None


def _image(entry: dict[str, Any], identity: int, where: str) -> dict[str, Any]:
    sides = {side: entry.get(side, "") for side in ("width", "height")}
    stated = {side: int(text) for side, text in sides.items() if text.isdecimal() and len(text) < 10}
    return {"id": identity, "file_name": entry["path"], "where": where, **stated}


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _read_box(entry: dict[str, Any], _: ImageRecord) -> ReadBox:
    """Return the corners of a line as a box.

    Raises:
        ValueError: A corner is missing or not a finite number, or the box is inverted.
    """
    wrong = [name for name in _CORNERS if not _is_number(entry[name])]
    if wrong:
        raise ValueError(f"{wrong[0]}: expected a number, got {shown(entry[wrong[0]])}")
    x1, y1, x2, y2 = corners = [float(entry[name]) for name in _CORNERS]
    text = f"box ({' '.join(_CORNERS)}) {' '.join(f'{value:g}' for value in corners)}"
    if not are_finite(corners):
        raise ValueError(f"{text} has a coordinate that is not finite")
    if x2 < x1 or y2 < y1:
        raise ValueError(f"{text} is inverted; if the columns have another order, name them with --csv-columns")
    return ReadBox((x1, y1, x2, y2), lambda: text)
