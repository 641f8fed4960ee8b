"""Errors in single images: which images are worst, which boxes are wrong, and which annotations may be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from retinanet.detection.coco_input import CocoInput
from retinanet.detection.score_curves import IOU, at_iou_50, codes

# A detection with a lower score says little about the annotations.
_SUSPICIOUS_SCORE = 0.5


class ImageErrors(NamedTuple):
    """The errors in one image at a score threshold.

    `image` is the position of the image in the sorted ids.
    """

    image: int
    true_positives: int
    false_positives: int
    false_negatives: int
    f1: float


class Suspicion(NamedTuple):
    """A detection with a high score that contradicts the annotations, which may therefore be wrong."""

    image: int  # position in the sorted ids
    kind: str  # `wrong_label` or `missing_annotation`
    detected: str  # class of the detection
    annotated: str | None  # class of the object at the same place, if any
    score: float


@dataclass(frozen=True)
class ErrorList:
    """The errors of an evaluation at a score threshold.

    Attributes:
        images: The images with errors, worst first: by F1, then by the number of errors.
        suspicions: Annotations that may be wrong, those with the highest score first.
    """

    images: Sequence[ImageErrors]
    suspicions: Sequence[Suspicion]


@dataclass(frozen=True, eq=False)
class ImageMatches:
    """Boxes of one image. A crowd, and a detection of a crowd, count neither as right nor as wrong.

    Attributes:
        objects: float `[M, 4]` x, y, width, height of the objects.
        found: `[M]` 1 for an object that is found, 0 for one that is missed, -1 for a crowd.
        object_labels: `[M]` their classes, as positions in the sorted ids.
        detections: float `[D, 4]` x, y, width, height of the detections.
        correct: `[D]` 1 for a correct detection, 0 for a wrong one, -1 for one of a crowd.
        labels: `[D]` their classes.
        scores: `[D]` their scores.
    """

    objects: NDArray[Any]
    found: NDArray[np.int8]
    object_labels: NDArray[Any]
    detections: NDArray[Any]
    correct: NDArray[np.int8]
    labels: NDArray[Any]
    scores: NDArray[Any]


def list_errors(content: CocoInput) -> ErrorList:
    """Return the errors of all detections of an evaluation's input, as hotcoco finds them at IoU 0.5."""
    images: list[ImageErrors] = []
    suspicions: list[Suspicion] = []
    for chunk in content.chunks():
        found = at_iou_50(chunk).image_diagnostics(iou_thr=IOU, score_thr=_SUSPICIOUS_SCORE)
        for number, entry in found["img_summary"].items():
            if entry["fp"] or entry["fn"]:
                images.append(ImageErrors(number - 1, entry["tp"], entry["fp"], entry["fn"], entry["f1"]))
        for entry in found["label_errors"]:
            names = entry["dt_category"], entry["gt_category"]
            suspicions.append(Suspicion(entry["image_id"] - 1, entry["type"], *names, entry["dt_score"]))
    images.sort(key=lambda entry: (entry.f1, -entry.false_positives - entry.false_negatives, entry.image))
    suspicions.sort(key=lambda entry: (-entry.score, entry.image))
    return ErrorList(images, suspicions)


def match_image(content: CocoInput, image: int) -> ImageMatches:
    """Return which objects and detections of one image match.

    Args:
        content: Ground truth and detections.
        image: Position of the image in the sorted ids.
    """
    content = content.between(image, image + 1)
    found = at_iou_50(content).image_diagnostics(iou_thr=IOU)
    objects, detections = content.objects, content.detections
    return ImageMatches(
        objects.bboxes,
        codes(found["gt_status"], "matched", len(objects.images)),
        objects.labels,
        detections.bboxes,
        codes(found["dt_status"], "tp", len(detections.images)),
        detections.labels,
        detections.values,
    )
