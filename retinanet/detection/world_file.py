"""World files, which give the map coordinates of a picture's pixels (`photo.jgw` beside `photo.jpg`)."""

from __future__ import annotations

import math
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from retinanet.common.errors import DataError, printable

_ANY_PICTURE = ".wld"


class WorldFile(NamedTuple):
    """An affine map from a picture's pixels to map units.

    The field names are those of the format. A point `(column, row)`, counted from the centre of the upper left pixel,
    has the map coordinates `(a * column + b * row + c, d * column + e * row + f)`. `e` is negative for a map whose y
    axis points north.
    """

    a: float
    d: float
    b: float
    e: float
    c: float
    f: float

    def to_map(self, x: float, y: float) -> tuple[float, float]:
        """Return the map coordinates of a point in continuous pixels, where `(0, 0)` is the picture's corner."""
        column, row = x - 0.5, y - 0.5
        return self.a * column + self.b * row + self.c, self.d * column + self.e * row + self.f


def is_world_file_of(path: Path, stems: Collection[str]) -> bool:
    """Return whether a file has the suffix of world files and the stem of a picture."""
    suffix = path.suffix.lower()
    return (suffix == _ANY_PICTURE or (len(suffix) > 3 and suffix.endswith("w"))) and path.stem in stems


def find_world_file(picture: Path) -> Path | None:
    """Return the world file beside a picture, or None.

    The suffix is the picture's with a `w` at its end (`.jpgw`), the same with the first and last letter only (`.jgw`),
    or `.wld`, in upper or lower case.
    """
    letters = picture.suffix[1:].lower()
    suffixes = [f".{letters[:1]}{letters[-1:]}w", f".{letters}w", _ANY_PICTURE]
    for suffix in suffixes:
        for variant in (suffix, suffix.upper()):
            path = picture.with_suffix(variant)
            if path.is_file():
                return path
    return None


def read_world_file(path: Path) -> WorldFile:
    """Read a world file: six numbers, one a line, with a point or a comma as the decimal mark.

    Raises:
        DataError: The file cannot be read, does not hold six finite numbers, or maps all pixels to one line.
    """
    name = printable(str(path))
    try:
        lines = path.read_text(encoding="utf-8-sig").split()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{name}: the world file cannot be read ({error})") from error
    try:
        numbers = [float(line.replace(",", ".")) for line in lines]
    except ValueError:
        numbers = []
    if len(numbers) != 6 or not all(map(math.isfinite, numbers)):
        raise DataError(
            f"{name}: expected a world file of six numbers, one a line, got {printable(' '.join(lines), 80)!r}"
        )
    world = WorldFile(*numbers)
    if world.a * world.e == world.b * world.d:
        raise DataError(f"{name}: expected a world file with pixels of some area, got {' '.join(lines)}")
    return world
