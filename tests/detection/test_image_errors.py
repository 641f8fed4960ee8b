"""Errors in single images: their order, their boxes, and the annotations that they make doubtful."""

from __future__ import annotations

from typing import Any

from retinanet.detection.coco_input import CocoInput
from retinanet.detection.image_errors import ImageErrors, Suspicion, list_errors, match_image


def row(image: int, category: int, x: int, **more: Any) -> dict[str, Any]:
    return {"image_id": image, "category_id": category, "bbox": [x, 0, 8, 8], **more}


def content() -> CocoInput:
    objects = [(7, 1, 0), (7, 1, 20), (7, 2, 40), (5, 2, 0), (6, 1, 0), (9, 1, 0)]
    truth = {
        "images": [{"id": identity} for identity in (7, 5, 6, 8, 9)],
        "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}],
        "annotations": [
            row(*entry, id=number, area=64, iscrowd=int(entry == (9, 1, 0))) for number, entry in enumerate(objects, 1)
        ],
    }
    found = [
        row(7, 1, 1, score=0.9),  # right
        row(7, 2, 20, score=0.8),  # the wrong class
        row(7, 1, 100, score=0.7),  # no object
        row(7, 1, 120, score=0.2),  # no object, but a low score
        row(6, 1, 0, score=0.6),  # right
        row(9, 1, 0, score=0.9),  # a crowd
    ]
    return CocoInput.from_coco(truth, found)


def test_images_with_errors_come_worst_first() -> None:
    errors = list_errors(content())
    # Image 5 has one missed object; image 7 has one right detection, three wrong ones and two missed objects.
    assert errors.images == [ImageErrors(0, 0, 0, 1, 0.0), ImageErrors(2, 1, 3, 2, 2 / 7)]


def test_suspicions_need_a_high_score() -> None:
    assert list_errors(content()).suspicions == [
        Suspicion(2, "wrong_label", "b", "a", 0.8),
        Suspicion(2, "missing_annotation", "a", None, 0.7),
    ]


def test_boxes_of_one_image() -> None:
    matches = match_image(content(), 2)
    assert matches.found.tolist() == [1, 0, 0] and matches.object_labels.tolist() == [0, 0, 1]
    assert matches.correct.tolist() == [1, 0, 0, 0] and matches.labels.tolist() == [0, 1, 0, 0]
    assert matches.objects[:, 0].tolist() == [0, 20, 40] and matches.detections[:, 0].tolist() == [1, 20, 100, 120]
    crowd = match_image(content(), 4)
    assert crowd.found.tolist() == [-1] and crowd.correct.tolist() == [-1]
    empty = match_image(content(), 3)
    assert empty.objects.shape == (0, 4) and empty.detections.shape == (0, 4)
    assert match_image(content().above(0.75), 2).scores.tolist() == [0.9, 0.8]
