"""The folder of a sample: it is made as a whole, lists the sums of its files, and never replaces a user's files."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from retinanet.common.errors import UsageError
from retinanet.common.files import replacing_folder, write_json
from retinanet.data.packages import sha256

_MANIFEST = "sample.json"


def make_sample(dest: Path, name: str, recipe: list[Any], build: Callable[[Path, Path], None]) -> bool:
    """Make the folder of a sample, or verify the one that is already there.

    An interrupted call leaves no partial folder. A second call hashes every file and builds nothing.

    Args:
        dest: The folder. An existing folder must be empty or hold this sample; one that is damaged, or was made by
            another recipe, is replaced.
        name: Name of the sample, which its manifest states.
        recipe: Everything that decides the content, as JSON values.
        build: Writes the content. It receives the folder to fill, which will become `dest`, and a folder for temporary
            files.

    Returns:
        Whether a complete sample was already there.

    Raises:
        UsageError: `dest` is a file, holds files that do not belong to the sample, or cannot be written.
    """
    if _is_whole(dest, name, recipe):
        return True
    _check_replaceable(dest, name)
    try:
        with replacing_folder(dest) as building, tempfile.TemporaryDirectory() as scratch:
            build(building, Path(scratch))
            sums = {path.relative_to(building).as_posix(): sha256(path) for path in _files(building)}
            write_json(building / _MANIFEST, {"sample": name, "recipe": recipe, "sha256": sums})
    except OSError as error:
        raise UsageError(f"{dest}: the sample cannot be written ({error.strerror or error})") from error
    return False


def _files(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file())


def _manifest(dest: Path, name: str) -> dict[str, Any]:
    """Return the content of the manifest, or an empty dict if there is none of this sample that can be read."""
    try:
        manifest = json.loads((dest / _MANIFEST).read_text(encoding="utf-8"))
        return manifest if manifest["sample"] == name and isinstance(manifest["sha256"], dict) else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _is_whole(dest: Path, name: str, recipe: list[Any]) -> bool:
    manifest = _manifest(dest, name)
    if manifest.get("recipe") != recipe:
        return False
    sums = manifest["sha256"]
    return all((dest / file).is_file() and sha256(dest / file) == value for file, value in sums.items())


def _check_replaceable(dest: Path, name: str) -> None:
    """Raise UsageError if the destination holds anything but this sample."""
    if not dest.exists():
        return
    if not dest.is_dir():
        raise UsageError(f"{dest}: expected a folder as destination, got a file")
    if not os.access(dest, os.R_OK | os.X_OK):
        raise UsageError(f"{dest}: no permission to read this folder")
    ours = set(_manifest(dest, name).get("sha256", ())) | {_MANIFEST}
    others = [file for path in _files(dest) if (file := path.relative_to(dest).as_posix()) not in ours]
    if others:
        raise UsageError(f"{dest}: {others[0]}: not part of the sample; choose a new or empty folder")
