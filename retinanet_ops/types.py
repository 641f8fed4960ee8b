"""The records that the ops take and return, and the padding of boxes whose number differs from image to image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ._checks import as_number
from .constants import BACKGROUND, LOW_QUALITY_RULES


@dataclass(frozen=True)
class MatchRule:
    """Thresholds and choices by which anchors are matched to ground truth.

    An anchor is matched to the ground truth with which its IoU is highest if that IoU is at least `fg_iou`. It is
    background if that IoU is below `bg_iou`, and ignored in between. The low-quality rule then promotes every anchor
    whose IoU with some ground truth equals that ground truth's best IoU over all anchors. Finally, background anchors
    that crowd boxes cover become ignored.

    Attributes:
        fg_iou: Lowest IoU of a match, in 0..1.
        bg_iou: Lowest IoU of an ignored anchor, between 0 and `fg_iou`.
        low_quality: "torchvision": a promoted anchor is matched to the ground truth with which its own IoU is highest.
            "mmdet": it is matched to the ground truth that promotes it, the last one if there are several. "ssd": as
            "mmdet", but a ground truth promotes only one of the anchors that tie for its best IoU, the one with the
            lowest index; `fg_iou` and `bg_iou` are equal in SSD. "off": no anchor is promoted.
        low_quality_min_iou: A ground truth promotes anchors only if its best IoU is above this value, in -1..1. With 0,
            a ground truth that overlaps no anchor promotes none. With -1, such a ground truth promotes every anchor, as
            in torchvision, because every anchor then ties for its best IoU of 0.
        crowd_ioa: Lowest share of an anchor's area, in 0..1, that a single crowd box must cover for the anchor to
            become ignored.

    Raises:
        TypeError: A threshold is not a number.
        ValueError: A field is out of its range; the message names it.
    """

    fg_iou: float = 0.5
    bg_iou: float = 0.4
    low_quality: str = "torchvision"
    low_quality_min_iou: float = 0.0
    crowd_ioa: float = 0.5

    def __post_init__(self) -> None:
        """Check every field."""
        for name, low in (("fg_iou", 0), ("bg_iou", 0), ("low_quality_min_iou", -1), ("crowd_ioa", 0)):
            value = as_number("MatchRule", name, getattr(self, name))
            if not low <= value <= 1:
                raise ValueError(f"MatchRule: {name} must be in {low}..1, got {value}")
        if self.bg_iou > self.fg_iou:
            raise ValueError(f"MatchRule: bg_iou must be at most fg_iou {self.fg_iou}, got {self.bg_iou}")
        if self.low_quality not in LOW_QUALITY_RULES:
            raise ValueError(
                f"MatchRule: low_quality must be one of {', '.join(LOW_QUALITY_RULES)}, got {self.low_quality!r}"
            )


class PaddedBoxes(NamedTuple):
    """One list of boxes per image, padded to a common length."""

    boxes: Tensor  # [N, C, 4] floating
    # The field `count` hides the method `tuple.count`.
    count: Tensor  # type: ignore[assignment]  # [N] int64, number of valid rows of each image


class GroundTruth(NamedTuple):
    """The objects of a batch, padded to a common number per image."""

    boxes: Tensor  # [N, M, 4] floating
    labels: Tensor  # [N, M] int64
    count: Tensor  # type: ignore[assignment]  # [N] int64, number of valid rows of each image


class Targets(NamedTuple):
    """The result of `assign_targets`."""

    matches: Tensor  # [N, A] int32: ground-truth index, -1 background, -2 ignored
    labels: Tensor  # [N, A] int32: class id, -1 background, -2 ignored
    num_positive: Tensor  # [N] int32: number of anchors with a match >= 0


class MatchStatistics(NamedTuple):
    """The result of `match_statistics`: how well the anchors fit the ground truth."""

    matches: Tensor  # [N, A] int32: ground-truth index, -1 background, -2 ignored
    # [N, A]: IoU with the matched ground truth; for anchors between the thresholds their highest IoU; 0 elsewhere
    ious: Tensor
    gt_best_ious: Tensor  # [N, M]: best IoU of each ground truth over all anchors
    gt_positives: Tensor  # [N, M] int32: number of anchors matched to each ground truth


class Candidates(NamedTuple):
    """Candidates of a batch before NMS, best first.

    Unused slots hold a zero box, score -inf, label -1 and anchor index -1.
    """

    boxes: Tensor  # [N, C, 4] float32 (float64 for float64 deltas or anchors)
    scores: Tensor  # [N, C] float32
    labels: Tensor  # [N, C] int64
    anchor_index: Tensor  # [N, C] int64, row of the candidate's anchor
    truncated: Tensor  # [N] bool: whether topk_per_level dropped a candidate of the image


class Detections(NamedTuple):
    """The detections of a batch, best first; unused slots hold a zero box, score 0, label -1 and anchor index -1."""

    boxes: Tensor  # [N, D, 4] float32 (float64 for float64 deltas or anchors)
    scores: Tensor  # [N, D] float32
    labels: Tensor  # [N, D] int64
    count: Tensor  # type: ignore[assignment]  # [N] int64, number of detections of each image
    anchor_index: Tensor  # [N, D] int64, row of the anchor whose deltas give the box
    # [N] bool: whether topk_per_level, max_detections or max_per_class dropped a candidate of the image
    truncated: Tensor


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """Return the dtype in which boxes and losses are computed: float64 if any tensor is float64, else float32."""
    for tensor in tensors:  # any() with a generator would take twice as long
        if tensor.dtype == torch.float64:
            return torch.float64
    return torch.float32


def iou_dtypes(boxes1: Tensor, boxes2: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """Return the dtype in which the IoU and its variants are computed, and the dtype of the result.

    They differ if boxes are integers: float64 holds integers up to 2^53 exactly, and the result is rounded once.
    """
    result = compute_dtype(boxes1, boxes2)
    exact = boxes1.is_floating_point() and boxes2.is_floating_point()
    return (result if exact else torch.float64), result


def class_ids(
    idxs: Tensor,  # [C] integer, floating or bool
) -> Tensor:  # [C] int64
    """Return int64 ids that are equal where those of NMS are equal.

    Floating ids become the bits of the same number in float64, so that no value is rounded and the device is not asked
    for the largest one. NaN ids are equal to each other.
    """
    if idxs.dtype == torch.int64:
        return idxs
    if not idxs.is_floating_point():
        return idxs.to(torch.int64)
    # Zero and NaN have several bit patterns.
    ids = torch.where(idxs == 0, 0.0, torch.where(idxs.isnan(), torch.nan, idxs.to(torch.float64)))
    return ids.view(torch.int64)


def pad_boxes(
    boxes: Sequence[Tensor],  # N tensors [C_i, 4]
) -> PaddedBoxes:
    """Pad one tensor of boxes per image to a batch, without synchronising with the device.

    Args:
        boxes: Boxes of each image, `[C_i, 4]` floating, where `C_i` may be 0.

    Returns:
        `PaddedBoxes(boxes, count)` with `C = max(C_i)`, on the device of `boxes[0]`; padded rows are zero. Boxes are
        float32, or float64 if any of the tensors is.

    Raises:
        ValueError: The list is empty, or the shape of an entry is wrong; the message names the entry.
    """
    return _pad("pad_boxes", boxes)


def pad_ground_truth(
    boxes: Sequence[Tensor],  # N tensors [M_i, 4]
    labels: Sequence[Tensor],  # N tensors [M_i] integer
) -> GroundTruth:
    """Pad boxes and labels, one tensor of each per image, to a batch, without synchronising with the device.

    Args:
        boxes: Ground-truth boxes of each image, `[M_i, 4]` floating, where `M_i` may be 0.
        labels: Class ids of each image, `[M_i]` integer.

    Returns:
        `GroundTruth(boxes, labels, count)` with `M = max(M_i)`, on the device of `boxes[0]`; padded rows are zero boxes
        with label -1. Boxes are float32, or float64 if any of the tensors is.

    Raises:
        ValueError: The lists are empty or differ in length, or the shape of an entry is wrong; the message names the
            entry.
    """
    op = "pad_ground_truth"
    if len(labels) != len(boxes):
        raise ValueError(f"{op}: labels must hold one tensor for each of the {len(boxes)} images, got {len(labels)}")
    padded, count = _pad(op, boxes)
    padded_labels = torch.full(padded.shape[:2], BACKGROUND, dtype=torch.int64, device=padded.device)
    for i, (b, label) in enumerate(zip(boxes, labels, strict=True)):
        if list(label.shape) != [len(b)]:
            raise ValueError(f"{op}: labels[{i}] must have shape [{len(b)}], got {list(label.shape)}")
        padded_labels[i, : len(b)] = label.to(torch.int64)
    return GroundTruth(padded, padded_labels, count)


def _pad(op: str, boxes: Sequence[Tensor]) -> PaddedBoxes:
    if not boxes:
        raise ValueError(f"{op}: boxes must hold one tensor per image, got an empty list")
    for i, b in enumerate(boxes):
        if b.dim() != 2 or b.shape[1] != 4:
            raise ValueError(f"{op}: boxes[{i}] must have shape [M, 4], got {list(b.shape)}")
    device = boxes[0].device
    counts = [len(b) for b in boxes]
    padded = torch.zeros(len(boxes), max(counts), 4, dtype=compute_dtype(*boxes), device=device)
    for i, b in enumerate(boxes):
        padded[i, : counts[i]] = b.to(padded.dtype)
    # A blocking copy of the counts would synchronise with the device.
    return PaddedBoxes(padded, torch.tensor(counts, dtype=torch.int64).to(device, non_blocking=True))
