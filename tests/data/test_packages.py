"""Reading Debian packages."""

from pathlib import Path

import pytest
from package_cases import make_debian_package

from retinanet.common.errors import DataError
from retinanet.data.packages import read_debian_package

FILES = {"usr/a.png": b"a" * 1001, "usr/b.txt": b"b", "usr/c.png": b""}


def test_the_wanted_files_are_read(tmp_path: Path) -> None:
    package = tmp_path / "x.deb"
    make_debian_package(package, FILES)
    assert read_debian_package(package, lambda name: name.endswith(".png")) == {
        "usr/a.png": b"a" * 1001,
        "usr/c.png": b"",
    }


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ("other file", "no ar archive"),
        ("zst", r"no member data\.tar\.xz"),
        ("header", "invalid literal"),
        ("cut", "Compressed file ended before the end-of-stream marker was reached"),
        ("content", "Input format not supported"),
    ],
)
def test_a_damaged_package_is_refused(tmp_path: Path, damage: str, reason: str) -> None:
    package = tmp_path / "x.deb"
    make_debian_package(package, FILES, "data.tar.zst" if damage == "zst" else "data.tar.xz")
    content = package.read_bytes()
    if damage == "other file":
        package.write_bytes(b"PK")
    elif damage == "header":
        package.write_bytes(content.replace(b"3         `", b"x         `", 1))
    elif damage == "cut":
        package.write_bytes(content[:-60])
    elif damage == "content":
        package.write_bytes(content.replace(b"\xfd7zXZ", b"\xfd8zXZ"))
    with pytest.raises(DataError, match=rf"x\.deb: not a Debian package with data\.tar\.xz \({reason}"):
        read_debian_package(package, lambda _: True)
