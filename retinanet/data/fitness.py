"""Checks of whether a data set fits its use: something to learn, a metric to compute, images that can be resized."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from retinanet.common.errors import DataError
from retinanet.data.dataset import DetectionDataset

#: Smallest and largest area in square pixels, both included, of the objects that a COCO number of one size counts.
_AREAS = {"s": (0.0, 32.0**2), "m": (32.0**2, 96.0**2), "l": (96.0**2, math.inf)}
_SIZES = {"s": "small (at most 32 x 32)", "m": "medium (32 x 32 to 96 x 96)", "l": "large (at least 96 x 96)"}


def why_unlearnable(dataset: DetectionDataset) -> str | None:
    """Return why nothing can be learned from a data set, or None if something can."""
    if len(dataset) == 0:
        return "no images"
    if any(not record.crowd for record in dataset.boxes):
        return None
    if dataset.boxes:
        return (
            f"all {len(dataset.boxes)} boxes are marked iscrowd or difficult, which neither training nor evaluation "
            "counts; unmark the objects to detect"
        )
    return f"none of the {len(dataset)} images has a box"


def check_learnable(dataset: DetectionDataset) -> None:
    """Refuse a training set without an object.

    Raises:
        DataError: There is nothing to learn from.
    """
    reason = why_unlearnable(dataset)
    if reason is not None:
        raise DataError(f"{dataset.source}: nothing to learn from: {reason}")


def check_measurable(dataset: DetectionDataset, metric: str = "AP") -> None:
    """Refuse a validation set on which a COCO number is undefined.

    Args:
        dataset: The validation set.
        metric: Name of the number. APs, ARs and so on count the objects of one size only.

    Raises:
        DataError: The number is undefined.
    """
    reason = why_unlearnable(dataset)
    if reason is None and metric[-1] in _AREAS:
        low, high = _AREAS[metric[-1]]
        if not any(low <= record.area <= high for record in dataset.boxes if not record.crowd):
            reason = f"no object is {_SIZES[metric[-1]]} pixels; choose another metric"
    if reason is not None:
        raise DataError(f"{dataset.source}: {metric} is undefined on this validation set: {reason}")


def check_resizable(
    dataset: DetectionDataset,
    vanishes: Callable[[int, int], bool],
    max_size: int,
    crop: int | None = None,
    scale: float = 1.0,
) -> None:
    """Refuse a data set with an image that resizing for the model leaves without a pixel.

    Args:
        dataset: The data set.
        vanishes: Returns whether resizing makes an image of a height and width vanish.
        max_size: The limit of the longer side when resizing, for the message.
        crop: Side of the crops that are resized instead of the images.
        scale: Smallest factor by which images are scaled before.

    Raises:
        DataError: There are such images. The message names the first and their number.
    """
    found = list(vanishing(dataset, vanishes, crop, scale))
    if found:
        height, width = dataset.sizes[found[0]]
        others = f" ({len(found)} such images)" if len(found) > 1 else ""
        raise DataError(
            f"{dataset.source}: {dataset.paths[found[0]]}: {width} x {height} pixels are too elongated: resizing to "
            f"the model's max_size {max_size} leaves less than one pixel{others}; cut it with `retinanet tile`, or "
            "leave it out"
        )


def vanishing(
    dataset: DetectionDataset, vanishes: Callable[[int, int], bool], crop: int | None = None, scale: float = 1.0
) -> Iterator[int]:
    """Yield the indices of the images that `check_resizable` refuses."""
    region = None if crop is None else max(1, round(crop / scale))
    for index, size in enumerate(dataset.sizes):
        height, width = (max(1, int(min(side, region or side) * scale)) for side in size)
        if vanishes(height, width):
            yield index
