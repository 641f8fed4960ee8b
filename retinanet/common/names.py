"""Names for the files of a folder, which no two of them share on any file system."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path


class FreeNames:
    """Gives out each name of a folder once.

    Some file systems do not tell upper from lower case, or composed from decomposed letters, so names that differ in
    these alone count as equal.

    Args:
        folder: The folder, whose file system limits the length of names. It need not exist.
    """

    def __init__(self, folder: Path) -> None:
        """Start without a name."""
        self.folder = folder
        self._taken: set[str] = set()
        self._numbers: dict[str, int] = {}
        self._longest: int | None = None

    def take(self, stem: str, end: str = "", suffix: str = "", room: int = 0) -> str:
        """Return `stem + end + suffix`, or the first of `stem + end + "_2" + suffix` and so on that is free.

        Args:
            stem: The part that is shortened if the name is too long for the file system.
            end: The part after it.
            suffix: The last part, which follows the number.
            room: Bytes that must remain for what the caller appends.
        """
        key = _key(stem + end + suffix)
        while True:
            number = self._numbers[key] = self._numbers.get(key, 0) + 1
            tail = f"{end}{suffix}" if number == 1 else f"{end}_{number}{suffix}"
            name = self._shortened(stem, len(os.fsencode(tail)) + room) + tail
            if _key(name) not in self._taken:
                self._taken.add(_key(name))
                return name

    def _shortened(self, stem: str, rest: int) -> str:
        if self._longest is None:
            self._longest = _longest_name(self.folder)
        while stem and len(os.fsencode(stem)) > self._longest - rest:
            stem = stem[:-1]
        return stem


def _key(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _longest_name(folder: Path) -> int:
    """Return the bytes of the longest name that a file in a folder may have."""
    try:
        return os.pathconf(folder, "PC_NAME_MAX")
    except (OSError, ValueError, AttributeError):
        return 255
