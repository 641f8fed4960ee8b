"""Findings in a data set: errors, which stop whatever uses the data, and faults that reading has mended.

What has one right reading is mended and counted. What is ambiguous is an error.
"""

from __future__ import annotations

from collections import Counter
from enum import Enum
from typing import Any, NamedTuple

from retinanet.common.errors import DataError, printable

#: Wrong entries that an error shows.
SHOWN = 5


class Kind(Enum):
    """A kind of finding: its name in the singular and the plural, and what reading does about it if it is mended."""

    # Errors.
    FILE = "unreadable annotation", "unreadable annotations"
    IMAGE = "unreadable image", "unreadable images"
    IMAGE_SIZE = "image of another size than stated", "images of another size than stated"
    IMAGE_ENTRY = "wrong image entry", "wrong image entries"
    ENTRY = "wrong annotation", "wrong annotations"
    BOX = "wrong box", "wrong boxes"
    CLASS = "wrong class", "wrong classes"
    TOO_ELONGATED = "image that resizing makes vanish", "images that resizing makes vanish"
    UNLEARNABLE = "set that cannot be learned from", "sets that cannot be learned from"
    # Faults that reading mends.
    NO_AREA = "box without area", "boxes without area", "left out"
    OVERHANG = "box that overhangs its image", "boxes that overhang their image", "clipped"
    OUTSIDE = "box outside its image", "boxes outside their image", "left out"
    SEGMENTATION = "annotation without box", "annotations without box", "boxed from the segmentation"
    REPEATED_ID = "annotation with a used id", "annotations with a used id", "numbered anew"
    HIDDEN = "hidden file", "hidden files", "left out"
    BACKSLASH = "file name with backslashes", "file names with backslashes", "read with slashes"
    LETTER_CASE = "file name in another case", "file names in another case", "matched"
    OTHER_FOLDER = "image stated in another folder", "images stated in another folder", "found by name"
    OTHER_NAME = "image of another name or suffix than stated", "images of another name or suffix than stated", "found"
    ENCODING = "file of an unknown encoding", "files of an unknown encoding", "read as UTF-8"
    DATA_PATH = "wrong path in the data file", "wrong paths in the data file", "found beside it"
    # What `retinanet check` points out although it is no fault.
    SAME_IMAGE = "image that equals another", "images that equal another"
    SAME_BOX = "box that equals another", "boxes that equal another"
    UNUSED_CLASS = "class without boxes", "classes without boxes"

    def __init__(self, one: str, many: str, remedy: str = "") -> None:
        """Take the parts of a member's value."""
        self.one, self.many, self.remedy = one, many, remedy

    def count(self, number: int) -> str:
        """Return a number of findings in words."""
        return f"{number} {self.one if number == 1 else self.many}"

    def count_mended(self, number: int) -> str:
        """Return a number of findings in words, and what was done about them."""
        return f"{self.count(number)} {self.remedy}"


class Finding(NamedTuple):
    """One finding.

    Attributes:
        kind: Its kind.
        where: "file: entry".
        reason: What is wrong.
    """

    kind: Kind
    where: str
    reason: str

    @classmethod
    def of(cls, kind: Kind, where: object, reason: str) -> Finding:
        """Return a finding whose texts may come from a file, so that they are made fit for one line."""
        return cls(kind, printable(str(where)), printable(reason))

    def __str__(self) -> str:
        """Return the finding as one line."""
        return f"{self.where}: {self.reason}"


class Problems:
    """The findings in one annotation file or folder.

    Attributes:
        source: The file or folder.
        strict: Whether faults that could be mended are errors.
        errors: The errors.
        mended: The faults that were mended.
        incomplete: Ids of the images with an object whose box, class or entry is wrong. Without its box, the object
            would be taken for background.
    """

    def __init__(self, source: object, *, strict: bool = False) -> None:
        """Start without findings.

        Args:
            source: The file or folder.
            strict: Whether faults that could be mended are errors.
        """
        self.source = source
        self.strict = strict
        self.errors: list[Finding] = []
        self.mended: list[Finding] = []
        self.incomplete: set[int] = set()

    def add(self, kind: Kind, where: str, reason: str, image_id: Any = None) -> None:
        """Add an error.

        Args:
            kind: Its kind.
            where: The entry, "file: entry".
            reason: What is wrong.
            image_id: Id of the image of a wrong annotation, whose boxes are then `incomplete`. It may be any value.
        """
        self.errors.append(Finding.of(kind, where, reason))
        if isinstance(image_id, int):
            self.incomplete.add(image_id)

    def mend(self, kind: Kind, where: str, reason: str) -> None:
        """Add a fault that the caller mends by `kind.remedy`; it is an error if the reading is strict."""
        if self.strict:
            self.add(kind, where, reason)
        else:
            self.mended.append(Finding.of(kind, where, reason))

    def counts(self) -> dict[Kind, int]:
        """Return the number of mended faults of each kind."""
        return dict(Counter(finding.kind for finding in self.mended))

    def raise_if_any(self) -> None:
        """Raise the errors as one.

        Raises:
            DataError: There are errors. The message has one line for each of the first five, then a line with the
                count if there are more.
        """
        if not self.errors:
            return
        lines = [str(finding) for finding in self.errors[:SHOWN]]
        if len(self.errors) > SHOWN:
            lines.append(
                f"{self.source}: {len(self.errors)} wrong entries in total, of which the first {SHOWN} are shown;"
                " `retinanet check` lists all of them"
            )
        raise DataError("\n".join(lines))
