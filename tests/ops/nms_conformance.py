"""Unusual cases of NMS with their expected results and the reasons.

The test and the page docs/generated/nms_conformance.md use them. The expected results follow from the definition, not
from any implementation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

BOX = (0.0, 0.0, 10.0, 10.0)
FAR = (100.0, 100.0, 120.0, 120.0)
NAN, INF = math.nan, math.inf


def boxes_of(*boxes: tuple[float, float, float, float]) -> Tensor:
    """Return the boxes as a tensor [C, 4]."""
    return torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)


@dataclass
class Row:
    """One case. It tests `batched_nms` if it has classes, and otherwise `nms`."""

    name: str
    boxes: Tensor  # [C, 4]
    scores: Tensor  # [C]
    expected: list[int]
    reason: str
    peers: str = ""  # what other implementations do, according to their source
    classes: Tensor | None = None  # [C]
    threshold: float = 0.5
    dtypes: tuple[torch.dtype, ...] = field(default=(torch.float32,))


def scores_of(*values: float) -> Tensor:
    """Return scores [C]."""
    return torch.tensor(values, dtype=torch.float32)


def piles(count: int, places: int) -> Tensor:  # [count, 4]
    """Return boxes at `places` positions; boxes at one position are equal."""
    return (torch.arange(count) % places).float()[:, None] * 50 + torch.tensor([0.0, 0, 20, 20])


ROWS = [
    Row(
        "NaN score",
        boxes_of(BOX, BOX, FAR),
        scores_of(NAN, 0.9, 0.8),
        [1, 2],
        "A box with a NaN score is dropped and suppresses nothing.",
    ),
    Row(
        "NaN coordinate",
        boxes_of((NAN, 0.0, 10.0, 10.0), BOX, BOX),
        scores_of(0.9, 0.8, 0.7),
        [0, 1],
        "Its IoU with every box is 0.",
    ),
    Row(
        "score inf, score -inf",
        boxes_of(BOX, BOX, FAR),
        scores_of(0.9, INF, -INF),
        [1],
        "inf is the highest score. -inf marks padding, which is dropped.",
    ),
    Row(
        "infinite coordinate",
        boxes_of((-INF, -INF, INF, INF), BOX, (0.0, 0.0, INF, 10.0)),
        scores_of(0.9, 0.8, 0.7),
        [0, 1, 2],
        "The union is infinite, so the IoU is 0.",
    ),
    Row(
        "zero-area duplicates",
        boxes_of((5.0, 5.0, 5.0, 9.0), (5.0, 5.0, 5.0, 9.0), BOX),
        scores_of(0.9, 0.8, 0.7),
        [0, 1, 2],
        "They share no area, so the IoU is 0. torchvision also keeps both, because 0 / 0 is not above the threshold.",
        "ODTK: it adds 1 to each side, so the IoU is 1",
    ),
    Row(
        "inverted box",
        boxes_of((10.0, 10.0, 0.0, 0.0), (10.0, 10.0, 0.0, 0.0), BOX),
        scores_of(0.9, 0.8, 0.7),
        [0, 1, 2],
        "An inverted box has no interior, although the product of its sides is positive: IoU 0.",
        "mmcv: CPU and GPU differ on invalid boxes (open-mmlab/mmcv#1476)",
    ),
    Row(
        "IoU exactly at the threshold 1/2",
        boxes_of(BOX, (0.0, 0.0, 10.0, 5.0)),
        scores_of(0.9, 0.8),
        [0, 1],
        "A box is suppressed if IoU > threshold.",
        "TensorRT EfficientNMS and mmcv's soft-NMS: >=",
    ),
    Row(
        "IoU float32(0.3) at the threshold 0.3",
        boxes_of(BOX, (0.0, 0.0, 10.0, 3.0)),
        scores_of(0.9, 0.8),
        [0, 1],
        "The threshold is rounded to the dtype in which the IoU is computed. Otherwise CPU and GPU would differ.",
        "torchvision on CUDA: [0, 1], unlike its CPU",
        threshold=0.3,
    ),
    Row(
        "equal scores",
        boxes_of(BOX, BOX, FAR, FAR, BOX),
        scores_of(0.5, 0.5, 0.5, 0.5, 0.5),
        [0, 2],
        "Ties go to the lower index.",
        "mmcv: the sort is not stable; TensorRT EfficientNMS: atomics decide the order",
    ),
    Row(
        "scores 0 and -0",
        boxes_of(BOX, BOX),
        scores_of(-0.0, 0.0),
        [0],
        "The scores are equal, so the lower index comes first.",
    ),
    Row(
        "negative coordinates, two classes",
        boxes_of((-11.0, -11.0, -1.0, -1.0), (-11.0, -11.0, -1.0, -1.0)),
        scores_of(0.9, 0.8),
        [0, 1],
        "Boxes of different classes do not suppress each other.",
        "torchvision and mmcv move each class by max(coordinate) + 1, which is 0 here",
        classes=torch.tensor([0, 1]),
    ),
    Row(
        "classes 78 and 79 at 1333 px in float16",
        boxes_of((1300.0, 700.0, 1333.0, 733.0), (1300.0, 700.0, 1333.0, 733.0), (1290.0, 700.0, 1323.0, 733.0)),
        scores_of(0.9, 0.8, 0.7),
        [0, 1],
        "The IoU of the second and the third box, both of class 79, is 0.53. The first box has another class.",
        "an offset of 79 * 1334 = 105,386 is beyond float16's 65,504 (pytorch/vision#3371)",
        classes=torch.tensor([78, 79, 79]),
        dtypes=(torch.float16,),
    ),
    Row(
        "bfloat16",
        boxes_of(BOX, (0.0, 0.0, 10.0, 8.0), FAR),
        scores_of(0.9, 0.8, 0.7),
        [0, 2],
        "Every floating dtype is accepted. The IoU is computed in float32.",
        "torchvision on CUDA: no kernel for it (pytorch/vision#8241)",
        dtypes=(torch.bfloat16,),
    ),
    Row("no boxes", boxes_of(), scores_of(), [], "The result of an empty list is empty."),
    Row("one box", boxes_of(BOX), scores_of(0.5), [0], "Nothing suppresses it."),
    Row(
        "400,000 boxes",
        piles(400_000, 300),
        torch.arange(400_000, 0, -1).float(),
        list(range(300)),
        "The best box of each pile of equal boxes is kept.",
        "torchvision on CUDA: the launch fails beyond 393,216 boxes; mmcv on CUDA: silently wrong beyond 262,144",
    ),
    Row(
        "1203 classes",
        boxes_of(BOX).expand(2406, 4),
        torch.arange(2406, 0, -1).float(),
        list(range(1203)),
        "The best box of each class is kept.",
        classes=torch.arange(2406) % 1203,
    ),
    Row(
        "class ids beyond 2^32",
        boxes_of(BOX, BOX, BOX),
        scores_of(0.9, 0.8, 0.7),
        [0, 1],
        "Classes are compared as 64-bit integers.",
        classes=torch.tensor([1, 1 + 2**33, 1]),
    ),
]
