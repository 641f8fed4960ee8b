"""Pascal VOC: xml files, one for each image.

VOC counts pixels from 1 and includes both corners, so `(xmin - 1, ymin - 1, xmax, ymax)` is the box in continuous
pixels. Objects marked `difficult` become crowd boxes, which neither training nor evaluation counts for or against.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree
from xml.parsers import expat

from retinanet.common.errors import DataError, one_line, shown
from retinanet.common.files import check_readable, read_text, unreadable
from retinanet.data.class_names import is_class, number_classes
from retinanet.data.folders import files_below
from retinanet.data.locate import Found, ImageFinder, is_file
from retinanet.data.problems import Kind, Problems
from retinanet.data.records import ReadBox, Source, are_finite

_CORNERS = ("xmin", "ymin", "xmax", "ymax")
# UTF-16 is declared, and bytes follow.
_INCORRECT_ENCODING = expat.errors.codes[expat.errors.XML_ERROR_INCORRECT_ENCODING]
_ENCODING = re.compile(rb"""^\s*<\?xml[^>]*?encoding\s*=\s*["']([^"']*)["'][^>]*\?>""")


def read_voc(
    path: Path,
    images_dir: Path | None,
    problems: Problems,
    class_names: Sequence[str] | None = None,
    *,
    one_based: bool = True,
) -> Source:
    """Read Pascal VOC annotations; `retinanet.data.records` checks the entries.

    Args:
        path: A folder of xml files, which may have sub-folders; a folder with `Annotations` in it; a list of names in
            its `ImageSets`; or one xml file.
        images_dir: The folder of the images. None takes `JPEGImages` beside the folder of the xml files if it exists,
            else the folder of the xml files.
        problems: Receives the files that cannot be parsed, and the objects without a name, a box, or a class of
            `class_names`.
        class_names: The classes in the order of their labels. None takes those that occur, sorted.
        one_based: False for files whose boxes are already 0-based corners.

    Returns:
        The entries, with category ids 1..K and image ids 1..N.

    Raises:
        DataError: There is no xml file, or no object in any of them.
    """
    folder, files = _xml_files(path, problems)
    if images_dir is None:
        images_dir = folder.parent / "JPEGImages"
        if not images_dir.is_dir():
            images_dir = folder
    images: list[dict[str, Any]] = []
    objects: list[dict[str, Any]] = []
    for image_id, file in enumerate(files, start=1):
        root = _parse(file, problems)
        if root is None:
            continue
        stated = (root.findtext("filename") or "").strip()
        images.append({"id": image_id, "file_name": stated or file.stem, "xml": file, "stated": stated, **_size(root)})
        for number, node in enumerate(root.iter("object"), start=1):
            where = f"{file}: object {number}"
            name = (node.findtext("name") or "").strip()
            difficult = (node.findtext("difficult") or "0").strip() == "1"
            if is_class(name, class_names, where, image_id, problems):
                entry = {"id": len(objects) + 1, "image_id": image_id, "class": name, "where": where}
                corners = [node.findtext(f"bndbox/{corner}") for corner in _CORNERS]
                objects.append(entry | {"corners": corners, "iscrowd": int(difficult)})
    categories = number_classes(objects, class_names)
    if not categories and not problems.errors:
        raise DataError(f"{path}: expected at least one object in the xml files, got none")
    finder = _Finder(folder, images_dir)
    return Source(
        path=path,
        form="Pascal VOC xml",
        images=images,
        annotations=objects,
        categories=categories,
        find_image=finder.find,
        name_image=lambda entry: str(entry["xml"]),
        name_annotation=lambda entry: entry["where"],
        read_box=lambda entry, _: _read_box(entry["corners"], 1.0 if one_based else 0.0),
    )


def is_annotation(name: str) -> bool:
    """Return whether a file of this name may be an annotation: a visible xml file that GDAL did not write."""
    lower = name.lower()
    return lower.endswith(".xml") and not lower.startswith(".") and not lower.endswith(".aux.xml")


def _xml_files(path: Path, problems: Problems) -> tuple[Path, list[Path]]:
    """Return the folder of the xml files, and the files.

    Raises:
        DataError: There are none.
    """
    if path.suffix.lower() == ".xml":
        return path.parent, [path]
    if path.suffix.lower() == ".txt":
        folder = next(
            (above / "Annotations" for above in path.absolute().parents if (above / "Annotations").is_dir()), None
        )
        if folder is None:
            raise DataError(
                f"{path}: expected a list of a Pascal VOC folder, in VOC/ImageSets/Main beside VOC/Annotations, got a "
                "text file elsewhere; for YOLO, give the data.yaml"
            )
        return folder, _listed_files(path, folder, problems)
    folder = path / "Annotations" if (path / "Annotations").is_dir() else path
    files = [file for file in files_below(folder, (".xml",), problems) if is_annotation(file.name)]
    if not files:
        raise DataError(f"{folder}: expected Pascal VOC annotations, got a folder without xml files")
    return folder, files


def _listed_files(path: Path, folder: Path, problems: Problems) -> list[Path]:
    """Return the xml files of the names in a list; a second column, as in the lists of one class, is ignored."""
    files: dict[Path, None] = {}
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        file = folder / f"{line.split()[0]}.xml"
        if is_file(file):
            files[file] = None
        else:
            problems.add(Kind.FILE, f"{path}: line {number}", f"{file}: no such file")
    if not files and not problems.errors:
        raise DataError(f"{path}: expected the name of an image in each line, got an empty file")
    return list(files)


def _parse(path: Path, problems: Problems) -> ElementTree.Element | None:
    """Return the root of an xml file; if it is no annotation, add a problem and return None."""
    try:
        check_readable(path)
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        problems.add(Kind.FILE, str(path), unreadable(error))
        return None
    try:
        root = _parsed(data, path, problems)
    except ElementTree.ParseError as error:
        problems.add(Kind.FILE, f"{path}: line {error.position[0]}", f"not well-formed xml ({one_line(error)})")
    except Exception as error:  # The parser raises other errors for odd encodings.
        problems.add(Kind.FILE, str(path), f"not readable as xml ({one_line(error)})")
    else:
        if root.tag == "annotation":
            return root
        problems.add(Kind.FILE, str(path), f"the root element must be <annotation>, got <{root.tag}>")
    return None


def _parsed(data: bytes, path: Path, problems: Problems) -> ElementTree.Element:
    """Parse xml in any encoding that Python knows; the parser itself knows only Unicode and single-byte encodings."""
    try:
        return ElementTree.fromstring(data)
    except (LookupError, ValueError, ElementTree.ParseError) as error:
        declaration = _ENCODING.match(data[:200])
        if declaration is None or (isinstance(error, ElementTree.ParseError) and error.code != _INCORRECT_ENCODING):
            raise
        encoding, body = declaration[1].decode("ascii", "replace"), data[declaration.end() :]
        if _is_text_encoding(encoding) and not isinstance(error, ElementTree.ParseError):
            return ElementTree.fromstring(body.decode(encoding))
        root = ElementTree.fromstring(body.decode("utf-8"))
        problems.mend(Kind.ENCODING, str(path), f"declares the encoding {shown(encoding)}: {one_line(error)}")
        return root


def _is_text_encoding(name: str) -> bool:
    try:
        b"text".decode(name)
    except LookupError:
        return False
    except ValueError:
        pass  # A text encoding, in which these bytes are no text.
    return True


class _Finder:
    """Finds the image of an xml file: first by its `filename`, then by the name of the xml file."""

    def __init__(self, folder: Path, images_dir: Path) -> None:
        self.folder = folder
        self.images_dir = images_dir
        self.finders: dict[Path, ImageFinder] = {}

    def find(self, entry: dict[str, Any]) -> Found:
        """Return the image of an entry; it need not exist.

        Raises:
            ValueError: Several files match.
        """
        xml, stated = entry["xml"], entry["stated"]
        below = xml.parent.relative_to(self.folder) if xml.is_relative_to(self.folder) else Path()
        # The images of a sub-folder of xml files are usually in a sub-folder of the same name.
        finders = [self._finder(self.images_dir / below)]
        if below.parts:
            finders.append(self._finder(self.images_dir))
        for finder in finders if stated else ():
            found = finder.find(stated)
            if is_file(found.path):
                return found
        for stem in dict.fromkeys((Path(stated).stem, xml.stem)):
            for finder in finders if stem else ():
                path = finder.find_stem(stem)
                if path is not None:
                    return Found(path, Kind.OTHER_NAME if stated else None)
        searched = tuple(finder.folder for finder in finders)
        return Found(self.images_dir / (stated or f"{xml.stem}.jpg"), searched=searched)

    def _finder(self, folder: Path) -> ImageFinder:
        return self.finders.setdefault(folder, ImageFinder(folder))


def _size(root: ElementTree.Element) -> dict[str, int]:
    # Many tools write 0 or nothing; the size is then read from the image.
    sides = {side: (root.findtext(f"size/{side}") or "").strip() for side in ("width", "height")}
    return {side: int(text) for side, text in sides.items() if text.isdecimal() and len(text) < 10}


def _read_box(texts: list[str | None], shift: float) -> ReadBox:
    """Return the corners of an object as a box.

    Raises:
        ValueError: A corner is missing or not a finite number, or the box is inverted.
    """
    try:
        corners = [float(text) for text in texts if text is not None]
    except ValueError:
        corners = []
    if len(corners) != 4:
        stated = ", ".join(f"{corner} {text}" for corner, text in zip(_CORNERS, texts, strict=True))
        raise ValueError(f"bndbox must have four numbers {', '.join(_CORNERS)}, got {stated}")
    text = f"bndbox ({' '.join(_CORNERS)}) {' '.join(f'{value:g}' for value in corners)}"
    if not are_finite(corners):
        raise ValueError(f"{text} has a coordinate that is not finite")
    if corners[2] < corners[0] or corners[3] < corners[1]:
        raise ValueError(f"{text} is inverted")
    return ReadBox((corners[0] - shift, corners[1] - shift, corners[2], corners[3]), lambda: text)
