"""The twelve COCO numbers, computed by pycocotools or by hotcoco with the same result to the last bit."""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from pycocotools.cocoeval import COCOeval

from retinanet.detection.coco_input import CocoInput
from retinanet.detection.detection_table import DetectionTable

#: Meaning of each of the twelve COCO numbers, in the order of pycocotools.
STAT_MEANINGS = {
    "AP": "IoU 0.50:0.95, all sizes, 100 detections per image",
    "AP50": "IoU 0.50",
    "AP75": "IoU 0.75",
    "APs": "small objects (area up to 32 x 32 pixels)",
    "APm": "medium objects (area between those of APs and APl)",
    "APl": "large objects (area from 96 x 96 pixels)",
    "AR1": "recall with 1 detection per image",
    "AR10": "recall with 10 detections per image",
    "AR100": "recall with 100 detections per image",
    "ARs": "recall, small objects",
    "ARm": "recall, medium objects",
    "ARl": "recall, large objects",
}
#: Names of the twelve COCO numbers, in the order of pycocotools.
STAT_NAMES = tuple(STAT_MEANINGS)
#: Libraries that compute the twelve numbers; the first is the default.
ENGINES = ("pycocotools", "hotcoco")


def coco_stats(
    ground_truth: dict[str, Any],
    detections: DetectionTable | Sequence[dict[str, Any]],
    engine: str = ENGINES[0],
) -> dict[str, float]:
    """Compute the twelve COCO numbers of detections.

    Args:
        ground_truth: COCO content with `images`, `annotations` and `categories`.
        detections: A table of detections, or COCO results; may be empty.
        engine: `pycocotools` or `hotcoco`. Both give the same numbers; hotcoco is faster.

    Returns:
        The numbers by name, in 0..1, or -1 where a number is undefined.

    Raises:
        ValueError: A detection has the id of no image or of no category, or there is no such engine.
    """
    return input_stats(CocoInput.from_coco(ground_truth, detections), engine)


def input_stats(content: CocoInput, engine: str = ENGINES[0]) -> dict[str, float]:
    """Compute the twelve COCO numbers of an evaluation's input; see `coco_stats`."""
    if engine not in ENGINES:
        raise ValueError(f"engine: expected {' or '.join(ENGINES)}, got {engine!r}")
    # Keep both libraries from printing.
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = _evaluated_by_hotcoco(content) if engine == "hotcoco" else _evaluated_by_pycocotools(content)
        evaluation.accumulate()
        evaluation.summarize()
    return dict(zip(STAT_NAMES, map(float, evaluation.stats), strict=True))


def _evaluated_by_hotcoco(content: CocoInput) -> Any:
    evaluation = content.hotcoco()
    evaluation.evaluate()
    return evaluation


def _evaluated_by_pycocotools(content: CocoInput) -> COCOeval:
    """Match the images in parts, and return an evaluator that holds only what `accumulate` reads.

    pycocotools would hold a dict for each object and detection, and a result for each image, category and size. Of
    these results, only those with an object or a detection count, and they shrink to the arrays that count.
    """
    total = COCOeval(iouType="bbox")
    sizes = len(total.params.areaRng)
    results: list[list[dict[str, Any]]] = [[] for _ in range(len(content.category_ids) * sizes)]
    for chunk in content.chunks():
        part = chunk.pycocotools()
        part.evaluate()
        images = chunk.last - chunk.first
        for number, result in enumerate(part.evalImgs):
            if result is not None:
                results[number // images].append(_compact(result))
    longest = max(map(len, results), default=0)
    total.params.catIds = list(content.category_ids)
    # `accumulate` expects equally many results of each category and size, and drops those that are None.
    total.params.imgIds = list(range(longest))
    total.evalImgs = [result for group in results for result in group + [None] * (longest - len(group))]
    total._paramsEval = copy.deepcopy(total.params)
    return total


def _compact(result: dict[str, Any]) -> dict[str, Any]:
    return {
        "dtScores": np.array(result["dtScores"], np.float64),
        "dtMatches": np.asarray(result["dtMatches"], np.bool_),
        "dtIgnore": np.asarray(result["dtIgnore"], np.bool_),
        "gtIgnore": np.asarray(result["gtIgnore"], np.bool_),
    }
