"""YOLO data sets: a `data.yaml` with the names of the classes, folders of images, and a text file of boxes per image.

The boxes of `images/train/a.jpg` are in `labels/train/a.txt`. A line is `class cx cy width height`, or
`class x y x y x y ...` for a polygon, as shares of the image's width and height. An image without a text file has no
boxes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from retinanet.common.errors import DataError, one_line, printable, shown
from retinanet.common.files import read_text
from retinanet.data.folders import files_below
from retinanet.data.images import IMAGE_SUFFIXES
from retinanet.data.locate import Found, ImageFinder, is_file
from retinanet.data.problems import Kind, Problems
from retinanet.data.records import ImageRecord, ReadBox, Source, are_finite, is_id, is_int

SPLITS = ("train", "val", "test")
# A share beyond this is no tool's rounding; most likely it is a pixel.
_LARGEST_SHARE = 2.0


def yolo_splits(path: Path) -> tuple[str, ...]:
    """Return those of train, val and test that a data.yaml has.

    Raises:
        DataError: The file is no data.yaml.
    """
    content = _read_yaml(path)
    return tuple(split for split in SPLITS if content.get(split))


def read_yolo(path: Path, root: Path | None, problems: Problems, split: str | None = None) -> Source:
    """Read one split of a YOLO data set; `retinanet.data.records` checks its entries.

    Args:
        path: The data.yaml.
        root: The folder to which its entries are relative. None takes its `path`.
        problems: Receives the lines that are no boxes.
        split: "train", "val" or "test". None takes the only one that there is.

    Returns:
        The entries. A category id is the number of the class in `names`.

    Raises:
        DataError: The file is no data.yaml, does not have the split, or leads to no images or no text files.
    """
    content = _read_yaml(path)
    names = _class_names(path, content.get("names"))
    there = [name for name in SPLITS if content.get(name)]
    if split is None and len(there) != 1:
        raise DataError(f"{path}: has {', '.join(there) or 'no train, val or test'}; choose one with --split")
    split = split or there[0]
    if not content.get(split):
        raise DataError(f"{path}: has no `{split}`; it has {', '.join(there) or 'no train, val or test'}")
    images: dict[Path, None] = {}
    for place in _places(path, content, split, root, problems):
        images |= dict.fromkeys(_images(place, problems))
    if not images:
        raise DataError(f"{path}: {split}: expected images, got none")
    entries: list[dict[str, Any]] = [
        {"id": number, "file_name": str(image), "path": image} for number, image in enumerate(images, start=1)
    ]
    boxes: list[dict[str, Any]] = []
    labelled = 0
    for entry in entries:
        label_file = _label_file(entry["path"])
        if label_file is not None:
            labelled += 1
            boxes += _lines(label_file, entry["id"], names, problems)
    if not labelled:
        example = _label_places(next(iter(images)))[0]
        raise DataError(
            f"{path}: {split}: none of the {len(images)} images has a text file of boxes, such as {example}"
        )
    keypoints = "kpt_shape" in content
    return Source(
        path=path,
        form=f"YOLO, {split}",
        images=entries,
        annotations=boxes,
        categories=[{"id": number, "name": name} for number, name in names.items()],
        find_image=lambda entry: Found(entry["path"]),
        name_image=lambda entry: entry["file_name"],
        name_annotation=lambda entry: entry["where"],
        read_box=lambda entry, record: _read_box(entry["shares"], record, keypoints),
    )


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    text = read_text(path)
    try:
        content = yaml.safe_load(text)
    except Exception as error:  # Besides YAMLError, the parser raises the errors of dates, numbers and recursion.
        raise DataError(f"{path}: not valid YAML: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected a YOLO data file with `names`, `train` and `val`, got {shown(content)}")
    return content


def _class_names(path: Path, names: Any) -> dict[int, str]:
    """Return the names of the classes by number.

    Raises:
        DataError: They are neither a list nor a mapping from numbers, or not text.
    """
    if isinstance(names, list):
        names = dict(enumerate(names))
    if not isinstance(names, dict) or not names:
        raise DataError(f"{path}: names: expected the names of the classes as a list, got {shown(names)}")
    for number, name in names.items():
        if not is_id(number):
            raise DataError(f"{path}: names: expected numbers before the names, got {shown(number)}")
        if not isinstance(name, str) and not is_int(name):
            raise DataError(f"{path}: names: {number}: expected a name, got {shown(name)}; write it in quotes")
    return {number: str(name) for number, name in names.items()}


def _places(path: Path, content: dict[str, Any], split: str, root: Path | None, problems: Problems) -> Iterator[Path]:
    """Yield the folders and lists that an entry names.

    Raises:
        DataError: One does not exist, or the entry is not text.
    """
    stated = content[split] if isinstance(content[split], list) else [content[split]]
    base = content.get("path") or "."
    if not all(isinstance(text, str) for text in (*stated, base)):
        raise DataError(
            f"{path}: {split}: expected a folder of images or a list of folders, got {shown(content[split])}"
        )
    for text in (text.replace("\\", "/") for text in stated):
        first = (root or path.parent / base) / text
        # Some tools write paths relative to a folder of theirs, or one `../` too many.
        shorter = text
        while shorter.startswith("../"):
            shorter = shorter[3:]
        for place in (first, path.parent / text, path.parent / shorter):
            if is_file(place) or _is_folder(place):
                if place != first:
                    problems.mend(Kind.DATA_PATH, f"{path}: {split}", f"{first}: no such folder; {place} fits")
                yield place
                break
        else:
            stated = printable(str(first))
            raise DataError(f"{path}: {split}: {stated}: no such folder or list of images; correct `path` or `{split}`")


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def _images(place: Path, problems: Problems) -> Iterator[Path]:
    """Yield the images of a folder with its sub-folders, or of a list."""
    if not _is_folder(place):
        finder = ImageFinder(place.parent)
        for number, line in enumerate(read_text(place).splitlines(), start=1):
            if line.strip():
                try:
                    found = finder.find(line.strip())
                except ValueError as error:
                    problems.add(Kind.IMAGE_ENTRY, f"{place}: line {number}", str(error))
                    continue
                if found.kind is not None:
                    reason = f"no file {line.strip()}; {found.path} fits"
                    problems.mend(found.kind, f"{place}: line {number}", reason)
                yield found.path
        return
    images = files_below(place, IMAGE_SUFFIXES, problems)
    yield from images
    _report_orphans(images, place, problems)


def _report_orphans(images: list[Path], place: Path, problems: Problems) -> None:
    """Add a problem for each text file of boxes whose image is missing from a folder."""
    folder = _labels_for(place)
    if folder is None or not _is_folder(folder):
        return
    expected = {_label_places(image)[0] for image in images}
    for file in files_below(folder, (".txt",), problems):
        if file not in expected and file.name != "classes.txt":
            problems.add(Kind.IMAGE, str(file), f"the image of these boxes is missing from {place}")


def _labels_for(folder: Path) -> Path | None:
    """Return the folder of the text files for a folder of images: `labels` replaces the last `images` in its path."""
    parts = list(folder.parts)
    if "images" not in parts:
        return None
    parts[len(parts) - 1 - parts[::-1].index("images")] = "labels"
    return Path(*parts)


def _label_places(image: Path) -> list[Path]:
    """Return where the text file of an image may be: in the folder of the text files, or beside it."""
    folder, name = _labels_for(image.parent), image.with_suffix(".txt").name
    return [image.parent / name] if folder is None else [folder / name, image.parent / name]


def _label_file(image: Path) -> Path | None:
    return next((place for place in _label_places(image) if os.path.lexists(place)), None)


def _lines(path: Path, image_id: int, names: dict[int, str], problems: Problems) -> Iterator[dict[str, Any]]:
    """Yield the boxes of a text file."""
    try:
        text = read_text(path)
    except DataError as error:
        problems.add(Kind.FILE, str(path), str(error).removeprefix(f"{path}: "), image_id)
        return
    for number, line in enumerate(text.splitlines(), start=1):
        where, fields = f"{path}: line {number}", line.split()
        if not fields:
            continue
        # Some tools write 0.0 for 0.
        label = fields[0].partition(".")[0] if fields[0].rstrip("0").endswith(".") else fields[0]
        category = int(label) if label.isdecimal() and len(label) < 10 else None
        if category not in names:
            reason = f"expected the number of a class, one of {_numbers(names)}, got {shown(fields[0])}"
            problems.add(Kind.CLASS, where, reason, image_id)
            continue
        yield {"image_id": image_id, "category_id": category, "shares": fields[1:], "where": where}


def _numbers(names: dict[int, str]) -> str:
    return f"{min(names)} to {max(names)}"


def _read_box(texts: list[str], record: ImageRecord, keypoints: bool) -> ReadBox:
    """Return the box of a line, in pixels.

    Raises:
        ValueError: The numbers are neither a box nor a polygon, or are no shares.
    """
    try:
        shares = [float(text) for text in texts]
    except ValueError:
        shares = []
    if keypoints:
        shares = shares[:4]  # The points of a pose follow its box.
    if len(shares) != 4 and (len(shares) < 6 or len(shares) % 2):
        got = shown(" ".join(texts))
        raise ValueError(f"expected `class cx cy width height` or `class x y x y x y ...`, got {got} after the class")
    text = f"box (cx cy width height) {' '.join(f'{share:g}' for share in shares)}"
    if not are_finite(shares):
        raise ValueError(f"{text} has a coordinate that is not finite")
    if max(map(abs, shares)) > _LARGEST_SHARE:
        raise ValueError(f"{text}: expected shares of the image, from 0 to 1; divide pixels by its width and height")
    if len(shares) == 4:
        cx, cy, width, height = shares
        if width < 0 or height < 0:
            raise ValueError(f"{text} has a negative width or height")
        x1, y1, x2, y2 = cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2
    else:
        xs, ys = shares[0::2], shares[1::2]
        text = f"polygon of {len(xs)} points"
        x1, y1, x2, y2 = min(xs), min(ys), max(xs), max(ys)
    width, height = record.width or 1, record.height or 1  # An image that cannot be used has no size.
    return ReadBox((x1 * width, y1 * height, x2 * width, y2 * height), lambda: text)
