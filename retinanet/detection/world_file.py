"""World files, which give the map coordinates of a picture's pixels (`photo.jgw` beside `photo.jpg`)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

from retinanet.common.errors import DataError, printable
from retinanet.common.files import read_text


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


def world_file_names(picture: Path) -> list[str]:
    """Return the names that the world file of a picture may have.

    The suffix is the picture's first and last letter with a `w` (`.jgw`), the picture's with a `w` at its end
    (`.jpgw`), or `.wld`, in lower or upper case.
    """
    letters = picture.suffix[1:].lower()
    suffixes = (f".{letters[:1]}{letters[-1:]}w", f".{letters}w", ".wld")
    return [picture.stem + variant for suffix in suffixes for variant in (suffix, suffix.upper())]


def find_world_file(picture: Path) -> Path | None:
    """Return the world file beside a picture, or None."""
    paths = map(picture.with_name, world_file_names(picture))
    return next((path for path in paths if path.is_file()), None)


def read_world_file(path: Path) -> WorldFile:
    """Read a world file: six numbers, one a line, with a point or a comma as the decimal mark.

    Raises:
        DataError: The file cannot be read, does not hold six finite numbers, or maps all pixels to one line.
    """
    name = printable(str(path))
    lines = read_text(path).split()
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
