"""Unusual cases of NMS, the expected results and the reasons, for the test and for docs/generated/nms_conformance.md.

The expected results follow from the definition, not from any implementation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

BOX = (0.0, 0.0, 10.0, 10.0)
FAR = (100.0, 100.0, 120.0, 120.0)
NAN, INF = math.nan, math.inf


def rows_of(*boxes: tuple[float, float, float, float]) -> Tensor:
    """Boxes [C, 4]."""
    return torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)


@dataclass
class Row:
    """One case; with `classes` of `batched_nms`, else of `nms`."""

    name: str
    boxes: Tensor  # [C, 4]
    scores: Tensor  # [C]
    expected: list[int]
    reason: str
    peers: str = ""  # what the sources of others say
    classes: Tensor | None = None  # [C]
    threshold: float = 0.5
    dtypes: tuple[torch.dtype, ...] = field(default=(torch.float32,))


def scores_of(*values: float) -> Tensor:
    """Scores [C]."""
    return torch.tensor(values, dtype=torch.float32)


def piles(count: int, places: int) -> Tensor:  # [count, 4]
    """Equal boxes on so many places."""
    return (torch.arange(count) % places).float()[:, None] * 50 + torch.tensor([0.0, 0, 20, 20])


ROWS = [
    Row(
        "NaN score",
        rows_of(BOX, BOX, FAR),
        scores_of(NAN, 0.9, 0.8),
        [1, 2],
        "A box without a score cannot be better than another: it is dropped, and suppresses nothing.",
    ),
    Row(
        "NaN coordinate",
        rows_of((NAN, 0.0, 10.0, 10.0), BOX, BOX),
        scores_of(0.9, 0.8, 0.7),
        [0, 1],
        "No IoU with it is greater than the threshold.",
    ),
    Row(
        "score inf, score -inf",
        rows_of(BOX, BOX, FAR),
        scores_of(0.9, INF, -INF),
        [1],
        "inf is the best score there is; -inf is how padding says that there is no candidate.",
    ),
    Row(
        "infinite coordinate",
        rows_of((-INF, -INF, INF, INF), BOX, (0.0, 0.0, INF, 10.0)),
        scores_of(0.9, 0.8, 0.7),
        [0, 1, 2],
        "A finite part of an infinite area is nothing of it: IoU 0.",
    ),
    Row(
        "zero-area duplicates",
        rows_of((5.0, 5.0, 5.0, 9.0), (5.0, 5.0, 5.0, 9.0), BOX),
        scores_of(0.9, 0.8, 0.7),
        [0, 1, 2],
        "They share no area: IoU 0, as torchvision keeps both, too (its 0 / 0 is no greater than a threshold).",
        "ODTK: +1 on each side makes IoU 1 of them",
    ),
    Row(
        "inverted box",
        rows_of((10.0, 10.0, 0.0, 0.0), (10.0, 10.0, 0.0, 0.0), BOX),
        scores_of(0.9, 0.8, 0.7),
        [0, 1, 2],
        "It has no inside, though the product of its sides is positive.",
        "mmcv: CPU and GPU differ on invalid boxes (open-mmlab/mmcv#1476)",
    ),
    Row(
        "IoU exactly at the threshold 1/2",
        rows_of(BOX, (0.0, 0.0, 10.0, 5.0)),
        scores_of(0.9, 0.8),
        [0, 1],
        "A box is suppressed if IoU > threshold.",
        "TensorRT EfficientNMS and mmcv's soft-NMS: >=",
    ),
    Row(
        "IoU float32(0.3) at the threshold 0.3",
        rows_of(BOX, (0.0, 0.0, 10.0, 3.0)),
        scores_of(0.9, 0.8),
        [0, 1],
        "The threshold is a number of the dtype in which IoU is computed; else CPU and GPU differ.",
        "torchvision on CUDA: [0, 1], unlike its CPU",
        threshold=0.3,
    ),
    Row(
        "equal scores",
        rows_of(BOX, BOX, FAR, FAR, BOX),
        scores_of(0.5, 0.5, 0.5, 0.5, 0.5),
        [0, 2],
        "The lower index wins.",
        "mmcv: the sort is not stable; TensorRT EfficientNMS: as atomics order them",
    ),
    Row(
        "scores 0 and -0",
        rows_of(BOX, BOX),
        scores_of(-0.0, 0.0),
        [0],
        "They are equal.",
    ),
    Row(
        "negative coordinates, two classes",
        rows_of((-11.0, -11.0, -1.0, -1.0), (-11.0, -11.0, -1.0, -1.0)),
        scores_of(0.9, 0.8),
        [0, 1],
        "Boxes of different classes do not suppress each other.",
        "torchvision and mmcv move each class by max(coordinate) + 1: here by nothing",
        classes=torch.tensor([0, 1]),
    ),
    Row(
        "classes 78 and 79 at 1333 px in float16",
        rows_of((1300.0, 700.0, 1333.0, 733.0), (1300.0, 700.0, 1333.0, 733.0), (1290.0, 700.0, 1323.0, 733.0)),
        scores_of(0.9, 0.8, 0.7),
        [0, 1],
        "Of class 79, the second's IoU with the third is 0.53; the first is of another class.",
        "an offset of 79 * 1334 = 105,386 is beyond float16's 65,504 (pytorch/vision#3371)",
        classes=torch.tensor([78, 79, 79]),
        dtypes=(torch.float16,),
    ),
    Row(
        "bfloat16",
        rows_of(BOX, (0.0, 0.0, 10.0, 8.0), FAR),
        scores_of(0.9, 0.8, 0.7),
        [0, 2],
        "Every floating dtype is accepted; IoU is computed in float32.",
        "torchvision on CUDA: no kernel for it (pytorch/vision#8241)",
        dtypes=(torch.bfloat16,),
    ),
    Row("no boxes", rows_of(), scores_of(), [], "Nothing in, nothing out."),
    Row("one box", rows_of(BOX), scores_of(0.5), [0], "Nothing suppresses it."),
    Row(
        "400,000 boxes",
        piles(400_000, 300),
        torch.arange(400_000, 0, -1).float(),
        list(range(300)),
        "Of each pile of equal boxes the best stays.",
        "torchvision on CUDA: the launch fails beyond 393,216 boxes; mmcv on CUDA: silently wrong beyond 262,144",
    ),
    Row(
        "1203 classes",
        rows_of(BOX).expand(2406, 4),
        torch.arange(2406, 0, -1).float(),
        list(range(1203)),
        "Of each class the best stays.",
        classes=torch.arange(2406) % 1203,
    ),
    Row(
        "class ids beyond 2^32",
        rows_of(BOX, BOX, BOX),
        scores_of(0.9, 0.8, 0.7),
        [0, 1],
        "Classes are compared as 64-bit integers.",
        classes=torch.tensor([1, 1 + 2**33, 1]),
    ),
]
