"""Errors that a user can cause, and the exit code that the command line gives each.

Every line of a message names the file, the entry in it and the reason, so that the command line can print the message
as it is. Any other exception is a defect of the program and keeps its traceback.
"""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from typing import Any


class RetinaNetError(Exception):
    """Base of the errors with an exit code. The command line returns `exit_code`."""

    exit_code = 1


class UsageError(RetinaNetError):
    """A command or an option is wrong, such as an unknown value or an output path that cannot be written."""

    exit_code = 2


class DataError(RetinaNetError):
    """The input is wrong. The message reads "file: entry: reason", one line for each wrong entry."""

    exit_code = 3


class DivergedError(RetinaNetError):
    """The training loss or the gradient is not finite."""

    exit_code = 4


class ConfigError(ValueError):
    """A field of a configuration, of training options or of a transform is wrong.

    The message names the field, what it accepts and the value that was given. The command line turns this error into
    a `UsageError` or a `DataError`, depending on the source of the value.
    """


def one_line(error: Exception) -> str:
    """Return the message of another library's error as one line of at most 200 characters."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def printable(text: str, limit: int = 300) -> str:
    """Return a text from a file as a part of one line.

    Args:
        text: Any text.
        limit: Longest result; of a longer text, the middle is left out.

    Returns:
        The text with control characters, line breaks and lone surrogates escaped, so that any terminal can show it.
    """
    if not text.isprintable():
        text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[: 2 * limit])
    if len(text) <= limit:
        return text
    half = (limit - 5) // 2
    return f"{text[:half]} ... {text[-half:]}"


def shown(value: Any) -> str:
    """Return the `repr` of a value from a file, with long and deeply nested parts left out."""
    return _short.repr(value)


_short = reprlib.Repr()
_short.maxstring = _short.maxother = 80


def first_mismatch(error: RuntimeError) -> str:
    """Return the first mismatch that `load_state_dict` reports, which is the second line of its message."""
    reason = str(error).splitlines()[1:2] or [str(error)]
    return reason[0].strip()[:200]


def listed(names: Sequence[str]) -> str:
    """Return the first eight names, separated by commas, and the total if there are more than eight."""
    return ", ".join(names[:8]) + (f", ... ({len(names)} in all)" if len(names) > 8 else "")
