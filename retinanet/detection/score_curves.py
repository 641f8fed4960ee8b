"""Precision, recall and F1 as functions of the score threshold, and the thresholds with the best F1.

hotcoco decides which detections are correct, by the rule of the COCO evaluation at IoU 0.5: in the order of their
scores, the detections of a class in an image each take the object with the highest IoU that is not taken yet. A
detection of a crowd counts neither as correct nor as wrong. Whether a detection is correct depends only on those with
higher scores, so one matching serves every threshold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from retinanet.detection.coco_input import CocoInput
from retinanet.model.thresholds import ScoreThresholds

#: Lowest IoU of a correct detection.
IOU = 0.5
#: Name of all classes together.
ALL = "all classes"


@dataclass(frozen=True)
class Counts:
    """Correct and wrong detections with scores above a threshold, and missed objects.

    Attributes:
        threshold: The score threshold.
        true_positives: Correct detections.
        false_positives: Wrong detections.
        false_negatives: Objects without a correct detection.
    """

    threshold: float
    true_positives: int
    false_positives: int
    false_negatives: int

    @property
    def precision(self) -> float | None:
        """Share of the detections that are correct; None if there are none."""
        return _ratio(self.true_positives, self.true_positives + self.false_positives)

    @property
    def recall(self) -> float | None:
        """Share of the objects that are found; None if there are none."""
        return _ratio(self.true_positives, self.true_positives + self.false_negatives)

    @property
    def f1(self) -> float | None:
        """Harmonic mean of precision and recall; None if there are neither objects nor detections."""
        wrong = self.false_positives + self.false_negatives
        return _ratio(2 * self.true_positives, 2 * self.true_positives + wrong)

    def to_dict(self) -> dict[str, float | int | None]:
        """Return the numbers as JSON values; an undefined one is None."""
        return {
            "threshold": self.threshold,
            "true_positives": self.true_positives,
            "false_positives": self.false_positives,
            "false_negatives": self.false_negatives,
            "precision": self.precision,
            "recall": self.recall,
            "f1": self.f1,
        }


@dataclass(frozen=True, eq=False)
class ScoreCurve:
    """Counts at every score threshold that makes a difference.

    Attributes:
        scores: `[T]`, the distinct scores of the detections, highest first.
        true_positives: `[T]`, correct detections with at least this score.
        false_positives: `[T]`, wrong detections with at least this score.
        objects: Number of objects.
    """

    scores: NDArray[Any]
    true_positives: NDArray[np.int64]
    false_positives: NDArray[np.int64]
    objects: int

    @classmethod
    def from_matches(cls, scores: NDArray[Any], correct: NDArray[Any], objects: int) -> ScoreCurve:
        """Return the curve of detections with these scores, of which some are correct."""
        order = np.argsort(-scores, kind="stable")
        scores, correct = scores[order], correct[order]
        # The last detection of each distinct score.
        ends = np.flatnonzero(np.append(scores[:-1] != scores[1:], len(scores) > 0))
        return cls(scores[ends], np.cumsum(correct)[ends], np.cumsum(~correct)[ends], objects)

    @property
    def precision(self) -> NDArray[np.float64]:  # [T]
        """Precision at each score."""
        return self.true_positives / (self.true_positives + self.false_positives)

    @property
    def recall(self) -> NDArray[np.float64]:  # [T]
        """Recall at each score; NaN if there are no objects."""
        return self.true_positives / (self.objects or np.nan)

    @property
    def f1(self) -> NDArray[np.float64]:  # [T]
        """F1 at each score."""
        # 2 TP + FP + FN is the number of detections and objects.
        return 2 * self.true_positives / (self.true_positives + self.false_positives + self.objects)

    def at(self, threshold: float) -> Counts:
        """Return the counts of the detections with scores above a threshold."""
        # Compare in the precision of the scores, as `detect` does.
        kept = int(np.count_nonzero(self.scores > self.scores.dtype.type(threshold)))
        right, wrong = (int(c[kept - 1]) if kept else 0 for c in (self.true_positives, self.false_positives))
        return Counts(float(threshold), right, wrong, self.objects - right)

    def best_threshold(self) -> float | None:
        """Return the threshold with the best F1, the highest of several; None if no detection is correct.

        It lies halfway between the lowest score that it keeps and the highest that it does not keep, or 0.
        """
        if not self.true_positives.any():
            return None
        best = int(np.argmax(self.f1))
        low = self.scores[best + 1] if best + 1 < len(self.scores) else self.scores.dtype.type(0)
        middle = low + (self.scores[best] - low) / 2
        return float(middle if middle < self.scores[best] else low)


@dataclass(frozen=True, eq=False)
class ScoreCurves:
    """The curves of an evaluation.

    Attributes:
        class_names: Classes of the data set, in the order of their ids.
        overall: The curve of all classes together: every detection and object counts once.
        by_class: The curve of each class.
    """

    class_names: Sequence[str]
    overall: ScoreCurve
    by_class: Sequence[ScoreCurve]

    def thresholds(self, class_names: Sequence[str]) -> ScoreThresholds | None:
        """Return the thresholds with the best F1 for a model with these classes, or None if nothing is correct."""
        overall = self.overall.best_threshold()
        if overall is None:
            return None
        best = {n: c.best_threshold() for n, c in zip(self.class_names, self.by_class, strict=True)}
        return ScoreThresholds(overall, tuple(best.get(name) for name in class_names))


class OperatingPoint(NamedTuple):
    """The counts of one class, or of all, at a score threshold."""

    name: str
    counts: Counts
    note: str  # where the threshold comes from


def operating_points(
    curves: ScoreCurves, thresholds: ScoreThresholds | None, class_names: Sequence[str]
) -> list[OperatingPoint]:
    """Return the counts that describe a model on a data set.

    Args:
        curves: The curves of the model on the data set.
        thresholds: The thresholds that the model carries, or None.
        class_names: Classes of the model.

    Returns:
        The counts of all classes at the model's threshold, and at the best one on this data set. With several classes,
        also those of each class at the model's threshold of the class, else its overall threshold, else the best one on
        this data set, else 0.
    """
    points = []
    best = curves.overall.best_threshold()
    if thresholds is not None:
        points.append(OperatingPoint(ALL, curves.overall.at(thresholds.overall), "threshold of the model"))
    if best is not None:
        points.append(OperatingPoint(ALL, curves.overall.at(best), "best F1 on this data set"))
    if not points:
        points.append(OperatingPoint(ALL, curves.overall.at(0.0), "no detection is correct"))
    if len(curves.class_names) == 1:
        return points
    for name, curve in zip(curves.class_names, curves.by_class, strict=True):
        candidates = [(curve.best_threshold(), "best F1 on this data set"), (0.0, "no detection is correct")]
        if thresholds is not None:
            of_class = thresholds.by_class[class_names.index(name)]
            candidates = [(of_class, "threshold of the model"), (thresholds.overall, "the model's, of all classes")]
        threshold, note = next((value, note) for value, note in candidates if value is not None)
        points.append(OperatingPoint(name, curve.at(threshold), note))
    return points


def score_curves(content: CocoInput) -> ScoreCurves:
    """Return precision, recall and F1 of detections over the score threshold, at IoU 0.5.

    Args:
        content: Ground truth and detections. All detections count, however many there are in an image.
    """
    # A detection of a crowd has no status.
    matches = np.concatenate(
        [
            codes(at_iou_50(chunk).image_diagnostics(iou_thr=IOU)["dt_status"], "tp", len(chunk.detections.values))
            for chunk in content.chunks()
        ]
    )
    detections = content.detections.take(matches >= 0)
    objects = content.objects.take(~content.objects.crowds)
    correct = matches[matches >= 0] > 0

    def curve(mine: Any, labels: NDArray[Any]) -> ScoreCurve:
        return ScoreCurve.from_matches(detections.values[mine], correct[mine], len(labels))

    by_class = [
        curve(detections.labels == label, objects.labels[objects.labels == label])
        for label in range(len(content.class_names))
    ]
    return ScoreCurves(content.class_names, curve(slice(None), objects.labels), by_class)


def at_iou_50(content: CocoInput) -> Any:
    """Return hotcoco's evaluator after matching at IoU 0.5, with objects of every size and all detections."""
    evaluation = content.hotcoco()
    parameters = evaluation.params
    parameters.iou_thrs = [IOU]
    parameters.area_rng, parameters.area_rng_lbl = [[0.0, 1e10]], ["all"]
    parameters.max_dets = [max(1, len(content.detections.values))]
    evaluation.evaluate()
    return evaluation


def codes(status: dict[int, str], right: str, count: int) -> NDArray[np.int8]:  # [count]
    """Return hotcoco's words by number as an array: 1 for the right word, 0 for another, -1 where there is none."""
    result = np.full(count, -1, np.int8)
    for number, word in status.items():
        result[number - 1] = word == right
    return result


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None
