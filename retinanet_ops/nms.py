"""Non-maximum suppression (NMS) of one list of boxes, of each class separately, and of a padded batch."""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from ._checks import (
    as_count,
    as_iou_threshold,
    check_class_ids,
    check_floating,
    check_integer,
    check_same_device,
    check_shape,
)
from ._fallback import with_fallback
from ._gradients import converted
from .types import class_ids, compute_dtype


@with_fallback(reference.nms)
def nms(
    boxes: Tensor,  # [C, 4] floating
    scores: Tensor,  # [C] floating
    iou_threshold: float,
) -> Tensor:  # [kept] int64
    """Return the indices of the boxes that greedy non-maximum suppression keeps.

    Args:
        boxes: `(x1, y1, x2, y2)` in pixels, in any floating dtype, with any coordinates.
        scores: Score of each box. Boxes with score NaN or -inf are dropped.
        iou_threshold: A kept box suppresses every box that ranks after it and with which its IoU is greater than this
            threshold. The threshold is rounded to the compute dtype, float32 or, for float64 boxes, float64.

    Returns:
        Indices of the kept boxes, ordered by (score descending, index ascending).

    Raises:
        TypeError: A tensor is not floating, or the threshold is not a number.
        ValueError: Shapes do not fit each other, the threshold is NaN, or the devices differ.

    A degenerate box has IoU 0 with every box, so it neither suppresses nor is suppressed. Only a negative threshold
    changes that, because then the best box suppresses all others. Empty input gives an empty result. Memory is O(C).
    The size of the result depends on the data, so on CUDA the call synchronises with the device; `batched_nms_padded`
    does not. The op is deterministic and not differentiable. Its result is the same on every backend.

    Source: the signature and the order of `torchvision.ops.nms`.
    """
    op = "nms"
    check_boxes_and_scores(op, boxes, scores, ["C"])
    threshold = as_iou_threshold(op, iou_threshold)
    return _nms(converted(boxes, compute_dtype(boxes)), scores, None, threshold)


@with_fallback(reference.batched_nms)
def batched_nms(
    boxes: Tensor,  # [C, 4] floating, or [0] of any dtype
    scores: Tensor,  # [C] floating
    idxs: Tensor,  # [C] integer, floating or bool
    iou_threshold: float,
) -> Tensor:  # [kept] int64
    """Return the indices of the boxes that `nms` keeps in each class; different classes never suppress each other.

    Classes are compared exactly. No offset is added to coordinates, so the result is exact for negative
    coordinates, any number of classes and half-precision boxes.

    Args:
        boxes: `(x1, y1, x2, y2)` in pixels, in any floating dtype, with any coordinates. An empty tensor of shape [0]
            gives an empty result whatever the other arguments are.
        scores: Score of each box. Boxes with score NaN or -inf are dropped.
        idxs: Class of each box, or any other number or bool that tells groups of boxes apart. Floating numbers are
            compared as they are, and NaN counts as one class.
        iou_threshold: As in `nms`.

    Returns:
        Indices of the kept boxes, ordered by (score descending, index ascending).

    Raises:
        TypeError: An argument has a wrong dtype.
        ValueError: Shapes do not fit each other, the threshold is NaN, or the devices differ.

    Ties, degenerate boxes, memory, synchronisation and determinism are those of `nms`. The op is not differentiable.

    Source: the signature of `torchvision.ops.batched_nms`, and the results of its loop over classes.
    """
    op = "batched_nms"
    if isinstance(boxes, Tensor) and boxes.shape == (0,):
        return boxes.new_empty(0, dtype=torch.int64)  # as in torchvision, whatever the other arguments are
    check_boxes_and_scores(op, boxes, scores, ["C"])
    check_class_ids(op, "idxs", idxs)
    check_shape(op, "idxs", idxs, [boxes.shape[0]])
    check_same_device(op, "idxs", idxs, "boxes", boxes)
    threshold = as_iou_threshold(op, iou_threshold)
    return _nms(converted(boxes, compute_dtype(boxes)), scores, class_ids(idxs), threshold)


