"""How well a configuration's anchors fit the boxes of a data set, at the image size that the network sees."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

import retinanet_ops as ops
from retinanet.data import DetectionDataset
from retinanet.model.architectures import batch_anchors
from retinanet.model.detector_config import AnchorConfig
from retinanet.model.preprocessing import Preprocessing

# Images of one size that are matched at once.
_BATCH = 16


def best_anchor_ious(
    config: AnchorConfig,
    dataset: DetectionDataset,
    max_images: int | None = None,
    progress: Callable[..., Iterable[Any]] | None = None,
) -> Tensor:  # [boxes] float32
    """Return the best IoU of each object with any anchor, after resizing as for evaluation.

    Args:
        config: Image sizes and anchors.
        dataset: The boxes; no pixel is read. Crowds are left out, and so are images that resizing makes vanish.
        max_images: Number of images to take, evenly spread; None takes all.
        progress: Wraps the iteration over batches, as `tqdm` does; called with `total=`.

    Returns:
        The IoUs, in the order in which images of one size follow each other.
    """
    transform = Preprocessing(config).eval()
    count = len(dataset) if max_images is None else min(max_images, len(dataset))
    of_size: dict[tuple[int, int], list[Tensor]] = defaultdict(list)
    for number in range(count):
        index = (2 * number + 1) * len(dataset) // (2 * count)  # The middle one of each of `count` equal parts.
        boxes, size = dataset.boxes_of(index), dataset.sizes[index]
        if len(boxes) and not transform.vanishes(*size):
            of_size[size].append(boxes)
    batches = [
        (size, group[start : start + _BATCH])
        for size, group in of_size.items()
        for start in range(0, len(group), _BATCH)
    ]
    best = [
        _best_ious(config, transform, size, group)
        for size, group in (progress(batches, total=len(batches)) if progress else batches)
    ]
    return torch.cat(best) if best else torch.zeros(0)


def _best_ious(
    config: AnchorConfig,
    transform: Preprocessing,
    size: tuple[int, int],
    group: list[Tensor],  # [M_i, 4] each
) -> Tensor:  # [sum of M_i]
    """Return the best IoU of each box of images of one size."""
    # An image on the meta device has a shape and no pixels, so resizing it costs nothing.
    resized, target = transform.resize(torch.empty(3, *size, device="meta"), {"boxes": torch.cat(group)})
    assert target is not None
    counts = [len(boxes) for boxes in group]
    boxes = torch.nn.utils.rnn.pad_sequence(list(target["boxes"].split(counts)), batch_first=True)
    anchors = batch_anchors(config, resized.shape[-2], resized.shape[-1])
    statistics = ops.match_statistics(anchors, boxes, torch.tensor(counts))
    return torch.cat([row[:count] for row, count in zip(statistics.gt_best_ious, counts, strict=True)]).float()
