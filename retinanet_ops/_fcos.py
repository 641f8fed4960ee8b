"""FCOS between the outputs of the head and its losses or detections, as in torchvision's FCOS."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import retinanet_ops as ops

from ._image_sizes import ImageSizes
from .constants import IGNORED
from .types import compute_dtype


class Outputs(NamedTuple):
    """The outputs of the head, one tensor per level, finest first."""

    logits: list[Tensor]  # L tensors [N, K, H, W]
    distances: list[Tensor]  # L tensors [N, 4, H, W], to the left, upper, right and lower side
    centreness: list[Tensor]  # L tensors [N, 1, H, W]


class Points(NamedTuple):
    """The points of a batch, one in each cell."""

    anchors: Tensor | ops.AnchorGrid  # [A, 4] or [N, A, 4]
    level_sizes: list[int] | None  # of anchors that are no grid
    centres: Tensor  # [A, 2] or [N, A, 2]
    sides: Tensor  # [A, 2] or [N, A, 2]: width and height of the anchors


class Losses(NamedTuple):
    """The sums of the losses of each image."""

    classification: Tensor  # [N] float32 (float64 for float64 outputs)
    bbox_regression: Tensor  # [N] float32 (float64 for float64 outputs)
    bbox_ctrness: Tensor  # [N] float32 (float64 for float64 outputs)


def points_of(
    anchors: Tensor | ops.AnchorGrid,  # [A, 4] or [N, A, 4]
    level_sizes: Sequence[int] | None = None,  # number of cells of each level, for anchors that are no grid
) -> Points:
    """Return the points in the centres of anchors, of which each cell has one."""
    boxes = anchors if isinstance(anchors, Tensor) else anchors.boxes()
    boxes = boxes.to(compute_dtype(boxes))
    centres, sides = (boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]
    sizes = None if level_sizes is None or not isinstance(anchors, Tensor) else list(level_sizes)
    return Points(anchors, sizes, centres, sides)


def assign(
    points: Points, truth: ops.GroundTruth, radius: float | None, crowds: ops.PaddedBoxes | None = None
) -> ops.Targets:
    """Assign the points to objects; points of background whose anchors a crowd covers are ignored."""
    targets = ops.assign_points(
        points.anchors, truth.boxes, truth.labels, truth.count, level_sizes=points.level_sizes, radius=radius
    )
    if crowds is None:
        return targets
    covered = ops.match_anchors(points.anchors, truth.boxes[:, :0], truth.count, crowds=crowds) == IGNORED
    covered &= targets.matches < 0
    return targets._replace(
        matches=targets.matches.masked_fill(covered, IGNORED), labels=targets.labels.masked_fill(covered, IGNORED)
    )


def image_losses(
    outputs: Outputs,
    points: Points,
    truth: ops.GroundTruth,
    targets: ops.Targets,
    *,
    anchor_weight: Tensor | None = None,  # [N, A] floating
    alpha: float = 0.25,
    gamma: float = 2.0,
    by_size: bool = True,
) -> Losses:
    """Return the sums of the losses of each image.

    Args:
        outputs: The outputs of the head.
        points: The points of these outputs.
        truth: The objects.
        targets: What `assign` returns for them.
        anchor_weight: Factor on the focal loss of each point, or None.
        alpha: Weight of foreground in the focal loss.
        gamma: Focusing exponent of the focal loss.
        by_size: Whether the unit of the distances is the size of the anchor; otherwise it is a pixel.
    """
    num_classes = outputs.logits[0].shape[1]
    classification = ops.dense_focal_loss(
        outputs.logits, targets.labels, num_classes, anchor_weight=anchor_weight, alpha=alpha, gamma=gamma
    )
    positive = targets.matches >= 0  # [N, A]
    # The zero box that is prepended is that of points without a match.
    image = torch.arange(len(positive), device=positive.device)[:, None]
    row = targets.matches.to(torch.int64).clamp(min=-1) + 1
    boxes = F.pad(truth.boxes, (0, 0, 1, 0))[image, row]  # [N, A, 4]
    predicted = decoded(flat(outputs.distances), points.centres, points.sides, by_size)
    # Equal boxes have a loss of 0. Selecting boxes instead of losses keeps the outputs of background, which may be
    # infinite or NaN, out of the gradient. So does selecting logits below.
    predicted = predicted.where(positive[..., None], boxes)
    box = ops.generalized_box_iou_loss(predicted, boxes).sum(1)

    near, far = points.centres - boxes[..., :2], boxes[..., 2:] - points.centres  # [N, A, 2]
    centred = (near.minimum(far) / near.maximum(far)).prod(-1).sqrt().where(positive, 0)  # [N, A]
    logits = flat(outputs.centreness)[:, 0]  # [N, A]
    logits = logits.to(compute_dtype(logits)).where(positive, 0)
    centreness = F.binary_cross_entropy_with_logits(
        logits, centred.to(logits.dtype), weight=positive.to(logits.dtype), reduction="none"
    )
    return Losses(classification, box, centreness.sum(1))


def best_candidates(
    outputs: Outputs,
    points: Points,
    image_sizes: ImageSizes,  # [N, 2] (height, width)
    *,
    score_threshold: float,
    topk_per_level: int,
    by_size: bool = True,
) -> ops.Candidates:
    """Return the best candidates of each level before NMS, decoded and clipped to the image.

    Args:
        outputs: The outputs of the head.
        points: The points of these outputs.
        image_sizes: Height and width in pixels of each image inside the batch.
        score_threshold: Candidates need a score above this. A score is the geometric mean of the probabilities of the
            class and of the centreness.
        topk_per_level: Largest number of candidates that each level keeps per image.
        by_size: As in `image_losses`.
    """
    outputs = Outputs(*([level.detach() for level in levels] for levels in outputs))
    # The candidates have the product of both probabilities as their score. Roots of candidates take less time than
    # roots of all products. The boxes of these candidates are not used: they are those of RetinaNet's coder.
    best = ops.candidates(
        [_joint_logits(*pair) for pair in zip(outputs.logits, outputs.centreness, strict=True)],
        outputs.distances,
        points.anchors,
        score_threshold=score_threshold * abs(score_threshold),
        topk_per_level=topk_per_level,
    )
    used, index = best.anchor_index >= 0, best.anchor_index.clamp(min=0)  # [N, C]
    pairs = index[..., None].expand(-1, -1, 2)
    centres, sides = (t.expand(len(index), -1, -1).gather(1, pairs) for t in (points.centres, points.sides))
    distances = flat(outputs.distances).gather(2, index[:, None].expand(-1, 4, -1))  # [N, 4, C]
    boxes = ops.clip_boxes(decoded(distances, centres, sides, by_size), image_sizes)
    return best._replace(
        boxes=boxes.where(used[..., None], 0), scores=best.scores.clamp(min=0).sqrt().where(used, -math.inf)
    )


def detections(best: ops.Candidates, *, iou_threshold: float, max_detections: int) -> ops.Detections:
    """Return the candidates that NMS keeps, with `max_detections` slots for each image."""
    # One slot more shows whether NMS kept more than that.
    kept, count = ops.batched_nms_padded(
        best.boxes, best.scores, best.labels, iou_threshold=iou_threshold, max_detections=max_detections + 1
    )
    truncated = best.truncated | (count > max_detections)
    kept, count = kept[:, :max_detections], count.clamp(max=max_detections)
    used, kept = kept >= 0, kept.clamp(min=0)
    boxes = best.boxes.gather(1, kept[..., None].expand(-1, -1, 4)).where(used[..., None], 0)
    scores = best.scores.gather(1, kept).where(used, 0)
    labels, anchors = (t.gather(1, kept).where(used, -1) for t in (best.labels, best.anchor_index))
    return ops.Detections(boxes, scores, labels, count, anchors, truncated)


def detect(
    outputs: Outputs,
    anchors: Tensor | ops.AnchorGrid,  # [A, 4] or [N, A, 4], squares
    image_sizes: Tensor,  # [N, 2] (height, width)
    *,
    score_threshold: float,
    topk_per_level: int,
    iou_threshold: float,
    max_detections: int,
) -> ops.Detections:
    """Return what `detections` of `best_candidates` returns, up to rounding, by one call of the op `detect`.

    An exported program then holds one op in place of the steps between the heads and the detections. The unit of the
    distances is the size of the anchors.
    """
    found = ops.detect(
        [_joint_logits(*pair) for pair in zip(outputs.logits, outputs.centreness, strict=True)],
        [_deltas(level) for level in outputs.distances],
        anchors,
        image_sizes,
        score_threshold=score_threshold * abs(score_threshold),
        topk_per_level=topk_per_level,
        iou_threshold=iou_threshold,
        max_detections=max_detections,
        max_log_ratio=None,
    )
    return found._replace(scores=found.scores.sqrt())


def _deltas(distances: Tensor) -> Tensor:  # [N, 4, H, W] -> [N, 4, H, W] float32 or float64
    """Return the deltas of RetinaNet's box coder that stand for the same boxes as the distances."""
    left, top, right, bottom = distances.to(compute_dtype(distances)).unbind(1)
    centre = (right - left) / 2, (bottom - top) / 2
    return torch.stack((*centre, (left + right).log(), (top + bottom).log()), dim=1)


def decoded(
    distances: Tensor,  # [N, 4, R]
    centres: Tensor,  # [R, 2] or [N, R, 2]
    sides: Tensor,  # [R, 2] or [N, R, 2]
    by_size: bool,
) -> Tensor:  # [N, R, 4] float32 or float64
    """Return the boxes whose sides have the distances from the centres."""
    unit = sides if by_size else torch.ones_like(sides)
    steps, origins = torch.cat((-unit, unit), dim=-1), torch.cat((centres, centres), dim=-1)
    return origins + distances.to(compute_dtype(distances)).transpose(1, 2) * steps


def flat(
    levels: list[Tensor],  # L tensors [N, C, H, W]
) -> Tensor:  # [N, C, A]
    """Return the maps of all levels in one tensor, one column for each cell."""
    return torch.cat([level.flatten(2) for level in levels], dim=2)


def _joint_logits(
    logits: Tensor,  # [N, K, H, W]
    centreness: Tensor,  # [N, 1, H, W]
) -> Tensor:  # [N, K, H, W] float32
    """Return logits whose sigmoid is the product of the probabilities of class and centreness."""
    probabilities = logits.to(torch.float32).sigmoid()
    return probabilities.mul_(centreness.to(torch.float32).sigmoid()).logit_()
