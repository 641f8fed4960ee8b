"""Detections in the images of a data set, as arrays: what an evaluation keeps of each image."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

#: Images, labels, boxes and scores of some detections, as in the attributes of `DetectionTable`.
Columns = tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]


@dataclass(frozen=True, eq=False)
class DetectionTable(Sequence[dict[str, Any]]):
    """Detections as columns of arrays. As a sequence, it is a list of COCO results.

    An item is a dict with `image_id`, `category_id`, `bbox` (x, y, width, height) and `score`, which is made when it is
    read. In the columns, a detection of a model takes 28 bytes.

    Attributes:
        image_ids: Id of each image of the data set.
        category_ids: Id of each category of the data set; the position is the label.
        images: int32 `[D]`, the image of each detection, as a position in `image_ids`.
        labels: int32 `[D]`, its label.
        bboxes: `[D, 4]`, its box as x, y, width, height in pixels, float32 or float64.
        scores: `[D]`, its score, float32 or float64.
    """

    image_ids: Sequence[int]
    category_ids: Sequence[int]
    images: NDArray[np.int32]
    labels: NDArray[np.int32]
    bboxes: NDArray[Any]
    scores: NDArray[Any]

    @classmethod
    def from_parts(
        cls,
        image_ids: Sequence[int],
        category_ids: Sequence[int],
        parts: Iterable[Columns],
    ) -> DetectionTable:
        """Concatenate columns.

        Args:
            image_ids: Id of each image.
            category_ids: Id of each category.
            parts: Any number of parts of the columns.
        """
        nothing = (np.empty(0, np.int32), np.empty(0, np.int32), np.empty((0, 4), np.float32), np.empty(0, np.float32))
        images, labels, bboxes, scores = (np.concatenate(column) for column in zip(nothing, *parts, strict=True))
        return cls(image_ids, category_ids, images.astype(np.int32), labels.astype(np.int32), bboxes, scores)

    @classmethod
    def from_results(
        cls, image_ids: Sequence[int], category_ids: Sequence[int], results: Sequence[dict[str, Any]]
    ) -> DetectionTable:
        """Return the table of COCO results, with float64 boxes and scores.

        Raises:
            ValueError: A result has the id of no image or of no category. The message has its position.
        """
        image_of = {identity: index for index, identity in enumerate(image_ids)}
        label_of = {identity: label for label, identity in enumerate(category_ids)}
        for index, result in enumerate(results):
            for key, known in (("image_id", image_of), ("category_id", label_of)):
                if result[key] not in known:
                    raise ValueError(f"detections[{index}]: {key} {result[key]!r} is not in the ground truth")
        return cls(
            image_ids,
            category_ids,
            np.array([image_of[result["image_id"]] for result in results], np.int32),
            np.array([label_of[result["category_id"]] for result in results], np.int32),
            np.array([result["bbox"] for result in results], np.float64).reshape(-1, 4),
            np.array([result["score"] for result in results], np.float64),
        )

    def __len__(self) -> int:
        """Return the number of detections."""
        return len(self.scores)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...

    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...

    def __getitem__(self, index: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        """Return one COCO result, or a list of several."""
        if isinstance(index, slice):
            return list(self.take(np.arange(len(self))[index]))
        return {
            "image_id": self.image_ids[self.images[index]],
            "category_id": self.category_ids[self.labels[index]],
            "bbox": self.bboxes[index].tolist(),
            "score": self.scores[index].item(),
        }

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield the COCO results."""
        return (self[index] for index in range(len(self)))

    def take(self, rows: NDArray[Any]) -> DetectionTable:
        """Return some of the rows, by their positions or by a mask."""
        columns = (column[rows] for column in (self.images, self.labels, self.bboxes, self.scores))
        return DetectionTable(self.image_ids, self.category_ids, *columns)


def merge_detections(tables: Sequence[DetectionTable]) -> DetectionTable:
    """Merge the tables of several processes, each of which has evaluated some images of one data set.

    The result does not depend on which process has evaluated which image: it equals the table of a single process that
    has evaluated all of them in the order of the data set. An image of several tables, such as one that a distributed
    sampler repeats to fill a batch, is taken from the first.

    Args:
        tables: At least one table. All must be of the same data set.

    Raises:
        ValueError: There is no table, or the tables are of different data sets.
    """
    if not tables:
        raise ValueError("tables: expected at least one, got none")
    first = tables[0]
    for index, table in enumerate(tables):
        for name in ("image_ids", "category_ids"):
            if list(getattr(table, name)) != list(getattr(first, name)):
                raise ValueError(f"tables[{index}]: its {name} differ from those of tables[0]")
    # Position of the first table that has each image.
    owner = np.full(len(first.image_ids), len(tables))
    for index in reversed(range(len(tables))):
        owner[tables[index].images] = index
    parts = [table.take(owner[table.images] == index) for index, table in enumerate(tables)]
    merged = DetectionTable.from_parts(
        first.image_ids, first.category_ids, ((t.images, t.labels, t.bboxes, t.scores) for t in parts)
    )
    return merged.take(np.argsort(merged.images, kind="stable"))
