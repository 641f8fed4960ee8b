"""The pictures and videos that arguments name: files, and the contents of folders."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from retinanet.common.errors import listed, printable
from retinanet.data.images import IMAGE_SUFFIXES
from retinanet.detection.world_file import world_file_names

#: Suffixes, in lower case, of files that are read as videos.
VIDEO_SUFFIXES = (
    *(".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv", ".flv", ".mts", ".m2ts"),
    *(".3gp", ".ogv"),
)

_NO_FILE = "expected a picture or a video, got a broken link, a pipe or a device"


class Inputs(NamedTuple):
    """What a list of files and folders contains.

    Attributes:
        files: Pictures and videos, in the order of the arguments, those of a folder by name, each once.
        folders: The folders among the arguments.
        problems: One line for each argument that cannot be read.
        notes: One line for each kind of file of a folder that is not read.
    """

    files: list[Path]
    folders: list[Path]
    problems: list[str]
    notes: list[str]


def is_video(path: Path) -> bool:
    """Return whether a file is read as a video, which its suffix decides."""
    return path.suffix.lower() in VIDEO_SUFFIXES


def find_inputs(arguments: Sequence[str | Path], *, recursive: bool = False, excluded: Path | None = None) -> Inputs:
    """Return the pictures and videos that arguments name.

    Of a folder, the files with a suffix of pictures or videos are taken, except hidden ones. A file that is named
    itself is taken whatever its suffix is.

    Args:
        arguments: Files and folders.
        recursive: Enter the sub-folders of a folder. Links to folders are not followed.
        excluded: A folder that is not entered, such as that of the output.
    """
    inputs = Inputs([], [], [], [])
    for argument in arguments:
        path = Path(argument)
        try:
            if path.is_dir():
                inputs.folders.append(path)
                _read_folder(path, recursive, excluded, inputs)
            elif path.is_file():
                inputs.files.append(path)
            elif os.path.lexists(path):
                inputs.problems.append(f"{_shown(path)}: {_NO_FILE}")
            else:
                inputs.problems.append(f"{_shown(path)}: no such file or folder")
        except (OSError, ValueError) as error:  # A name that is too long for the file system, or that holds a NUL.
            inputs.problems.append(f"{_shown(path)}: cannot be read ({getattr(error, 'strerror', None) or error})")
    return inputs._replace(files=list(dict.fromkeys(inputs.files)))


def same_folder(path: Path, other: Path) -> bool:
    """Return whether both paths lead to one folder, which need not exist yet."""
    return path.resolve() == other.resolve()


def _read_folder(top: Path, recursive: bool, excluded: Path | None, inputs: Inputs) -> None:
    before, problems = len(inputs.files), len(inputs.problems)
    others: list[str] = []
    hidden: list[str] = []
    closed: list[str] = []

    def unreadable(error: OSError) -> None:
        inputs.problems.append(f"{_shown(Path(error.filename))}: cannot be read ({error.strerror})")

    for name, folders, names in os.walk(top, onerror=unreadable):
        folder = Path(name)
        folders.sort()
        entered = [sub for sub in folders if recursive and _is_entered(folder / sub, excluded)]
        closed += [_inside(top, folder / sub) for sub in folders if sub not in entered]
        folders[:] = entered
        files = [folder / file for file in sorted(names)]
        read = [file for file in files if not file.name.startswith(".") and _is_read(file)]
        # Opening a pipe would wait for someone to write into it.
        inputs.problems.extend(f"{_shown(file)}: {_NO_FILE}" for file in read if not file.is_file())
        inputs.files.extend(file for file in read if file.is_file())
        world_files = {name for file in read if not is_video(file) for name in world_file_names(file)}
        for file in files:
            if file.name.startswith("."):
                hidden.append(_inside(top, file))
            elif not _is_read(file) and file.name not in world_files:
                others.append(_inside(top, file))
    notes = (
        (others, "file", "not read, because the suffix is none of a picture or a video"),
        (hidden, "hidden file", "not read"),
        (closed, "sub-folder", "not entered" if recursive else "not entered (--recursive enters sub-folders)"),
    )
    for found, kind, outcome in notes:
        if found:
            plural = "s" * (len(found) > 1)
            inputs.notes.append(f"{_shown(top)}: {len(found)} {kind}{plural} {outcome}: {listed(found)}")
    if len(inputs.files) == before and len(inputs.problems) == problems:
        expected = ", ".join((*IMAGE_SUFFIXES, *VIDEO_SUFFIXES))
        inputs.problems.append(f"{_shown(top)}: expected pictures or videos in this folder ({expected}), got none")


def _is_read(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES or is_video(path)


def _is_entered(folder: Path, excluded: Path | None) -> bool:
    hidden, link = folder.name.startswith("."), folder.is_symlink()
    return not hidden and not link and (excluded is None or not same_folder(folder, excluded))


def _inside(top: Path, path: Path) -> str:
    return printable(str(path.relative_to(top)))


def _shown(path: Path) -> str:
    return printable(str(path))
