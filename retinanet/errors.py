"""The errors that a user can cause, and the exit code that the command line gives each.

Every message is one line that names the file, the entry in it and the reason, so that the command line
can print it as it is. Anything else that escapes is a defect of the program and keeps its traceback.
"""

from __future__ import annotations


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
