"""Anchors that fit the boxes of a data set: k-means with the distance 1 - IoU, as in YOLOv3 (arXiv:1804.02767)."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from retinanet.common.errors import DataError
from retinanet.data import DetectionDataset
from retinanet.model.detector_config import DetectorConfig
from retinanet.model.preprocessing import Preprocessing

# The best of several random starts is taken, because k-means only finds a local optimum.
_STARTS, _ROUNDS = 5, 100


def seen_boxes(config: DetectorConfig, dataset: DetectionDataset) -> Tensor:  # [M, 2] float32
    """Return width and height of each object at the size that the network sees in evaluation, crowds left out."""
    transform = Preprocessing(config).eval()
    boxes = []
    for index, (height, width) in enumerate(dataset.sizes):
        if not transform.vanishes(height, width):
            resized = transform.resized_size(height, width)
            corners = dataset.boxes_of(index)
            boxes.append((corners[:, 2:] - corners[:, :2]) * torch.tensor([resized[1] / width, resized[0] / height]))
    return torch.cat(boxes) if boxes else torch.zeros(0, 2)


def fit_shapes(boxes: Tensor, count: int, seed: int = 0) -> Tensor:  # [M, 2] -> [count, 2]
    """Return the widths and heights that the boxes cluster around, by area.

    The distance of a box from a shape is 1 - IoU with their centres on top of each other. The centre of a cluster
    has its median width and median height, because a mean would follow the few largest boxes. The result depends on
    the boxes, their order and the seed alone.

    Args:
        boxes: Width and height of each box, in pixels.
        count: Number of clusters.
        seed: Seed of the random starts.

    Raises:
        DataError: There are fewer different boxes than clusters.
    """
    different = len(boxes.unique(dim=0))
    if different < count:
        raise DataError(f"expected boxes of at least {count} different sizes for {count} anchors, got {different}")
    rng = Generator().manual_seed(seed)
    fits = [_k_means(boxes, _start(boxes, count, rng)) for _ in range(_STARTS)]
    best = max(fits, key=lambda shapes: float(shape_ious(boxes, shapes).amax(1).mean()))
    return best[best.prod(1).argsort()]


def shape_ious(boxes: Tensor, shapes: Tensor) -> Tensor:  # [M, 2], [K, 2] -> [M, K]
    """Return the IoU of every box with every shape, as if they had the same centre."""
    shared = torch.minimum(boxes[:, None], shapes[None]).prod(2)
    return shared / (boxes.prod(1)[:, None] + shapes.prod(1)[None] - shared)


def _start(boxes: Tensor, count: int, rng: Generator) -> Tensor:  # [count, 2]
    """Choose boxes that are far from each other, as k-means++ does."""
    shapes = boxes[torch.randint(len(boxes), (1,), generator=rng)]
    while len(shapes) < count:
        # A box equal to a shape has the distance 0, except for rounding, and must not be chosen twice.
        distance = (1 - shape_ious(boxes, shapes).amax(1)).clamp(min=0)
        distance[(boxes[:, None] == shapes[None]).all(2).any(1)] = 0
        shares = (distance.double() ** 2).cumsum(0)
        draw = torch.rand(1, generator=rng, dtype=torch.float64) * shares[-1]
        shapes = torch.cat([shapes, boxes[torch.searchsorted(shares, draw, right=True).clamp(max=len(boxes) - 1)]])
    return shapes


def _k_means(boxes: Tensor, shapes: Tensor) -> Tensor:  # [M, 2], [K, 2] -> [K, 2]
    clusters = torch.full((len(boxes),), -1)
    for _ in range(_ROUNDS):
        ious = shape_ious(boxes, shapes)
        nearest = ious.argmax(1)
        if torch.equal(nearest, clusters):
            break
        clusters = nearest
        # An empty cluster moves to the box that fits worst.
        worst = boxes[ious.amax(1).argmin()]
        members = [boxes[clusters == index] for index in range(len(shapes))]
        shapes = torch.stack([m.quantile(0.5, dim=0) if len(m) else worst for m in members])
    return shapes
