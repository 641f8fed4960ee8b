"""The files of a folder and its sub-folders."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

from retinanet.common.errors import DataError
from retinanet.common.files import unreadable
from retinanet.data.problems import Kind, Problems


def files_below(folder: Path, suffixes: Collection[str], problems: Problems) -> list[Path]:
    """Return the files with certain suffixes in a folder and its sub-folders, sorted; links are followed.

    Args:
        folder: The folder.
        suffixes: The suffixes, in lower case.
        problems: Receives the hidden files, such as the `._NAME` files in archives from a Mac. They are left out.

    Raises:
        DataError: The folder or a sub-folder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename or folder}: {unreadable(error)}") from error

    files: list[Path] = []
    visited: set[str] = set()
    for parent, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(parent)
        if real in visited:  # A link leads to a folder above it, or to one that another link leads to.
            folders.clear()
            continue
        visited.add(real)
        files += [Path(parent, name) for name in names if os.path.splitext(name)[1].lower() in suffixes]
    kept = []
    for file in sorted(files):
        if any(part.startswith(".") for part in file.relative_to(folder).parts):
            problems.mend(Kind.HIDDEN, str(file), "hidden, so probably no part of the data")
        else:
            kept.append(file)
    return kept
