"""Matching of anchors to ground truth, and the class labels that follow from it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import reference
from ._wrapping import (
    anchor_arguments,
    check_floating,
    check_integer,
    check_same_device,
    check_shape,
    check_tensor,
    with_fallback,
)
from .anchors import AnchorGrid
from .constants import LOW_QUALITY_RULES
from .types import MatchStatistics, Targets, compute_dtype


@with_fallback(reference.match_anchors)
def match_anchors(
    anchors: Tensor | AnchorGrid,  # [A, 4] or [N, A, 4] floating
    gt_boxes: Tensor,  # [N, M, 4] floating
    gt_count: Tensor,  # [N] integer
    *,
    fg_iou_threshold: float = 0.5,
    bg_iou_threshold: float = 0.4,
    low_quality: str = "torchvision",
    low_quality_min_iou: float = 0.0,
    crowd_boxes: Tensor | None = None,  # [N, C, 4] floating
    crowd_count: Tensor | None = None,  # [N] integer
    crowd_ioa_threshold: float = 0.5,
) -> Tensor:  # [N, A] int32
    """Matches every anchor of a batch to a ground truth by IoU, without their matrix and without a host sync.

    An anchor takes the ground truth of its highest IoU if that reaches `fg_iou_threshold`; it is background below
    `bg_iou_threshold` and ignored in between.  The low-quality rule then promotes every anchor whose IoU with some
    ground truth equals that ground truth's best over all anchors.

    Args:
        anchors: Boxes shared by the batch, or of each image, or an `AnchorGrid` (coordinates are computed in the
            kernel).
        gt_boxes: Padded ground truth, `(x1, y1, x2, y2)` pixels.
        gt_count: Valid ground truths of each image; clamped to 0..M on the device.
        fg_iou_threshold: Least IoU of a match.
        bg_iou_threshold: Least IoU of an ignored anchor; at most `fg_iou_threshold`.
        low_quality: "torchvision": a promoted anchor takes the ground truth of its own highest IoU.  "mmdet": it takes
            the ground truth that promotes it, the last one if there are several.  "off": no promotion.
        low_quality_min_iou: A ground truth promotes only if its best IoU is above this (exclusive).  0 means that a
            ground truth that overlaps no anchor promotes none; with -1 it promotes every anchor, all of which have IoU
            0 with it, as torchvision does.
        crowd_boxes: Regions in which background anchors are ignored, padded like the ground truth.
        crowd_count: Valid crowd boxes of each image.
        crowd_ioa_threshold: Least share of an anchor's area that one crowd box must cover to have it ignored.

    Returns:
        Index of the ground truth, or -1 for background, or -2 for ignored.

    Raises:
        TypeError: An argument has a wrong dtype.
        ValueError: Shapes do not fit each other, or a threshold or rule is out of its range.

    IoU is computed in float32 (float64 if a box tensor is float64), with the same bits on every backend, and thresholds
    are rounded to that dtype.  Ties of an anchor go to the lowest ground-truth index; all anchors that tie for a
    ground truth's best are promoted.  A degenerate ground truth (a side that is zero, negative, infinite or NaN)
    never matches.  Empty ground truth: all background.  Not differentiable.  Deterministic.

    Source: results on valid boxes equal torchvision's `box_iou` + `Matcher`, and with "mmdet" those of mmdet's
    `MaxIoUAssigner`.
    """
    return _assign(
        "match_anchors",
        anchors,
        gt_boxes,
        None,
        gt_count,
        fg_iou_threshold,
        bg_iou_threshold,
        low_quality,
        low_quality_min_iou,
        crowd_boxes,
        crowd_count,
        crowd_ioa_threshold,
    )[0]


@with_fallback(reference.assign_targets)
def assign_targets(
    anchors: Tensor | AnchorGrid,  # [A, 4] or [N, A, 4] floating
    gt_boxes: Tensor,  # [N, M, 4] floating
    gt_labels: Tensor,  # [N, M] integer
    gt_count: Tensor,  # [N] integer
    *,
    fg_iou_threshold: float = 0.5,
    bg_iou_threshold: float = 0.4,
    low_quality: str = "torchvision",
    low_quality_min_iou: float = 0.0,
    crowd_boxes: Tensor | None = None,  # [N, C, 4] floating
    crowd_count: Tensor | None = None,  # [N] integer
    crowd_ioa_threshold: float = 0.5,
) -> Targets:
    """Class label of every anchor and number of positives of every image: `match_anchors` and its gather in one.

    Args:
        anchors: As in `match_anchors`.
        gt_boxes: As in `match_anchors`.
        gt_labels: Class id of each ground truth, copied to its anchors as it is (as int32).
        gt_count: As in `match_anchors`.
        fg_iou_threshold: As in `match_anchors`.
        bg_iou_threshold: As in `match_anchors`.
        low_quality: As in `match_anchors`.
        low_quality_min_iou: As in `match_anchors`.
        crowd_boxes: As in `match_anchors`.
        crowd_count: As in `match_anchors`.
        crowd_ioa_threshold: As in `match_anchors`.

    Returns:
        `Targets(matches, labels, num_positive)`: labels are ready for `sigmoid_focal_loss`, the counts stay on the
        device.

    Raises:
        TypeError: An argument has a wrong dtype.
        ValueError: Shapes do not fit each other, or a threshold or rule is out of its range.

    Ties, degenerate boxes, dtypes and determinism are those of `match_anchors`.
    """
    check_integer("assign_targets", "gt_labels", gt_labels)
    matches, labels, num_positive, *_ = _assign(
        "assign_targets",
        anchors,
        gt_boxes,
        gt_labels,
        gt_count,
        fg_iou_threshold,
        bg_iou_threshold,
        low_quality,
        low_quality_min_iou,
        crowd_boxes,
        crowd_count,
        crowd_ioa_threshold,
    )
    return Targets(matches, labels, num_positive)


@with_fallback(reference.match_statistics)
def match_statistics(
    anchors: Tensor | AnchorGrid,  # [A, 4] or [N, A, 4] floating
    gt_boxes: Tensor,  # [N, M, 4] floating
    gt_count: Tensor,  # [N] integer
    *,
    fg_iou_threshold: float = 0.5,
    bg_iou_threshold: float = 0.4,
    low_quality: str = "torchvision",
    low_quality_min_iou: float = 0.0,
    crowd_boxes: Tensor | None = None,  # [N, C, 4] floating
    crowd_count: Tensor | None = None,  # [N] integer
    crowd_ioa_threshold: float = 0.5,
) -> MatchStatistics:
    """How well the anchors fit the ground truth: `match_anchors`, and what it went by.

    Args:
        anchors: As in `match_anchors`.
        gt_boxes: As in `match_anchors`.
        gt_count: As in `match_anchors`.
        fg_iou_threshold: As in `match_anchors`.
        bg_iou_threshold: As in `match_anchors`.
        low_quality: As in `match_anchors`.
        low_quality_min_iou: As in `match_anchors`.
        crowd_boxes: As in `match_anchors`.
        crowd_count: As in `match_anchors`.
        crowd_ioa_threshold: As in `match_anchors`.

    Returns:
        `MatchStatistics(matches, ious, gt_best_ious, gt_positives)`: IoUs in float32 (float64 if a box tensor is
        float64), those of anchors with their ground truth, or with the best one if they lie between the thresholds, and
        0 elsewhere; of each ground truth the best IoU over all anchors, 0 for padding and degenerate boxes; and the
        number of anchors that it was matched to.

    Raises:
        TypeError: An argument has a wrong dtype.
        ValueError: Shapes do not fit each other, or a threshold or rule is out of its range.

    Ties, degenerate boxes, dtypes and determinism are those of `match_anchors`.  Not differentiable.
    """
    matches, _, _, ious, gt_best_ious, gt_positives = _assign(
        "match_statistics",
        anchors,
        gt_boxes,
        None,
        gt_count,
        fg_iou_threshold,
        bg_iou_threshold,
        low_quality,
        low_quality_min_iou,
        crowd_boxes,
        crowd_count,
        crowd_ioa_threshold,
        statistics=True,
    )
    return MatchStatistics(matches, ious, gt_best_ious, gt_positives)


def _assign(
    op: str,
    anchors: Tensor | AnchorGrid,
    gt_boxes: Tensor,  # [N, M, 4]
    gt_labels: Tensor | None,  # [N, M]
    gt_count: Tensor,  # [N]
    fg_iou_threshold: float,
    bg_iou_threshold: float,
    low_quality: str,
    low_quality_min_iou: float,
    crowd_boxes: Tensor | None,  # [N, C, 4]
    crowd_count: Tensor | None,  # [N]
    crowd_ioa_threshold: float,
    *,
    statistics: bool = False,
) -> Sequence[Tensor]:
    check_floating(op, "gt_boxes", gt_boxes)
    check_integer(op, "gt_count", gt_count)
    check_shape(op, "gt_boxes", gt_boxes, ["N", "M", 4])
    images, max_gt = gt_boxes.shape[:2]
    check_shape(op, "gt_count", gt_count, [images])
    if gt_labels is not None:
        check_shape(op, "gt_labels", gt_labels, [images, max_gt])
        gt_labels = gt_labels.to(torch.int64)
    thresholds = {
        "fg_iou_threshold": fg_iou_threshold,
        "bg_iou_threshold": bg_iou_threshold,
        "crowd_ioa_threshold": crowd_ioa_threshold,
    }
    for name, threshold in thresholds.items():
        if not 0 <= threshold <= 1:
            raise ValueError(f"{op}: {name} must be in 0..1, got {threshold}")
    if not -1 <= low_quality_min_iou <= 1:
        raise ValueError(f"{op}: low_quality_min_iou must be in -1..1, got {low_quality_min_iou}")
    if not bg_iou_threshold <= fg_iou_threshold:
        raise ValueError(
            f"{op}: bg_iou_threshold must be at most fg_iou_threshold {fg_iou_threshold}, got {bg_iou_threshold}"
        )
    if low_quality not in LOW_QUALITY_RULES:
        raise ValueError(f"{op}: low_quality must be torchvision, mmdet or off, got {low_quality!r}")
    if (crowd_boxes is None) != (crowd_count is None):
        raise ValueError(f"{op}: crowd_boxes and crowd_count must be given together")
    if not isinstance(anchors, AnchorGrid):
        check_tensor(op, "anchors", anchors)
    dtype = compute_dtype(gt_boxes) if isinstance(anchors, AnchorGrid) else compute_dtype(gt_boxes, anchors)
    if crowd_boxes is not None and crowd_count is not None:
        check_floating(op, "crowd_boxes", crowd_boxes)
        check_integer(op, "crowd_count", crowd_count)
        check_shape(op, "crowd_boxes", crowd_boxes, [images, "C", 4])
        check_shape(op, "crowd_count", crowd_count, [images])
        crowd_boxes, crowd_count = crowd_boxes.detach().to(dtype), crowd_count.to(torch.int64)
    arguments = anchor_arguments(op, anchors, images, None, dtype, ("gt_boxes", gt_boxes))
    others = {"gt_count": gt_count, "gt_labels": gt_labels, "crowd_boxes": crowd_boxes, "crowd_count": crowd_count}
    for name, tensor in others.items():
        if tensor is not None:
            check_same_device(op, name, tensor, "gt_boxes", gt_boxes)
    results: Sequence[Tensor] = torch.ops.retinanet_ops.assign_targets(
        arguments.tensor.detach(),
        *arguments[1:],
        gt_boxes.detach().to(dtype),
        gt_labels,
        gt_count.to(torch.int64),
        crowd_boxes,
        crowd_count,
        float(fg_iou_threshold),
        float(bg_iou_threshold),
        low_quality,
        float(low_quality_min_iou),
        float(crowd_ioa_threshold),
        statistics,
    )
    return results


@torch.library.register_fake("retinanet_ops::assign_targets")
def _(
    anchors: Tensor,
    grid_sizes: list[int],
    grid_steps: list[float],
    gt_boxes: Tensor,
    gt_labels: Tensor | None,
    *rest: object,
) -> tuple[Tensor, ...]:
    images, max_gt = gt_boxes.shape[:2]
    statistics = bool(rest[-1])
    count = anchors.shape[-2]
    if grid_sizes:
        count = sum(h * w * a for h, w, a in zip(grid_sizes[0::3], grid_sizes[1::3], grid_sizes[2::3], strict=True))
    return (
        gt_boxes.new_empty((images, count), dtype=torch.int32),
        gt_boxes.new_empty((images, 0 if gt_labels is None else count), dtype=torch.int32),
        gt_boxes.new_empty((images,), dtype=torch.int32),
        gt_boxes.new_empty((images, count if statistics else 0)),
        gt_boxes.new_empty((images, max_gt if statistics else 0)),
        gt_boxes.new_empty((images, max_gt if statistics else 0), dtype=torch.int32),
    )
