"""Precision, recall and F1 over the score threshold, compared with counts by hand, and the best thresholds."""

from __future__ import annotations

import numpy as np
import pytest
from evaluation_cases import counts_by_hand, photograph, random_case

from retinanet.detection.coco_input import CocoInput
from retinanet.detection.score_curves import Counts, ScoreCurve, score_curves
from retinanet.model.thresholds import ScoreThresholds


def row(index: int) -> dict:
    return {"image_id": 1, "category_id": 3, "bbox": [10 * index, 0, 8, 8]}


def worked_case() -> tuple[dict, list[dict]]:
    """Return 12 objects, 8 of them found, and 2 wrong detections with lower scores."""
    content = {
        "images": [{"id": 1}],
        "categories": [{"id": 3, "name": "a"}, {"id": 9, "name": "b"}],
        "annotations": [{**row(i), "id": i + 1, "area": 64, "iscrowd": 0} for i in range(12)],
    }
    right = [{**row(i), "score": 0.9 - 0.05 * i} for i in range(8)]
    wrong = [{**row(30), "score": 0.5}, {**row(0), "score": 0.25}]  # beside the objects, and a duplicate
    return content, right + wrong


def test_worked_case() -> None:
    curves = score_curves(CocoInput.from_coco(*worked_case()))
    counts = curves.overall.at(0.2)
    assert (counts.true_positives, counts.false_positives, counts.false_negatives) == (8, 2, 4)
    assert counts.precision == pytest.approx(0.8)
    assert counts.recall == pytest.approx(0.6667, abs=1e-4)
    assert counts.f1 == pytest.approx(0.7273, abs=1e-4)
    assert counts.to_dict()["f1"] == counts.f1
    # Without the wrong detections, F1 is 16 / 20. The lowest right score is 0.55 and the highest wrong one 0.5.
    assert curves.overall.best_threshold() == pytest.approx(0.525)
    assert curves.overall.at(0.525).f1 == pytest.approx(0.8)
    assert curves.thresholds(("b", "a", "c")) == ScoreThresholds(
        curves.overall.best_threshold(), (None, curves.overall.best_threshold(), None)
    )


@pytest.mark.parametrize("case", [photograph("OSBS_029"), random_case(6, 3, 120, seed=3)], ids=["trees", "three"])
def test_counts_equal_those_by_hand(case, monkeypatch: pytest.MonkeyPatch) -> None:
    content, detections = case
    monkeypatch.setattr(CocoInput, "chunks", lambda self, chunks=CocoInput.chunks: chunks(self, rows=90))
    curves = score_curves(CocoInput.from_coco(content, detections))
    thresholds = sorted({d["score"] for d in detections} | {0.0, 0.05, 0.55, 1.0})
    for threshold in thresholds:
        counts = curves.overall.at(threshold)
        got = (counts.true_positives, counts.false_positives, counts.false_negatives)
        assert got == counts_by_hand(content, detections, threshold)
    ids = sorted(category["id"] for category in content["categories"])
    for identity, curve in zip(ids, curves.by_class, strict=True):
        mine = {**content, "annotations": [a for a in content["annotations"] if a["category_id"] == identity]}
        found = [d for d in detections if d["category_id"] == identity]
        counts = curve.at(0.35)
        got = (counts.true_positives, counts.false_positives, counts.false_negatives)
        assert got == counts_by_hand(mine, found, 0.35)
    best = curves.overall.best_threshold()
    assert best is not None
    assert curves.overall.at(best).f1 == max(curves.overall.at(t).f1 or 0 for t in thresholds)


def test_crowds_count_neither_way() -> None:
    content, detections = worked_case()
    content["annotations"][0]["iscrowd"] = 1
    content["annotations"][11]["iscrowd"] = 1
    curves = score_curves(CocoInput.from_coco(content, detections))
    counts = curves.overall.at(0.2)
    # The first detection and its duplicate lie in a crowd; so does one of the missed objects.
    assert (counts.true_positives, counts.false_positives, counts.false_negatives) == (7, 1, 3)


def test_undefined_ratios_are_none() -> None:
    content, detections = worked_case()
    nothing = score_curves(CocoInput.from_coco(content, []))
    assert nothing.overall.at(0.5) == Counts(0.5, 0, 0, 12)
    assert nothing.overall.at(0.5).precision is None and nothing.overall.at(0.5).recall == 0
    assert nothing.overall.at(0.5).f1 == 0
    assert nothing.thresholds(("a", "b")) is None
    background = score_curves(CocoInput.from_coco({**content, "annotations": []}, detections))
    assert background.overall.at(0.2).precision == 0 and background.overall.at(0.2).recall is None
    assert background.overall.best_threshold() is None and np.isnan(background.overall.recall).all()
    assert background.by_class[1].at(0.5).f1 is None


def test_threshold_separates_neighbouring_float32_scores() -> None:
    high = np.float32(0.7)
    low = np.nextafter(high, np.float32(0))
    curve = ScoreCurve.from_matches(np.array([low, high]), np.array([False, True]), 1)
    threshold = curve.best_threshold()
    assert threshold is not None and curve.at(threshold) == Counts(threshold, 1, 0, 0)


def test_equal_scores_are_kept_or_dropped_together() -> None:
    scores = np.array([0.5, 0.9, 0.5, 0.5], np.float32)
    curve = ScoreCurve.from_matches(scores, np.array([True, True, False, True]), 4)
    assert curve.scores.tolist() == pytest.approx([0.9, 0.5])
    assert curve.true_positives.tolist() == [1, 3] and curve.false_positives.tolist() == [0, 1]
    assert curve.f1.tolist() == pytest.approx([2 / 5, 6 / 8])
    assert curve.best_threshold() == pytest.approx(0.25)
