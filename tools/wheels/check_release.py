"""Checks that a folder holds what a release uploads: one sdist, one wheel for each platform, of the version of the tag.

python -m tools.wheels.check_release v0.1.0 dist
"""

from __future__ import annotations

import argparse
import re
import sys
import zipfile
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
#: The CUDA majors of each wheel, by the pattern of its platform.
PLATFORMS = {
    "*manylinux_2_28_x86_64*": {"12", "13"},
    "*manylinux_2_28_aarch64*": set(),
    "macosx_*_arm64": set(),
}


def project_version() -> str:
    """Return the version in pyproject.toml."""
    match = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert match is not None
    return match[1]


def release_faults(tag: str, version: str, dist: Path) -> list[str]:
    """Return what is wrong with the files of a release, one line for each fault.

    Args:
        tag: The tag of the release, "v" and the version.
        version: The version of the project.
        dist: The folder with the files to upload.

    Returns:
        The faults. Each names a file or the tag.
    """
    faults = [] if tag == f"v{version}" else [f"the tag is {tag}, but pyproject.toml has version {version}"]
    names = {path.name for path in dist.iterdir()}
    expected = {f"retinanet_ops-{version}.tar.gz"}
    if missing := expected - names:
        faults.append(f"{dist} lacks {', '.join(missing)}")
    for platform, majors in PLATFORMS.items():
        found = sorted(name for name in names if fnmatch(name, f"retinanet_ops-{version}-py3-none-{platform}.whl"))
        if len(found) != 1:
            faults.append(f"{dist} needs one wheel for {platform}, found {found or 'none'}")
        for name in found:
            with zipfile.ZipFile(dist / name) as wheel:
                built = set(re.findall(r"retinanet_ops/_cuda(\d+)\.so", "\n".join(wheel.namelist())))
            if built != majors:
                faults.append(f"{name} holds kernels for CUDA {sorted(built)}, expected {sorted(majors)}")
        expected |= set(found)
    return faults + [f"{name} does not belong to the release" for name in sorted(names - expected)]


def main() -> int:
    """Check the folder of the command line and print the faults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tag", metavar="TAG", help="tag of the release, such as v0.1.0")
    parser.add_argument("dist", type=Path, metavar="DIR", help="folder with the files to upload")
    arguments = parser.parse_args()
    try:
        faults = release_faults(arguments.tag, project_version(), arguments.dist)
    except (OSError, zipfile.BadZipFile) as error:
        print(f"wheels.check_release: {error}", file=sys.stderr)
        return 2
    print("\n".join(faults) or f"{arguments.dist} holds the release {arguments.tag}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
