"""The twelve numbers: both engines equal unchanged pycocotools to the last bit, however the images are divided."""

from __future__ import annotations

import copy

import pytest
from evaluation_cases import Case, photograph, random_case, unchanged_pycocotools

from retinanet.detection import coco_input
from retinanet.detection.coco_input import CocoInput
from retinanet.detection.coco_numbers import ENGINES, STAT_NAMES, coco_stats

CASES = {
    "trees": lambda: photograph("OSBS_029"),
    "living and dead trees": lambda: photograph("SOAP_061"),
    "crowds": lambda: random_case(7, 2, 120, crowds=0.3, seed=1),
    "many classes": lambda: random_case(12, 80, 400, seed=2),
    "only crowds": lambda: random_case(3, 1, 20, crowds=1.0, seed=3),
    "no detections": lambda: (random_case(4, 3, 30, seed=4)[0], []),
    "no objects": lambda: ({**(c := random_case(4, 3, 30, seed=5))[0], "annotations": []}, c[1]),
    "nothing": lambda: ({**random_case(4, 3, 0, seed=6)[0]}, []),
    "more than 100 detections of an image": lambda: random_case(1, 1, 150, seed=7),
}


@pytest.mark.parametrize("name", CASES)
def test_engines_equal_unchanged_pycocotools(name: str, monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    content, detections = CASES[name]()
    before = copy.deepcopy((content, detections))
    expected = unchanged_pycocotools(content, detections)
    if name not in ("no objects", "nothing", "only crowds", "no detections"):
        assert 0 < expected[0] < 1
    for engine in ENGINES:
        stats = coco_stats(content, detections, engine)
        assert tuple(stats) == STAT_NAMES
        assert list(stats.values()) == expected, engine
    monkeypatch.setattr(CocoInput, "chunks", lambda self, chunks=CocoInput.chunks: chunks(self, rows=20))
    assert list(coco_stats(content, detections).values()) == expected
    assert capfd.readouterr() == ("", "")
    assert (content, detections) == before


def test_chunks_hold_every_row_once(monkeypatch: pytest.MonkeyPatch) -> None:
    content = CocoInput.from_coco(*random_case(40, 3, 300, seed=8))
    chunks = list(content.chunks(rows=50))
    assert len(chunks) > 10
    assert [chunk.first for chunk in chunks] == [0, *(chunk.last for chunk in chunks[:-1])]
    assert chunks[-1].last == 40
    for chunk in chunks:
        for rows in (chunk.objects, chunk.detections):
            assert ((rows.images >= chunk.first) & (rows.images < chunk.last)).all()
    assert sum(len(chunk.objects.images) for chunk in chunks) == 300
    assert sum(len(chunk.detections.images) for chunk in chunks) == len(content.detections.images)
    assert len(list(content.chunks())) == 1
    assert coco_input.CHUNK_ROWS >= 1000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_id": 4}, r"detections\[1\]: image_id 4 is not in the ground truth"),
        ({"category_id": 4}, r"detections\[1\]: category_id 4 is not in the ground truth"),
    ],
)
def test_foreign_ids(change: dict, message: str) -> None:
    content, detections = random_case(2, 2, 20, seed=0)
    detections[1] = {**detections[1], **change}
    with pytest.raises(ValueError, match=message):
        coco_stats(content, detections)


def test_unknown_engine() -> None:
    case: Case = random_case(1, 1, 1)
    with pytest.raises(ValueError, match="engine: expected pycocotools or hotcoco, got 'coco'"):
        coco_stats(*case, engine="coco")
