"""Unpacks and packs wheels with the library `wheel`, and reads what they were built for."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

INFO = Path("retinanet_ops", "_build_info.json")
CUDA_LIBRARIES = "retinanet_ops/_cuda*.so"


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


def pack(contents: Path, output_dir: Path) -> Path:
    """Write the wheel of an unpacked one, with a new RECORD, into a folder, which is created if missing.

    Args:
        contents: The folder that `unpack` returned.
        output_dir: Folder of the wheel. A wheel of the same name is replaced once the new one is complete.

    Returns:
        The path of the wheel.

    Raises:
        WheelError: The wheel cannot be packed.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output_dir) as name:
        _wheel("pack", contents, "--dest-dir", Path(name))
        (packed,) = Path(name).iterdir()
        return packed.replace(output_dir / packed.name)


def read_build_info(wheel: Path, contents: Path) -> dict[str, Any]:
    """Return the build information of a wheel, after comparing it with the CUDA libraries in the wheel.

    Args:
        wheel: The wheel, for the messages.
        contents: The folder that `unpack` returned.

    Returns:
        What setup.py wrote into `_build_info.json`.

    Raises:
        WheelError: The wheel has no build information, or it lists other CUDA libraries than the wheel holds.
    """
    if not (contents / INFO).exists():
        raise WheelError(f"{wheel} has no {INFO}; build it with this repository's setup.py")
    info: dict[str, Any] = json.loads((contents / INFO).read_text())
    listed = {f"_cuda{major}.so" for major in info["cuda_builds"]}
    present = {path.name for path in contents.glob(CUDA_LIBRARIES)}
    if listed != present:
        raise WheelError(f"{wheel} holds the CUDA libraries {sorted(present)} but {INFO} lists {sorted(listed)}")
    return info
