"""FCOS's assignment of points to ground truth, and the class labels that follow from it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import reference
from ._anchor_arguments import anchor_arguments
from ._checks import as_count, as_finite, as_number, check_floating, check_integer, check_same_device, check_shape
from ._fallback import with_fallback
from ._gradients import converted, detached
from .anchors import AnchorGrid
from .types import Targets, compute_dtype


@with_fallback(reference.assign_points)
def assign_points(
    anchors: Tensor | AnchorGrid,  # [A, 4] or [N, A, 4] floating or integer
    gt_boxes: Tensor,  # [N, M, 4] floating
    gt_labels: Tensor,  # [N, M] integer
    gt_count: Tensor,  # [N] integer
    *,
    level_sizes: Sequence[int] | None = None,
    radius: float | None = 1.5,
    distance_range: tuple[float, float] = (4.0, 8.0),
) -> Targets:
    """Assign every point of a batch to a ground truth, and return class labels and the number of positives.

    A point is the centre of an anchor, whose width is the unit of length: in FCOS, an anchor is a square with the
    stride of its level as its side. A ground truth may take a point if all of the following hold. Of several, the one
    with the smallest area takes it.

    1. Centre sampling: the point is less than `radius` widths from the centre of the box, in x and in y.
    2. The point lies inside the box.
    3. The largest distance from the point to a side of the box is between the bounds of `distance_range`, in widths.
       Points of the first level have no lower bound, and points of the last level no upper bound.

    Args:
        anchors: Boxes shared by the batch, boxes of each image, or an `AnchorGrid`, whose coordinates are computed in
            the kernel.
        gt_boxes: Padded ground truth, `(x1, y1, x2, y2)` in pixels.
        gt_labels: Class id of each ground truth; copied to its points unchanged, as int32.
        gt_count: Number of valid ground truths of each image; clamped to 0..M on the device.
        level_sizes: Number of anchors of each level, if `anchors` is a tensor. None makes all of them one level. With
            an `AnchorGrid`, it must be None.
        radius: Bound of centre sampling, exclusive. None or infinity turns centre sampling off.
        distance_range: Exclusive bounds of the largest distance on a level.

    Returns:
        `Targets(matches, labels, num_positive)` as of `assign_targets`: the index of the ground truth, or -1 for
        background. No point is ignored. The counts stay on the device.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: A shape does not match the others, a tensor is on another device, an option is out of its range, or
            `level_sizes` does not add up to the number of anchors.
        NotImplementedError: `anchors` has a forward-mode tangent.

    The op never stores a value for each pair, and never synchronises with the device. Distances are computed in
    float32, or float64 if a box tensor is float64, with the same bits on every backend. Boxes are ranked by
    `1e8 - area`, as in torchvision: boxes of 1e8 square pixels or more take no point, and in float32, areas that differ
    by less than 4 may tie. Ties go to the lowest index. A degenerate ground truth (a side that is zero, negative,
    infinite or NaN) takes no point. Without ground truth all points are background. The op is deterministic and not
    differentiable.

    Source: Tian et al., "FCOS: A Simple and Strong Anchor-free Object Detector", 2020. On valid boxes the results equal
    those of torchvision's FCOS.
    """
    op = "assign_points"
    check_floating(op, "gt_boxes", gt_boxes)
    check_integer(op, "gt_labels", gt_labels)
    check_integer(op, "gt_count", gt_count)
    check_shape(op, "gt_boxes", gt_boxes, ("N", "M", 4))
    images, max_gt, _ = gt_boxes.shape
    check_shape(op, "gt_labels", gt_labels, (images, max_gt))
    check_shape(op, "gt_count", gt_count, (images,))
    check_same_device(op, "gt_labels", gt_labels, "gt_boxes", gt_boxes)
    check_same_device(op, "gt_count", gt_count, "gt_boxes", gt_boxes)
    dtype = compute_dtype(gt_boxes, anchors) if isinstance(anchors, Tensor) else compute_dtype(gt_boxes)
    arguments = anchor_arguments(op, anchors, images, None, dtype, ("gt_boxes", gt_boxes))
    low, high = _check_range(op, distance_range)
    results = _assign_points(
        detached(arguments.tensor),
        arguments.grid_sizes,
        arguments.grid_steps,
        [] if level_sizes is None else _check_level_sizes(op, level_sizes, anchors),
        converted(detached(gt_boxes), dtype),
        converted(gt_labels, torch.int64),
        converted(gt_count, torch.int64),
        None if radius is None else _check_radius(op, radius),
        low,
        high,
    )
    return Targets(*results)


_assign_points = torch.ops.retinanet_ops.assign_points.default


def _check_radius(op: str, radius: float) -> float | None:
    """Return the radius, or None if it is infinite."""
    radius = as_number(op, "radius", radius)
    if radius < 0:
        raise ValueError(f"{op}: radius must not be negative, got {radius}")
    return None if radius == math.inf else radius


def _check_range(op: str, distance_range: tuple[float, float]) -> tuple[float, float]:
    if not isinstance(distance_range, (tuple, list)) or len(distance_range) != 2:
        raise TypeError(f"{op}: distance_range must be a pair of numbers, got {distance_range!r}")
    low, high = (as_finite(op, "distance_range", value) for value in distance_range)
    if not 0 <= low <= high:
        raise ValueError(f"{op}: distance_range must be two ascending numbers from 0 on, got {distance_range}")
    return low, high


def _check_level_sizes(op: str, level_sizes: Sequence[int], anchors: Tensor | AnchorGrid) -> list[int]:
    if isinstance(anchors, AnchorGrid):
        raise ValueError(f"{op}: level_sizes must be None with an AnchorGrid, got {level_sizes}")
    sizes = [as_count(op, "level_sizes", size) for size in level_sizes]
    if sum(sizes) != anchors.shape[-2] or not sizes:
        raise ValueError(f"{op}: level_sizes must add up to the {anchors.shape[-2]} anchors, got {list(level_sizes)}")
    return sizes


@torch.library.register_fake("retinanet_ops::assign_points")
def _(
    anchors: Tensor,
    grid_sizes: list[int],
    grid_steps: list[float],
    level_sizes: list[int],
    gt_boxes: Tensor,
    *rest: object,
) -> tuple[Tensor, Tensor, Tensor]:
    images, count = gt_boxes.shape[0], anchors.shape[-2]
    if grid_sizes:
        count = sum(h * w * a for h, w, a in zip(grid_sizes[0::3], grid_sizes[1::3], grid_sizes[2::3], strict=True))
    return (
        gt_boxes.new_empty((images, count), dtype=torch.int32),
        gt_boxes.new_empty((images, count), dtype=torch.int32),
        gt_boxes.new_empty((images,), dtype=torch.int32),
    )
