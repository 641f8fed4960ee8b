"""Collects what is wrong with a data set, so that one run reports the first few entries and the count."""

from __future__ import annotations

from retinanet.common.errors import DataError

SHOWN = 5


class Problems:
    """A list of one-line complaints about one annotation file or folder."""

    def __init__(self, source: object) -> None:
        """An empty list about the file or folder `source`."""
        self.source = source
        self.lines: list[str] = []

    def add(self, where: str, reason: str) -> None:
        """Notes that the entry `where` ("file: entry") is wrong for `reason`."""
        self.lines.append(f"{where}: {reason}")

    def raise_if_any(self) -> None:
        """Raises the complaints as one error.

        Raises:
            DataError: there are any. One line each for the first five, then one with the count if there are
                more.
        """
        if not self.lines:
            return
        shown = self.lines[:SHOWN]
        if len(self.lines) > SHOWN:
            shown.append(f"{self.source}: {len(self.lines)} wrong entries in all, the first {SHOWN} are above")
        raise DataError("\n".join(shown))
