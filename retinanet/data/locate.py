"""Finding the file that an annotation names, where the name was written on another machine or file system."""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from retinanet.data.images import IMAGE_SUFFIXES
from retinanet.data.problems import Kind


class Found(NamedTuple):
    """An image file.

    Attributes:
        path: The file; it need not exist.
        kind: What is wrong with the stated name, or None if the file has exactly this name or was not found.
        searched: The folders in which a file that was not found was looked for; empty for that of `path` alone.
    """

    path: Path
    kind: Kind | None = None
    searched: tuple[Path, ...] = ()


class ImageFinder:
    """Finds images by the names that annotations state; it lists a folder only if a name does not lead to a file."""

    def __init__(self, folder: Path) -> None:
        """Find names relative to a folder."""
        self.folder = folder
        self._listings: dict[Path, dict[str, list[str]]] = {}

    def find(self, stated: str) -> Found:
        r"""Return the file that a name leads to.

        A name may have backslashes, differ from the file's in the case of letters, or be the path on another machine
        (`C:\photos\a.jpg`), of which the last part counts. A name such as `images/a.jpg` may also be relative to a
        folder above a folder `images`.

        Raises:
            ValueError: Several files match. The message names them.
        """
        path = self.folder / stated
        if is_file(path):
            return Found(path)
        name = stated.replace("\\", "/")
        if name != stated and is_file(self.folder / name):
            return Found(self.folder / name, Kind.BACKSLASH)
        if _is_absolute(name):
            other = self._same_letters(self.folder / PurePosixPath(name).name)
            return Found(path) if other is None else Found(other, Kind.OTHER_FOLDER)
        if other := self._same_letters(self.folder / name):
            return Found(other, Kind.LETTER_CASE)
        ancestors = list(self.folder.absolute().parents)[: name.count("/")]
        for ancestor in ancestors:
            if is_file(ancestor / name) and (ancestor / name).is_relative_to(self.folder.absolute()):
                return Found(ancestor / name, Kind.OTHER_FOLDER)
        return Found(path)

    def find_stem(self, stem: str) -> Path | None:
        """Return the image in the folder whose name without suffix is `stem`; None if there is none.

        Raises:
            ValueError: There are several.
        """
        path = self.folder / stem
        names = self._listing(path.parent)
        return self._only(
            [path.parent / name for suffix in IMAGE_SUFFIXES for name in names[path.name.lower() + suffix]]
        )

    def _same_letters(self, path: Path) -> Path | None:
        """Return the file that has this name when the case of letters is ignored."""
        return self._only([path.parent / name for name in self._listing(path.parent)[path.name.lower()]])

    def _only(self, paths: list[Path]) -> Path | None:
        paths = [path for path in paths if is_file(path)]
        if len(paths) > 1:
            names = ", ".join(path.name for path in paths)
            raise ValueError(f"the name fits several files ({names}); state the whole name of one of them")
        return paths[0] if paths else None

    def _listing(self, folder: Path) -> dict[str, list[str]]:
        """Return the names in a folder by their lower-case form, without hidden files."""
        if folder not in self._listings:
            names = defaultdict(list)
            try:
                for name in sorted(os.listdir(folder)):
                    if not name.startswith("."):
                        names[name.lower()].append(name)
            except (OSError, ValueError):
                pass  # There is no such folder, so the image is missing, which is reported when it is read.
            self._listings[folder] = names
        return self._listings[folder]


def is_file(path: Path) -> bool:
    """Return whether a path leads to a file; False for a name that the file system cannot have."""
    return os.path.isfile(path)


def _is_absolute(name: str) -> bool:
    return name.startswith("/") or name[1:3] == ":/"
