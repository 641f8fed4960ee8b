"""The small records that ops return, and the packing of ragged ground truth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .constants import BACKGROUND


class GroundTruth(NamedTuple):
    """A batch's padded ground truth."""

    boxes: Tensor  # [N, M, 4] float
    labels: Tensor  # [N, M] int64
    # `count` hides the method of tuple; the field is the more useful of the two.
    count: Tensor  # type: ignore[assignment]  # [N] int64, number of valid rows of each image


class Targets(NamedTuple):
    """What `assign_targets` decides for each anchor."""

    matches: Tensor  # [N, A] int32: ground-truth index, -1 background, -2 ignored
    labels: Tensor  # [N, A] int32: class id, -1 background, -2 ignored
    num_positive: Tensor  # [N] int32: anchors with a match >= 0


class MatchStatistics(NamedTuple):
    """How the anchors fit the ground truth."""

    matches: Tensor  # [N, A] int32: as `Targets.matches`
    ious: Tensor  # [N, A]: with the matched ground truth, with the best one between the thresholds, else 0
    gt_best_ious: Tensor  # [N, M]: best IoU of each ground truth over all anchors
    gt_positives: Tensor  # [N, M] int32: anchors matched to each ground truth


class Detections(NamedTuple):
    """Detections of a batch, best first; unused slots hold box 0, score 0, label -1 and anchor index -1."""

    boxes: Tensor  # [N, D, 4] float32 (float64 for float64 deltas)
    scores: Tensor  # [N, D] float32
    labels: Tensor  # [N, D] int64
    count: Tensor  # type: ignore[assignment]  # [N] int64
    anchor_index: Tensor  # [N, D] int64, row of the anchor that made the detection
    truncated: (
        Tensor  # [N] bool: a cap (topk_per_level, max_detections or max_per_class) dropped a candidate of the image
    )


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype in which boxes and losses are computed: float64 if any floating tensor is float64, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def pack_ground_truth(
    boxes: Sequence[Tensor],  # N tensors [M_i, 4]
    labels: Sequence[Tensor] | None = None,  # N tensors [M_i] integer
) -> GroundTruth:
    """Pads one box tensor per image to a batch, without a host sync.

    Args:
        boxes: Ground-truth boxes of each image, `[M_i, 4]` floating; `M_i` may be 0.
        labels: Class ids of each image, `[M_i]` integer; None gives label 0 everywhere.

    Returns:
        `GroundTruth` with `M = max(M_i)`; padded rows are zero boxes with label -1.

    Raises:
        ValueError: The list is empty, or an entry's shape does not fit; the message names the entry.
    """
    if not boxes:
        raise ValueError("pack_ground_truth: boxes must hold one tensor per image, got an empty list")
    if labels is not None and len(labels) != len(boxes):
        raise ValueError(f"pack_ground_truth: expected labels for {len(boxes)} images, got {len(labels)}")
    for i, b in enumerate(boxes):
        if b.dim() != 2 or b.shape[1] != 4:
            raise ValueError(f"pack_ground_truth: boxes[{i}] must have shape [M, 4], got {list(b.shape)}")
        if labels is not None and list(labels[i].shape) != [b.shape[0]]:
            raise ValueError(
                f"pack_ground_truth: labels[{i}] must have shape [{b.shape[0]}], got {list(labels[i].shape)}"
            )
    device = boxes[0].device
    dtype = compute_dtype(*boxes)
    counts = [b.shape[0] for b in boxes]
    shape = (len(boxes), max(counts))
    packed_boxes = torch.zeros(*shape, 4, dtype=dtype, device=device)
    packed_labels = torch.full(shape, BACKGROUND, dtype=torch.int64, device=device)
    for i, b in enumerate(boxes):
        packed_boxes[i, : counts[i]] = b.to(dtype)
        packed_labels[i, : counts[i]] = 0 if labels is None else labels[i].to(torch.int64)
    return GroundTruth(packed_boxes, packed_labels, torch.tensor(counts, dtype=torch.int64, device=device))
