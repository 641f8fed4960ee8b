"""Ground truth and detections side by side as arrays, and as the evaluators of pycocotools and hotcoco."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import hotcoco
import numpy as np
import torch
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from retinanet.detection.detection_table import DetectionTable
from retinanet.model.targets import ImageDetections

#: Objects and detections that are evaluated together. It bounds the memory that an evaluation takes at a time.
CHUNK_ROWS = 5_000


class Rows(NamedTuple):
    """Boxes of some images, sorted by image; within an image in the order of their source."""

    images: NDArray[Any]  # [R] positions in the sorted ids
    labels: NDArray[Any]  # [R] positions in the sorted ids
    bboxes: NDArray[Any]  # [R, 4] x, y, width, height in pixels
    values: NDArray[Any]  # [R] areas of objects, scores of detections
    crowds: NDArray[np.bool_]  # [R]

    @classmethod
    def sorted_by_image(cls, images: NDArray[Any], *columns: NDArray[Any]) -> Rows:
        """Return rows from columns in any order of images."""
        # The sort is stable, because the order within an image decides between equal scores.
        order = np.argsort(images, kind="stable")
        return cls(images[order], *(column[order] for column in columns))

    def take(self, rows: Any) -> Rows:
        """Return some of the rows, by a slice, positions or a mask."""
        return Rows(*(column[rows] for column in self))


@dataclass(frozen=True, eq=False)
class CocoInput:
    """What an evaluation compares. Images and categories are in ascending order of their ids, as COCO tools visit them.

    Attributes:
        image_ids: Id of each image.
        category_ids: Id of each category.
        class_names: Name of each category.
        objects: The ground truth.
        detections: The detections.
        first, last: The positions of the images that take part, half-open.
    """

    image_ids: Sequence[int]
    category_ids: Sequence[int]
    class_names: Sequence[str]
    objects: Rows
    detections: Rows
    first: int
    last: int

    @classmethod
    def from_coco(cls, content: dict[str, Any], detections: DetectionTable | Sequence[dict[str, Any]]) -> CocoInput:
        """Return the input of an evaluation.

        Args:
            content: COCO content with `images`, `categories` and `annotations`.
            detections: Detections in its images, as a table or as COCO results.

        Raises:
            ValueError: A detection has the id of no image or of no category.
        """
        image_ids = sorted(image["id"] for image in content["images"])
        names = {category["id"]: str(category["name"]) for category in content["categories"]}
        category_ids = sorted(names)
        image_of = {identity: place for place, identity in enumerate(image_ids)}
        label_of = {identity: place for place, identity in enumerate(category_ids)}
        annotations = content["annotations"]
        objects = Rows.sorted_by_image(
            np.array([image_of[a["image_id"]] for a in annotations], np.intp),
            np.array([label_of[a["category_id"]] for a in annotations], np.intp),
            np.array([a["bbox"] for a in annotations], np.float64).reshape(-1, 4),
            np.array([a["area"] for a in annotations], np.float64),
            np.array([bool(a.get("iscrowd", 0)) for a in annotations], np.bool_),
        )
        if not isinstance(detections, DetectionTable):
            detections = DetectionTable.from_results(image_ids, category_ids, detections)
        found = Rows.sorted_by_image(
            np.array([image_of[identity] for identity in detections.image_ids], np.intp)[detections.images],
            np.array([label_of[identity] for identity in detections.category_ids], np.intp)[detections.labels],
            detections.bboxes,
            detections.scores,
            np.zeros(len(detections), np.bool_),
        )
        return cls(image_ids, category_ids, [names[i] for i in category_ids], objects, found, 0, len(image_ids))

    @classmethod
    def of_one_class(cls, objects: Sequence[Tensor], detections: Sequence[ImageDetections]) -> CocoInput:
        """Return the input for boxes of a single class, or of classes that are taken together.

        Args:
            objects: `[M_i, 4]` xyxy boxes of the objects in each image.
            detections: The detections in each image, on the CPU.
        """

        def rows(boxes: Sequence[Tensor], values: Sequence[Tensor]) -> Rows:
            images = np.repeat(np.arange(len(boxes)), [len(part) for part in boxes])
            corners = torch.cat(list(boxes)).numpy()
            bboxes = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)
            zeros = np.zeros(len(images), np.intp)
            return Rows(images, zeros, bboxes, torch.cat(list(values)).numpy(), zeros.astype(np.bool_))

        areas = [(boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) for boxes in objects]
        found = rows([image.boxes for image in detections], [image.scores for image in detections])
        return cls(range(len(objects)), [0], ["object"], rows(objects, areas), found, 0, len(objects))

    def chunks(self, rows: int = CHUNK_ROWS) -> Iterator[CocoInput]:
        """Yield the images in parts of about so many objects and detections; an image is never split."""
        counts = sum(np.bincount(part.images, minlength=self.last) for part in (self.objects, self.detections))
        ends = np.flatnonzero(np.diff(np.cumsum(counts) // rows)) + 1
        for first, last in zip([self.first, *ends], [*ends, self.last], strict=True):
            yield self.between(int(first), int(last))

    def between(self, first: int, last: int) -> CocoInput:
        """Return the input of the images at some positions in the sorted ids, half-open."""
        parts = (self.objects, self.detections)
        bounds = (slice(*np.searchsorted(part.images, [first, last])) for part in parts)
        objects, detections = (part.take(rows) for part, rows in zip(parts, bounds, strict=True))
        return replace(self, objects=objects, detections=detections, first=first, last=last)

    def above(self, score: float) -> CocoInput:
        """Return the same input without the detections whose scores are not above a threshold."""
        return replace(self, detections=self.detections.take(self.detections.values > score))

    def hotcoco(self) -> Any:
        """Return hotcoco's evaluator, in which all ids are positions counted from 1."""
        images = [{"id": place + 1} for place in range(self.first, self.last)]
        categories = [{"id": label + 1, "name": name} for label, name in enumerate(self.class_names)]
        objects, found = self.objects, self.detections
        truth = hotcoco.COCO.from_arrays(
            images,
            categories,
            objects.images + 1,
            objects.labels + 1,
            objects.bboxes,
            area=objects.values,
            iscrowd=objects.crowds,
        )
        columns = [found.images + 1, found.bboxes, found.values, found.labels + 1]
        results = np.column_stack([column.astype(np.float64) for column in columns])
        return hotcoco.COCOeval(truth, truth.load_res(results), "bbox")

    def pycocotools(self) -> COCOeval:
        """Return pycocotools' evaluator, with the ids of the source."""
        objects, found = self.objects, self.detections
        bboxes = found.bboxes.astype(np.float64)
        areas = bboxes[:, 2] * bboxes[:, 3]
        truth, results = self._coco(objects, objects.bboxes, objects.values), self._coco(found, bboxes, areas)
        for entry, score in zip(results.dataset["annotations"], found.values.tolist(), strict=True):
            entry["score"] = score
        return COCOeval(truth, results, "bbox")

    def _coco(self, rows: Rows, bboxes: NDArray[np.float64], areas: NDArray[np.float64]) -> COCO:
        coco = COCO()
        columns = (column.tolist() for column in (rows.images, rows.labels, bboxes, areas, rows.crowds))
        coco.dataset = {
            "images": [{"id": identity} for identity in self.image_ids[self.first : self.last]],
            "categories": [{"id": identity} for identity in self.category_ids],
            # The ids count from 1, because pycocotools takes the id 0 for "unmatched".
            "annotations": [
                {
                    "id": number,
                    "image_id": self.image_ids[image],
                    "category_id": self.category_ids[label],
                    "bbox": bbox,
                    "area": area,
                    "iscrowd": int(crowd),
                }
                for number, (image, label, bbox, area, crowd) in enumerate(zip(*columns, strict=True), start=1)
            ],
        }
        coco.createIndex()
        return coco
