"""Ground truths with detections that the tests of evaluation share, and independent implementations of its rules."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

FIXTURES = Path(__file__).parents[1] / "fixtures"
Case = tuple[dict[str, Any], list[dict[str, Any]]]


def photograph(name: str) -> Case:
    """Return the drawn boxes of a photograph in tests/fixtures, and made-up detections of them."""
    root = ElementTree.parse(FIXTURES / f"{name}.xml").getroot()
    rows = [(o.findtext("name"), [int(v.text or 0) for v in o.find("bndbox") or ()]) for o in root.iter("object")]
    names = sorted({str(name) for name, _ in rows})
    objects = [(5, names.index(str(name)), [x1, y1, x2 - x1, y2 - y1]) for name, (x1, y1, x2, y2) in rows]
    return case([5], dict(enumerate(names, start=3)), objects, seed=0)


def random_case(images: int, classes: int, objects: int, *, crowds: float = 0.0, seed: int = 0) -> Case:
    """Return random boxes and detections; neither the ids of images nor those of categories are sorted."""
    rng = np.random.default_rng(seed)
    image_ids = [int(identity) for identity in 2**60 + rng.permutation(1000)[:images]]
    categories = {int(identity): f"class {identity}" for identity in 7 * rng.permutation(1000)[:classes]}
    boxes = np.concatenate([rng.integers(0, 300, (objects, 2)), rng.integers(5, 200, (objects, 2))], axis=1).tolist()
    rows = [(image_ids[rng.integers(images)], int(rng.integers(classes)), box) for box in boxes]
    return case(image_ids, categories, rows, crowds=crowds, seed=seed)


def case(
    image_ids: list[int],
    categories: dict[int, str],
    objects: list[tuple[int, int, list[int]]],
    *,
    crowds: float = 0.0,
    seed: int,
) -> Case:
    """Return COCO content, and detections with many equal scores near its objects."""
    rng = np.random.default_rng(seed)
    ids = list(categories)
    content: dict[str, Any] = {
        "images": [{"id": identity} for identity in image_ids],
        "categories": [{"id": identity, "name": name} for identity, name in categories.items()],
        "annotations": [
            {
                "id": number,
                "image_id": image,
                "category_id": ids[label],
                "bbox": box,
                "area": 0.8 * box[2] * box[3],
                "iscrowd": int(rng.random() < crowds),
            }
            for number, (image, label, box) in enumerate(objects, start=1)
        ],
    }
    detections = []
    for annotation in content["annotations"]:
        for _ in range(rng.integers(0, 4)):
            label = annotation["category_id"] if rng.random() < 0.8 else ids[rng.integers(len(ids))]
            x, y, width, height = annotation["bbox"]
            shift, size = rng.normal(0, 0.1, 2), rng.uniform(0.8, 1.2, 2)
            values = (x + shift[0] * width, y + shift[1] * height, size[0] * width, size[1] * height)
            box = [float(np.float32(value)) for value in values]
            score = float(np.float32(round(rng.random(), 1)))
            detections.append({"image_id": annotation["image_id"], "category_id": label, "bbox": box, "score": score})
    return content, detections


def unchanged_pycocotools(content: dict[str, Any], detections: list[dict[str, Any]]) -> list[float]:
    """Return the twelve numbers as a user of pycocotools computes them."""
    results = [
        {**d, "id": number, "iscrowd": 0, "area": d["bbox"][2] * d["bbox"][3]} for number, d in enumerate(detections, 1)
    ]
    cocos = []
    with contextlib.redirect_stdout(io.StringIO()):
        for annotations in (content["annotations"], results):
            coco = COCO()
            coco.dataset = {**content, "annotations": [dict(a) for a in annotations]}
            coco.createIndex()
            cocos.append(coco)
        evaluation = COCOeval(*cocos, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [float(value) for value in evaluation.stats]


def iou(a: list[float], b: list[float]) -> float:
    """Return the IoU of two boxes x, y, width, height."""
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    inter = max(width, 0.0) * max(height, 0.0)
    return inter / (a[2] * a[3] + b[2] * b[3] - inter)


def counts_by_hand(content: dict[str, Any], detections: list[dict[str, Any]], threshold: float) -> tuple[int, int, int]:
    """Return true positives, false positives and false negatives above a threshold, without crowds, box by box."""
    free = list(content["annotations"])
    right = wrong = 0
    for found in sorted(detections, key=lambda d: -d["score"]):
        if found["score"] <= threshold:
            continue
        same = [a for a in free if all(a[key] == found[key] for key in ("image_id", "category_id"))]
        best = max(same, key=lambda a: iou(a["bbox"], found["bbox"]), default=None)
        if best is None or iou(best["bbox"], found["bbox"]) < 0.5:
            wrong += 1
        else:
            right += 1
            free.remove(best)
    return right, wrong, len(free)
