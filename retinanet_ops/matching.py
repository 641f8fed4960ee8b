"""Matching of anchors to ground truth by IoU, and the class labels that follow from it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import reference
from ._anchor_arguments import anchor_arguments
from ._checks import check_floating, check_integer, check_same_device, check_shape, check_tensor
from ._fallback import with_fallback
from ._gradients import converted, detached
from .anchors import AnchorGrid
from .types import MatchRule, MatchStatistics, PaddedBoxes, Targets, compute_dtype


@with_fallback(reference.match_anchors)
def match_anchors(
    anchors: Tensor | AnchorGrid,  # [A, 4] or [N, A, 4] floating or integer
    gt_boxes: Tensor,  # [N, M, 4] floating
    gt_count: Tensor,  # [N] integer
    *,
    rule: MatchRule = MatchRule(),
    crowds: PaddedBoxes | tuple[Tensor, Tensor] | None = None,  # boxes [N, C, 4] floating, count [N] integer
) -> Tensor:  # [N, A] int32
    """Match every anchor of a batch to a ground truth by IoU.

    The IoU matrix is never stored, and the op never synchronises with the device. With an `AnchorGrid`, anchors far
    from a ground truth are skipped.

    Args:
        anchors: Boxes shared by the batch, boxes of each image, or an `AnchorGrid`, whose coordinates are computed in
            the kernel.
        gt_boxes: Padded ground truth, `(x1, y1, x2, y2)` in pixels.
        gt_count: Number of valid ground truths of each image; clamped to 0..M on the device.
        rule: The IoU thresholds and the low-quality rule.
        crowds: Regions in which background anchors are ignored, as `pad_boxes` returns them.

    Returns:
        Index of the matched ground truth, -1 for background, or -2 for ignored.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: A shape does not match the others, or a tensor is on another device.
        NotImplementedError: `anchors` has a forward-mode tangent.

    IoU is computed in float32, or float64 if a box tensor is float64, with the same bits on every backend. Thresholds
    are rounded to that dtype. An anchor that has its highest IoU with several ground truths is matched to the one with
    the lowest index. All anchors that tie for a ground truth's best IoU are promoted; with "ssd", only the one with the
    lowest index is. If several ground truths promote an anchor with "mmdet" or "ssd", the last one has it. A degenerate
    ground truth (a side that is zero, negative, infinite or NaN) is never matched. Without ground truth all anchors are
    background. The op is deterministic and not differentiable.

    Source: on valid boxes the results equal those of torchvision's `box_iou` and `Matcher`, with "mmdet" those of
    mmdet's `MaxIoUAssigner`, and with "ssd" those of torchvision's `SSDMatcher` on the CPU.
    """
    return _assign("match_anchors", anchors, gt_boxes, None, gt_count, rule, crowds)[0]


@with_fallback(reference.assign_targets)
def assign_targets(
    anchors: Tensor | AnchorGrid,  # [A, 4] or [N, A, 4] floating or integer
    gt_boxes: Tensor,  # [N, M, 4] floating
    gt_labels: Tensor,  # [N, M] integer
    gt_count: Tensor,  # [N] integer
    *,
    rule: MatchRule = MatchRule(),
    crowds: PaddedBoxes | tuple[Tensor, Tensor] | None = None,  # boxes [N, C, 4] floating, count [N] integer
) -> Targets:
    """Match every anchor of a batch, and return its class label and the number of positives of each image.

    This is `match_anchors` fused with the lookup of labels and the count of positives.

    Args:
        anchors: As in `match_anchors`.
        gt_boxes: As in `match_anchors`.
        gt_labels: Class id of each ground truth; copied to its anchors unchanged, as int32.
        gt_count: As in `match_anchors`.
        rule: As in `match_anchors`.
        crowds: As in `match_anchors`.

    Returns:
        `Targets(matches, labels, num_positive)`. The labels are those that `dense_focal_loss` and `sigmoid_focal_loss`
        expect. The counts stay on the device.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: A shape does not match the others, or a tensor is on another device.
        NotImplementedError: `anchors` has a forward-mode tangent.

    Ties, degenerate boxes, dtypes and determinism are those of `match_anchors`. The op is not differentiable.
    """
    check_integer("assign_targets", "gt_labels", gt_labels)
    matches, labels, num_positive, *_ = _assign("assign_targets", anchors, gt_boxes, gt_labels, gt_count, rule, crowds)
    return Targets(matches, labels, num_positive)


@with_fallback(reference.match_statistics)
def match_statistics(
    anchors: Tensor | AnchorGrid,  # [A, 4] or [N, A, 4] floating or integer
    gt_boxes: Tensor,  # [N, M, 4] floating
    gt_count: Tensor,  # [N] integer
    *,
    rule: MatchRule = MatchRule(),
    crowds: PaddedBoxes | tuple[Tensor, Tensor] | None = None,  # boxes [N, C, 4] floating, count [N] integer
) -> MatchStatistics:
    """Match every anchor of a batch, and return how well anchors and ground truth fit each other.

    Args:
        anchors: As in `match_anchors`.
        gt_boxes: As in `match_anchors`.
        gt_count: As in `match_anchors`.
        rule: As in `match_anchors`.
        crowds: As in `match_anchors`.

    Returns:
        `MatchStatistics(matches, ious, gt_best_ious, gt_positives)`. `matches` is the result of `match_anchors`. `ious`
        holds the IoU of each matched anchor with its ground truth, the highest IoU of each anchor between the
        thresholds, and 0 elsewhere. `gt_best_ious` holds each ground truth's best IoU over all anchors, 0 for padding
        and degenerate boxes. `gt_positives` holds the number of anchors matched to each ground truth. IoUs are float32,
        or float64 if a box tensor is float64.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: A shape does not match the others, or a tensor is on another device.
        NotImplementedError: `anchors` has a forward-mode tangent.

    Ties, degenerate boxes, dtypes and determinism are those of `match_anchors`. The op is not differentiable.
    """
    matches, _, _, ious, gt_best_ious, gt_positives = _assign(
        "match_statistics", anchors, gt_boxes, None, gt_count, rule, crowds, statistics=True
    )
    return MatchStatistics(matches, ious, gt_best_ious, gt_positives)


def _assign(
    op: str,
    anchors: Tensor | AnchorGrid,
    gt_boxes: Tensor,  # [N, M, 4]
    gt_labels: Tensor | None,  # [N, M]
    gt_count: Tensor,  # [N]
    rule: MatchRule,
    crowds: tuple[Tensor, Tensor] | None,  # boxes [N, C, 4], count [N]
    *,
    statistics: bool = False,
) -> Sequence[Tensor]:
    """Check the arguments and call the kernel, which serves all three ops.

    Returns:
        Matches, labels, numbers of positives, IoUs, best IoUs and positives of each ground truth; empty tensors take
        the place of labels without `gt_labels`, and of the last three without `statistics`.
    """
    if not isinstance(rule, MatchRule):
        raise TypeError(f"{op}: rule must be a MatchRule, got {type(rule).__name__}")
    check_floating(op, "gt_boxes", gt_boxes)
    check_integer(op, "gt_count", gt_count)
    check_shape(op, "gt_boxes", gt_boxes, ("N", "M", 4))
    images, max_gt, _ = gt_boxes.shape
    check_shape(op, "gt_count", gt_count, (images,))
    check_same_device(op, "gt_count", gt_count, "gt_boxes", gt_boxes)
    if gt_labels is not None:
        check_shape(op, "gt_labels", gt_labels, (images, max_gt))
        check_same_device(op, "gt_labels", gt_labels, "gt_boxes", gt_boxes)
        gt_labels = converted(gt_labels, torch.int64)
    if isinstance(anchors, AnchorGrid):
        dtype = compute_dtype(gt_boxes)
    else:
        check_tensor(op, "anchors", anchors)
        dtype = compute_dtype(gt_boxes, anchors)
    arguments = anchor_arguments(op, anchors, images, None, dtype, ("gt_boxes", gt_boxes))
    crowd_boxes, crowd_count = (None, None) if crowds is None else _check_crowds(op, crowds, gt_boxes)
    results: Sequence[Tensor] = _assign_targets(
        detached(arguments.tensor),
        arguments.grid_sizes,
        arguments.grid_steps,
        converted(detached(gt_boxes), dtype),
        gt_labels,
        converted(gt_count, torch.int64),
        None if crowd_boxes is None else converted(detached(crowd_boxes), dtype),
        None if crowd_count is None else converted(crowd_count, torch.int64),
        float(rule.fg_iou),
        float(rule.bg_iou),
        rule.low_quality,
        float(rule.low_quality_min_iou),
        float(rule.crowd_ioa),
        statistics,
    )
    return results


_assign_targets = torch.ops.retinanet_ops.assign_targets.default


def _check_crowds(
    op: str,
    crowds: tuple[Tensor, Tensor],
    gt_boxes: Tensor,  # [N, M, 4]
) -> tuple[Tensor, Tensor]:
    """Return the boxes and the count of `crowds`; raise TypeError or ValueError unless they match the batch."""
    if not isinstance(crowds, tuple) or len(crowds) != 2:
        raise TypeError(f"{op}: crowds must be PaddedBoxes or a tuple (boxes, count), got {type(crowds).__name__}")
    boxes, count = crowds
    check_floating(op, "crowds.boxes", boxes)
    check_integer(op, "crowds.count", count)
    check_shape(op, "crowds.boxes", boxes, [gt_boxes.shape[0], "C", 4])
    check_shape(op, "crowds.count", count, [gt_boxes.shape[0]])
    check_same_device(op, "crowds.boxes", boxes, "gt_boxes", gt_boxes)
    check_same_device(op, "crowds.count", count, "gt_boxes", gt_boxes)
    return boxes, count


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
