"""Collected problems of a data set, so that one run reports the first few wrong entries and the count."""

from __future__ import annotations

from retinanet.common.errors import DataError

#: Wrong entries that an error shows.
SHOWN = 5


class Problems:
    """One-line problems of one annotation file or folder."""

    def __init__(self, source: object) -> None:
        """Start without problems of the file or folder `source`."""
        self.source = source
        self.lines: list[str] = []

    def add(self, where: str, reason: str) -> None:
        """Add the problem of the entry `where` ("file: entry")."""
        self.lines.append(f"{where}: {reason}")

    def raise_if_any(self) -> None:
        """Raise the problems as one error.

        Raises:
            DataError: There are problems. The message has one line for each of the first five, then a line with the
                count if there are more.
        """
        if not self.lines:
            return
        shown = self.lines[:SHOWN]
        if len(self.lines) > SHOWN:
            shown.append(
                f"{self.source}: {len(self.lines)} wrong entries in total, of which the first {SHOWN} are shown"
            )
        raise DataError("\n".join(shown))
