"""Debian packages that tests make."""

import io
import tarfile
from pathlib import Path


def ar_member(name: str, content: bytes) -> bytes:
    """Return a member of an `ar` archive, padded to an even length."""
    header = f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n"
    return header.encode() + content + b"\n" * (len(content) % 2)


def make_debian_package(path: Path, files: dict[str, bytes], data_name: str = "data.tar.xz") -> None:
    """Write a Debian package with files by name; the members before them have odd lengths."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:xz") as archive:
        folder = tarfile.TarInfo("./usr/")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for name, content in files.items():
            entry = tarfile.TarInfo("./" + name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    members = (("debian-binary", b"2.0"), ("control.tar.xz/", b"odd"), (data_name, data.getvalue()))
    path.write_bytes(b"!<arch>\n" + b"".join(ar_member(*member) for member in members))