@with_fallback(reference.batched_nms_padded)
def batched_nms_padded(
    boxes: Tensor,  # [N, C, 4] floating
    scores: Tensor,  # [N, C] floating
    labels: Tensor | None = None,  # [N, C] integer
    *,
    iou_threshold: float,
    max_detections: int,
    counts: Tensor | None = None,  # [N] integer
) -> tuple[Tensor, Tensor]:  # index [N, max_detections] int64, count [N] int64
    """Return the indices of the candidates that NMS keeps in each image of a padded batch, at most `max_detections`.

    Args:
        boxes: Candidates of each image, `(x1, y1, x2, y2)` in pixels.
        scores: Score of each candidate. Padded candidates have score NaN or -inf.
        labels: Class of each candidate; candidates of different classes never suppress each other. With None, all
            candidates of an image suppress each other.
        iou_threshold: As in `nms`.
        max_detections: Number of slots of each image.
        counts: Number of valid candidates of each image, clamped to 0..C on the device. With None, every candidate
            whose score is neither NaN nor -inf is valid.

    Returns:
        Indices of the kept candidates of each image, ordered by (score descending, index ascending), with -1 in unused
        slots; and the number of kept candidates of each image.

    Raises:
        TypeError: An argument has a wrong dtype.
        ValueError: Shapes do not fit each other, an option is out of its range, or the devices differ.

    Shapes do not depend on the data, and the op never synchronises with the device. Degenerate boxes and determinism
    are as in `nms`. Empty input leaves all slots unused. The op is not differentiable.
    """
    op = "batched_nms_padded"
    labels, counts = check_candidates(op, boxes, scores, labels, counts)
    max_detections = as_count(op, "max_detections", max_detections)
    threshold = as_iou_threshold(op, iou_threshold)
    return _batched_nms_padded(
        converted(boxes, compute_dtype(boxes)), scores, labels, counts, threshold, max_detections
    )


def check_boxes_and_scores(op: str, boxes: Tensor, scores: Tensor, lead: list[int | str]) -> None:
    """Raise unless boxes [*lead, 4] and scores [*lead] are floating tensors on one device."""
    check_floating(op, "boxes", boxes)
    check_floating(op, "scores", scores)
    check_shape(op, "boxes", boxes, [*lead, 4])
    check_shape(op, "scores", scores, list(boxes.shape[:-1]))
    check_same_device(op, "scores", scores, "boxes", boxes)


def check_candidates(
    op: str,
    boxes: Tensor,  # [N, C, 4]
    scores: Tensor,  # [N, C]
    labels: Tensor | None,  # [N, C]
    counts: Tensor | None,  # [N]
) -> tuple[Tensor | None, Tensor | None]:
    """Check the candidates of a padded batch, and return labels and counts as int64."""
    check_boxes_and_scores(op, boxes, scores, ["N", "C"])
    for name, value, expected in (("labels", labels, scores.shape), ("counts", counts, scores.shape[:1])):
        if value is not None:
            check_integer(op, name, value)
            check_shape(op, name, value, list(expected))
            check_same_device(op, name, value, "boxes", boxes)
    return (
        None if labels is None else converted(labels, torch.int64),
        None if counts is None else converted(counts, torch.int64),
    )


_nms = torch.ops.retinanet_ops.nms.default
_batched_nms_padded = torch.ops.retinanet_ops.batched_nms_padded.default


@torch.library.register_fake("retinanet_ops::rank_scores")
def _(scores: Tensor, counts: Tensor | None) -> tuple[Tensor, Tensor]:
    return scores.new_empty(scores.shape, dtype=torch.int64), scores.new_empty(scores.shape[0], dtype=torch.int64)


@torch.library.register_fake("retinanet_ops::batched_nms_padded")
def _(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor | None,
    counts: Tensor | None,
    iou_threshold: float,
    max_detections: int,
) -> tuple[Tensor, Tensor]:
    images = boxes.shape[0]
    return boxes.new_empty((images, max_detections), dtype=torch.int64), boxes.new_empty((images,), dtype=torch.int64)


@torch.library.register_fake("retinanet_ops::nms")
def _(boxes: Tensor, scores: Tensor, labels: Tensor | None, iou_threshold: float) -> Tensor:
    return boxes.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.int64)


@torch.library.register_fake("retinanet_ops::nms_sorted")
def _(
    boxes: Tensor,
    order: Tensor | None,
    count: Tensor,
    labels: Tensor | None,
    iou_threshold: float,
    max_detections: int,
    max_per_class: int,
    class_agnostic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    images = boxes.shape[0]
    return (
        boxes.new_empty((images, max_detections), dtype=torch.int64),
        boxes.new_empty((images,), dtype=torch.int64),
        boxes.new_empty((images,), dtype=torch.bool),
    )
