"""The errors that a user can cause, and the exit code that the command line gives each.

Every message is one line that names the file, the entry in it and the reason, so that the command line
can print it as it is. Anything else that escapes is a defect of the program and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Sequence


class RetinaNetError(Exception):
    """Base of the errors below. `exit_code` is what the command line returns."""

    exit_code = 1


class UsageError(RetinaNetError):
    """The command or an option is wrong: an unknown value, an output path that cannot be written."""

    exit_code = 2


class DataError(RetinaNetError):
    """The input is wrong. The message reads "file: entry: reason", one line for each wrong entry."""

    exit_code = 3


class DivergedError(RetinaNetError):
    """The training loss is no longer finite."""

    exit_code = 4


def one_line(error: Exception) -> str:
    """What an error of another library says, fit for the end of a message: one line, of 200 characters at most."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def first_mismatch(error: RuntimeError) -> str:
    """The first thing that `load_state_dict` complains about; its own first line names the module only."""
    reason = str(error).splitlines()[1:2] or [str(error)]
    return reason[0].strip()[:200]


def listed(names: Sequence[str]) -> str:
    """Class names for a message: the first eight, and how many there are."""
    return ", ".join(names[:8]) + (f", ... ({len(names)} in all)" if len(names) > 8 else "")
