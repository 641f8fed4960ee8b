"""Unpacks and packs wheels with the library `wheel`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


class WheelError(Exception):
    """A wheel cannot be read, made or merged. The message names the wheel and the reason."""


def _wheel(command: str, path: Path, option: str, dest: Path) -> None:
    arguments = [sys.executable, "-m", "wheel", command, str(path), option, str(dest)]
    result = subprocess.run(arguments, capture_output=True, text=True, check=False)
    if result.returncode:
        raise WheelError(f"`wheel {command} {path}` failed: {(result.stderr or result.stdout).strip()}")


def unpack(wheel: Path, folder: Path) -> Path:
    """Unpack a wheel into an empty folder, compare its files with RECORD, and return the folder of its contents."""
    _wheel("unpack", wheel, "--dest", folder)
    (contents,) = folder.iterdir()
    return contents


def pack(contents: Path, output_dir: Path) -> None:
    """Write the wheel of an unpacked one, with a new RECORD, into a folder, which is created if missing."""
    output_dir.mkdir(parents=True, exist_ok=True)
    _wheel("pack", contents, "--dest-dir", output_dir)
