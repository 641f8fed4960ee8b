"""Merges wheels that were built for different CUDA major versions into one wheel that holds the libraries of all.

    python -m tools.wheels.merge --output-dir dist cuda12/*.whl cuda13/*.whl

The wheels must have the same file name and the same contents, except for the CUDA libraries and the build information.
The loader of the package chooses the library by `torch.version.cuda` (retinanet_ops/_library.py).
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from tools.wheels.archive import CUDA_LIBRARIES, INFO, WheelError, pack, read_build_info, unpack


def _common_files(contents: Path) -> dict[str, bytes]:
    """Return the files that must be the same in every wheel."""
    own = {contents / INFO, *contents.glob(CUDA_LIBRARIES), *contents.glob("*.dist-info/RECORD")}
    paths = (path for path in sorted(contents.rglob("*")) if path.is_file() and path not in own)
    return {path.relative_to(contents).as_posix(): path.read_bytes() for path in paths}


def _read_info(wheel: Path, contents: Path) -> dict[str, Any]:
    """Return the build information of a wheel that has a CUDA library."""
    info = read_build_info(wheel, contents)
    if not info["cuda_builds"]:
        raise WheelError(f"{wheel} has no CUDA library ({info['cuda_omitted']}); pass wheels built with CUDA")
    return info


def _common_info(info: dict[str, Any]) -> dict[str, Any]:
    """Return the build information without the CUDA builds and without the CUDA version in torch's local version."""
    return {key: value for key, value in info.items() if key != "cuda_builds"} | {"torch": info["torch"].split("+")[0]}


def merge(wheels: list[Path], output_dir: Path) -> Path:
    """Merge wheels.

    Args:
        wheels: At least two wheels with different CUDA libraries and otherwise the same contents.
        output_dir: Folder of the merged wheel, which has the file name of the given ones. It is created if missing.

    Returns:
        The path of the merged wheel.

    Raises:
        WheelError: The wheels differ in more than their CUDA libraries, one of them has none, two have the same one, or
            the merged wheel would overwrite one of them.
    """
    if len(wheels) < 2:
        raise WheelError(f"expected at least two wheels, got {len(wheels)}")
    output = output_dir / wheels[0].name
    for wheel in wheels:
        if wheel.name != output.name:
            raise WheelError(f"the wheels must have one file name, got {output.name} and {wheel.name}")
        if output.exists() and output.samefile(wheel):
            raise WheelError(f"{wheel} would be overwritten; choose another --output-dir")
    with tempfile.TemporaryDirectory() as name:
        unpacked = [unpack(wheel, Path(name, str(index))) for index, wheel in enumerate(wheels)]
        target, files = unpacked[0], _common_files(unpacked[0])
        merged = _read_info(wheels[0], target)
        for wheel, contents in zip(wheels[1:], unpacked[1:], strict=True):
            info, others = _read_info(wheel, contents), _common_files(contents)
            if different := sorted(path for path in files | others if files.get(path) != others.get(path)):
                raise WheelError(f"{wheels[0]} and {wheel} differ in {', '.join(different)}")
            if _common_info(info) != _common_info(merged):
                raise WheelError(f"{INFO} of {wheels[0]} and {wheel} differ: {merged} and {info}")
            if both := sorted(set(info["cuda_builds"]) & set(merged["cuda_builds"])):
                raise WheelError(f"{wheel} has a library for CUDA {', '.join(both)}, which another wheel has, too")
            merged["cuda_builds"] |= info["cuda_builds"]
            for library in contents.glob(CUDA_LIBRARIES):
                shutil.copy2(library, target / library.relative_to(contents))
        merged = _common_info(merged) | {"cuda_builds": dict(sorted(merged["cuda_builds"].items()))}
        (target / INFO).write_text(json.dumps(merged, indent=2) + "\n")
        pack(target, output_dir)
    return output


def main() -> int:
    """Merge the wheels of the command line and print the path of the merged one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheels", type=Path, nargs="+", metavar="WHEEL", help="one wheel for each CUDA major version")
    parser.add_argument("--output-dir", type=Path, required=True, metavar="DIR", help="folder for the merged wheel")
    arguments = parser.parse_args()
    try:
        print(merge(arguments.wheels, arguments.output_dir))
    except (WheelError, OSError) as error:
        print(f"wheels.merge: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
