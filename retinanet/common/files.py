"""Atomic writing of files and folders: an interrupted program leaves no half-written output."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from retinanet.common.errors import DataError, UsageError, one_line


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary file that replaces `path` when the block ends, and is removed when the block raises.

    A symbolic link stays, and the file that it leads to is replaced. A device, a pipe or another special file, such as
    `/dev/stdout`, stays as well and receives the content.

    Raises:
        OSError: The file cannot be written. `filename` names it, also where the operating system does not, as with a
            full disk.
    """
    if is_special_file(path):
        with tempfile.TemporaryDirectory() as folder:
            temporary = Path(folder) / (path.name or "output")
            yield temporary
            with temporary.open("rb") as source, path.open("wb") as target:
                shutil.copyfileobj(source, target)
        return
    if path.is_symlink():
        path = path.resolve()
    handle, name = tempfile.mkstemp(prefix=_temporary_prefix(path), suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        with writing(path, name):
            yield temporary
            # mkstemp makes private files; the result must have the usual permissions.
            temporary.chmod(0o666 & ~_umask())
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def writing(path: Path, temporary: str | None = None) -> Iterator[None]:
    """Name a file in the errors of a block that writes it; the operating system does not, as with a full disk.

    Args:
        path: The file.
        temporary: Name of the file that is written in its place, if any.

    Raises:
        OSError: The error of the block, with `filename`.
    """
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename in (None, temporary):
            error.filename, error.filename2 = str(path), None
        raise


def reserve(folder: Path, sizes: Sequence[int]) -> None:
    """Check that files of some sizes, in bytes, can be written into a folder at the same time.

    The room is allocated and then given back, which a file system does without writing it.

    Raises:
        OSError: There is no room, or files may not be that large. `filename` names the folder.
    """
    with writing(folder), contextlib.ExitStack() as stack:
        for size in sizes:
            # A name that `replacing` could use, so that whoever removes its leftovers removes this one, too.
            file = stack.enter_context(tempfile.NamedTemporaryFile(prefix=".room.", suffix=".tmp", dir=folder))
            try:
                os.posix_fallocate(file.fileno(), 0, max(1, size))
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # File systems that cannot allocate room.
                    raise


def check_readable(path: Path) -> None:
    """Refuse a pipe, a device or a socket as input, because opening or reading one may never end.

    Open files that the command line names, such as `/dev/stdin` and the `/dev/fd/63` of a shell, are accepted.

    Raises:
        OSError: The path leads to such a file, or cannot be examined.
        ValueError: The path is none that a file system can have.
    """
    mode = os.stat(path).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or _is_open_file(path)):
        raise OSError(errno.EINVAL, "expected a file, got a pipe, a device or a socket", str(path))


def is_special_file(path: Path) -> bool:
    """Return whether a path leads to a device, a pipe or a socket, which can be written but must not be replaced.

    Standard output and other open files (`/dev/stdout`, `/dev/fd/3`) count as special although they may be regular
    files, because whoever opened them would not see a file that replaces them.
    """
    if _is_open_file(path):
        return True
    return path.exists() and not path.is_file() and not path.is_dir()


def _is_open_file(path: Path) -> bool:
    return os.path.abspath(path).startswith(("/dev/std", "/dev/fd/", "/proc/"))


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that replaces `path` when the block ends, and is removed when the block raises.

    A symbolic link stays, and the folder that it leads to is replaced.
    """
    if path.is_symlink():
        path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=_temporary_prefix(path), suffix=".tmp", dir=path.parent))
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        if path.exists():
            old = Path(tempfile.mkdtemp(prefix=_temporary_prefix(path), suffix=".old", dir=path.parent))
            path.rename(old / path.name)
            temporary.rename(path)
            shutil.rmtree(old)
        else:
            temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_text(path: Path) -> str:
    """Return the content of a text file in UTF-8, or in UTF-16 or UTF-32, with or without a byte-order mark.

    Raises:
        DataError: The file is missing, is a folder, may not be read, or has another encoding.
    """
    try:
        check_readable(path)
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: {unreadable(error)}") from error
    try:
        return data.decode(json.detect_encoding(data))
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: expected text in UTF-8, got something else; save it as UTF-8") from error


def unreadable(error: Exception) -> str:
    """Return why a file could not be opened, for messages: "no such file" or "cannot be read (...)"."""
    if isinstance(error, FileNotFoundError):
        return "no such file"
    # A name with a NUL character or a lone surrogate raises ValueError.
    return f"cannot be read ({getattr(error, 'strerror', None) or one_line(error)})"


def read_json(path: Path) -> Any:
    """Return the content of a JSON file.

    Raises:
        DataError: The file is missing, is a folder, may not be read, or is not JSON.
    """
    text = read_text(path)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: line {error.lineno}: not valid JSON: {error.msg}") from error
    except RecursionError as error:
        raise DataError(f"{path}: not usable JSON: lists or objects are nested too deeply") from error
    except ValueError as error:  # An integer of more than 4,300 digits.
        raise DataError(f"{path}: not usable JSON: {one_line(error)}") from error


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file atomically."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def output_folder(path: str | Path) -> Path:
    """Create a folder for output, with its parents, and return its path.

    Raises:
        UsageError: The path is a file or lies below one, or the folder cannot be created or written.
    """
    path = Path(path)
    check_output_folder(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{path}: the output folder cannot be created ({error.strerror})") from error
    return path


def new_output_folder(path: str | Path) -> Path:
    """Return the path of a folder that `replacing_folder` can create, without creating it.

    Raises:
        UsageError: The path is a file or a folder that is not empty, or the folder cannot be created or written.
    """
    path = Path(path)
    try:
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise UsageError(f"{path}: expected a new or empty folder")
        parent = path.resolve().parent
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: the output folder cannot be read ({one_line(error)})") from error
    check_output_folder(path)
    check_output_folder(parent)
    return path


def check_output_folder(path: Path) -> None:
    """Check that a folder can be created and written, without creating it.

    Raises:
        UsageError: The path is a file or lies below one, or there is no permission.
    """
    try:
        nearest = next(folder for folder in (path, *path.absolute().parents) if os.path.lexists(folder))
        if not nearest.is_dir():
            raise UsageError(f"{path}: expected a folder for the output, got a file or a path below a file")
    except OSError as error:
        raise UsageError(f"{path}: the output folder cannot be created ({error.strerror})") from error
    if not os.access(nearest, os.W_OK | os.X_OK):
        if os.statvfs(nearest).f_flag & os.ST_RDONLY:
            raise UsageError(f"{path}: the output folder lies on a read-only file system")
        if nearest == path:
            raise UsageError(f"{path}: no permission to write into the output folder")
        raise UsageError(f"{path}: the output folder cannot be created ({os.strerror(errno.EACCES)})")


def _temporary_prefix(path: Path) -> str:
    # The whole name and the random part of a temporary name could together be longer than the file system takes.
    return f".{path.name[:40]}."


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
