"""Soft-NMS, which lowers the scores of overlapping boxes instead of dropping them, in steps or in one pass."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import reference
from ._checks import as_clamped, as_count, as_iou_threshold, as_number
from ._fallback import with_fallback
from ._gradients import converted, detached
from .nms import check_candidates
from .types import compute_dtype


@with_fallback(reference.soft_nms)
def soft_nms(
    boxes: Tensor,  # [N, C, 4] floating
    scores: Tensor,  # [N, C] floating
    labels: Tensor | None = None,  # [N, C] integer
    *,
    max_detections: int,
    method: str = "gaussian",
    iou_threshold: float = 0.3,
    sigma: float = 0.5,
    min_score: float = 0.001,
    counts: Tensor | None = None,  # [N] integer
) -> tuple[Tensor, Tensor, Tensor]:  # index [N, max_detections] int64, score [N, max_detections], count [N] int64
    """Return indices and lowered scores of the candidates that Soft-NMS takes in each image of a padded batch.

    Each step takes the candidate with the highest score and lowers the scores of the other candidates of its class, the
    more the larger their IoU with it. The steps end when no score is above `min_score`, or when `max_detections` are
    taken.

    Args:
        boxes: Candidates of each image, `(x1, y1, x2, y2)` in pixels.
        scores: Score of each candidate, not negative. Padded candidates have score NaN or -inf.
        labels: Class of each candidate. With None, all candidates of an image belong to one class.
        max_detections: Number of slots of each image, D.
        method: "gaussian" multiplies a score by exp(-IoU^2 / sigma). "linear" multiplies it by 1 - IoU where the IoU is
            greater than `iou_threshold`.
        iou_threshold: Threshold of the linear method.
        sigma: Width of the Gaussian method.
        min_score: A candidate is taken if its lowered score is greater than this value.
        counts: Number of valid candidates of each image, clamped to 0..C on the device. With None, every candidate
            whose score is neither NaN nor -inf is valid.

    Returns:
        Indices of the candidates in the order in which they were taken, by lowered score with ties to the lower index,
        and -1 in unused slots; their lowered scores in float32 (float64 if a tensor is float64), and 0 in unused slots;
        and the number of candidates that were taken.

    Raises:
        TypeError: An argument has a wrong dtype.
        ValueError: Shapes do not fit each other, an option is out of its range, or the devices differ.

    A degenerate box has IoU 0 with every other box. Shapes do not depend on the data, and the op never synchronises
    with the device. Empty input leaves all slots unused. The op is deterministic and not differentiable. Results are
    bitwise equal on every backend, except those of the Gaussian method in float64, whose exponential is that of the
    backend's math library.

    Source: Bodla et al. 2017. Lowered scores equal those of mmcv's `soft_nms`, whose method "naive" is not offered.
    """
    op = "soft_nms"
    labels, counts = check_candidates(op, boxes, scores, labels, counts)
    max_detections = as_count(op, "max_detections", max_detections)
    dtype = compute_dtype(boxes, scores)
    sigma = _as_sigma(op, method, sigma, dtype)
    min_score = as_number(op, "min_score", min_score)
    if min_score < 0:
        raise ValueError(f"{op}: min_score must not be negative, got {min_score}")
    if min_score == math.inf:  # no score is greater than infinity, so no candidate is valid
        min_score, counts = 0.0, boxes.new_zeros(boxes.shape[:1], dtype=torch.int64)
    return _soft_nms(
        converted(detached(boxes), dtype),
        converted(detached(scores), dtype),
        labels,
        counts,
        method,
        as_iou_threshold(op, iou_threshold),
        sigma,
        min_score,
        max_detections,
    )


@with_fallback(reference.soft_nms_scores)
def soft_nms_scores(
    boxes: Tensor,  # [N, C, 4] floating
    scores: Tensor,  # [N, C] floating
    labels: Tensor | None = None,  # [N, C] integer
    *,
    method: str = "gaussian",
    iou_threshold: float = 0.3,
    sigma: float = 0.5,
    counts: Tensor | None = None,  # [N] integer
) -> Tensor:  # [N, C]
    """Return the scores of all candidates of a padded batch as one pass of Soft-NMS lowers them, in their own order.

    The score of a candidate is multiplied by a factor for each candidate of its class that ranks before it: one that
    has a higher score, or the same score and a lower index. In contrast to `soft_nms`, candidates are ranked once, by
    their original scores, and none is left out.

    Args:
        boxes: Candidates of each image, `(x1, y1, x2, y2)` in pixels.
        scores: Score of each candidate, finite and not negative. Padded candidates have score NaN or -inf.
        labels: Class of each candidate. With None, all candidates of an image belong to one class.
        method: Formula of the factor, as in `soft_nms`.
        iou_threshold: Threshold of the linear method.
        sigma: Width of the Gaussian method.
        counts: Number of valid candidates of each image, clamped to 0..C on the device. With None, every candidate
            whose score is neither NaN nor -inf is valid.

    Returns:
        The lowered scores in float32 (float64 if a tensor is float64). Candidates that are not valid keep their scores
        and lower none.

    Raises:
        TypeError: An argument has a wrong dtype.
        ValueError: Shapes do not fit each other, an option is out of its range, or the devices differ.

    A degenerate box has IoU 0 with every other box. Memory is O(NC), and the op never synchronises with the device.
    Empty input gives an empty result. The op is deterministic and not differentiable. Results are bitwise equal on
    every backend, except those of the Gaussian method in float64, whose exponential is that of the backend's math
    library.

    Source: Bodla et al. 2017, without the new ranking after each step. With the Gaussian method and distinct scores,
    the results are those of supervision's `box_soft_non_max_suppression`.
    """
    op = "soft_nms_scores"
    labels, counts = check_candidates(op, boxes, scores, labels, counts)
    dtype = compute_dtype(boxes, scores)
    sigma = _as_sigma(op, method, sigma, dtype)
    return _soft_nms_scores(
        converted(detached(boxes), dtype),
        converted(detached(scores), dtype),
        labels,
        counts,
        method,
        as_iou_threshold(op, iou_threshold),
        sigma,
    )


def _as_sigma(op: str, method: str, sigma: float, dtype: torch.dtype) -> float:
    """Check the method, and return `sigma` for a schema."""
    if method not in ("gaussian", "linear"):
        raise ValueError(f"{op}: method must be 'gaussian' or 'linear', got {method!r}")
    if as_number(op, "sigma", sigma) < torch.finfo(dtype).tiny:
        raise ValueError(f"{op}: sigma must be positive in {dtype}, got {sigma}")
    # The largest finite sigma gives the same Gaussian factor as an infinite one, 1.
    return as_clamped(op, "sigma", sigma, 0.0, torch.finfo(dtype).max)


_soft_nms = torch.ops.retinanet_ops.soft_nms.default
_soft_nms_scores = torch.ops.retinanet_ops.soft_nms_scores.default


@torch.library.register_fake("retinanet_ops::soft_nms_scores")
def _(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor | None,
    counts: Tensor | None,
    method: str,
    iou_threshold: float,
    sigma: float,
) -> Tensor:
    return torch.empty_like(scores, memory_format=torch.contiguous_format)


@torch.library.register_fake("retinanet_ops::soft_nms")
def _(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor | None,
    counts: Tensor | None,
    method: str,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    max_detections: int,
) -> tuple[Tensor, Tensor, Tensor]:
    images = boxes.shape[0]
    return (
        boxes.new_empty((images, max_detections), dtype=torch.int64),
        boxes.new_empty((images, max_detections)),
        boxes.new_empty((images,), dtype=torch.int64),
    )
