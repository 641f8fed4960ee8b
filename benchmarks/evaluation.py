"""The twelve COCO numbers of detections in memory, beside pycocotools and faster-coco-eval."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import numpy as np
import pytest

# Images, classes, objects per image, detections per image.
SHAPES = (
    (100, 80, 7, 100),
    (20, 1, 60, 100),
    pytest.param((2000, 80, 7, 100), marks=pytest.mark.full),
    pytest.param((2000, 1, 60, 100), marks=pytest.mark.full),
)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("row", ("ours", "ours, pycocotools", "pycocotools", "faster-coco-eval"))
def test_numbers(compare, device, shape, row):
    """Time the numbers; `ours` uses hotcoco."""
    if device.type != "cpu":
        pytest.skip("runs on the CPU")
    from retinanet.detection.coco_numbers import coco_stats
    from retinanet.detection.detection_table import DetectionTable

    content, columns = case(*shape)
    images, labels, bboxes, scores = columns
    ids = [image["id"] for image in content["images"]], [category["id"] for category in content["categories"]]
    table = DetectionTable(*ids, images.astype(np.int32), labels.astype(np.int32), bboxes, scores)
    results = np.column_stack([images + 1.0, bboxes, scores, labels + 1.0])
    if row in ("ours", "faster-coco-eval"):
        pytest.importorskip("faster_coco_eval")
    functions = {
        "ours": lambda: list(coco_stats(content, table, "hotcoco").values()),
        "ours, pycocotools": lambda: list(coco_stats(content, table).values()),
        "pycocotools": lambda: by_pycocotools(content, results),
        "faster-coco-eval": lambda: by_faster_coco_eval(content, results),
    }
    rivals = {"ours": functions["faster-coco-eval"], "ours, pycocotools": functions["pycocotools"]}
    count, classes, objects, detections = shape
    compare(
        row,
        functions[row],
        by_pycocotools(content, results),
        rival=rivals.get(row),
        check=check_equal if row.startswith("ours") else check_nearly_equal,
        group=f"COCO numbers, {count:,} images of {objects} objects and {detections} detections, {classes} classes",
    )


def case(count: int, classes: int, objects: int, detections: int) -> tuple[dict[str, Any], tuple[Any, ...]]:
    """Return ground truth, and images, labels, boxes and scores of detections of which about half are near objects."""
    rng = np.random.default_rng(0)
    truth = np.concatenate([rng.uniform(0, 500, (count, objects, 2)), rng.uniform(8, 150, (count, objects, 2))], axis=2)
    labels = rng.integers(0, classes, (count, objects))
    content = {
        "images": [{"id": image + 1, "width": 640, "height": 640} for image in range(count)],
        "categories": [{"id": label + 1, "name": str(label)} for label in range(classes)],
        "annotations": [
            {
                "id": image * objects + i + 1,
                "image_id": image + 1,
                "category_id": int(labels[image, i]) + 1,
                "bbox": truth[image, i].tolist(),
                "area": float(truth[image, i, 2] * truth[image, i, 3]),
                "iscrowd": 0,
            }
            for image in range(count)
            for i in range(objects)
        ],
    }
    source = rng.integers(0, objects, (count, detections))
    rows = np.arange(count)[:, None]
    size = truth[rows, source, 2:]
    bboxes = truth[rows, source] * (1 + 0.05 * rng.normal(size=(count, detections, 4)))
    away = rng.random((count, detections)) < 0.5
    bboxes[away, :2] = rng.uniform(0, 500, (int(away.sum()), 2))
    found = np.where(away, rng.integers(0, classes, away.shape), labels[rows, source])
    scores = rng.random((count, detections)) * np.where(away, 0.6, 1.0)
    order = np.argsort(-scores, axis=1)
    assert size.min() > 0
    columns = (np.broadcast_to(rows, found.shape), found, bboxes.astype(np.float32), scores.astype(np.float32))
    sorted_columns = (np.take_along_axis(c, order.reshape(order.shape + (1,) * (c.ndim - 2)), axis=1) for c in columns)
    return content, tuple(column.reshape(-1, *column.shape[2:]) for column in sorted_columns)


def by_pycocotools(content: dict[str, Any], results: Any) -> list[float]:
    """Return pycocotools' numbers."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = content
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [float(value) for value in evaluation.stats]


def by_faster_coco_eval(content: dict[str, Any], results: Any) -> list[float]:
    """Return faster-coco-eval's numbers."""
    from faster_coco_eval import COCO, COCOeval_faster

    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(content)
        evaluation = COCOeval_faster(truth, truth.loadRes(results), "bbox", print_function=lambda *_: None)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [float(value) for value in evaluation.stats[:12]]


def check_equal(actual: list[float], expected: list[float]) -> None:
    """Assert that the numbers are pycocotools' to the last bit."""
    assert actual == expected, (actual, expected)


def check_nearly_equal(actual: list[float], expected: list[float]) -> None:
    """Assert that the numbers are pycocotools' to 1e-6."""
    assert actual == pytest.approx(expected, abs=1e-6)
