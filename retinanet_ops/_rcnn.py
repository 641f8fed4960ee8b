"""Faster R-CNN between the outputs of its networks and its losses or detections, as in torchvision's."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import retinanet_ops as ops

from .constants import MAX_LOG_RATIO
from .types import compute_dtype

#: Boxes that are detected have sides of at least this many pixels. torchvision writes the number in its code.
_LEAST_SIDE = 1e-2

#: Draws samples from labels: N tensors [R_i], where 1 and above are positive, 0 is background, and -1 is left out.
#: Returns masks of the positive and of the negative samples of each image.
Sampler = Callable[[list[Tensor]], tuple[list[Tensor], list[Tensor]]]


class RPNLosses(NamedTuple):
    """The sums of the losses of the region proposal network over the sampled anchors of each image."""

    objectness: Tensor  # [N] float32 (float64 for float64 outputs)
    box: Tensor  # [N] float32 (float64 for float64 outputs)
    sampled: Tensor  # [N] int64, number of sampled anchors


class RoICandidates(NamedTuple):
    """The pairs of a region and a class whose score is above the threshold, in the order of regions and classes."""

    boxes: Tensor  # [C, 4] float32 (float64 for float64 outputs), clipped to the image
    scores: Tensor  # [C] float32 (float64 for float64 outputs), -inf for boxes without area
    labels: Tensor  # [C] int64, 1 and above; 0 is the background
    images: Tensor  # [C] int64
    rois: Tensor  # [C] int64, row of the region


def best_proposals(
    objectness: list[Tensor],  # L tensors [N, A, H, W]
    deltas: list[Tensor],  # L tensors [N, A*4, H, W]
    anchors: Tensor | ops.AnchorGrid,  # [N, sum A*H*W, 4]
    image_sizes: Tensor,  # [N, 2] height and width of each image inside the batch
    *,
    topk_per_level: int,
    max_proposals: int,
    nms_threshold: float,
    score_threshold: float = 0.0,
    least_side: float = 1e-3,
    coder_weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
    max_log_ratio: float | None = MAX_LOG_RATIO,
) -> list[Tensor]:  # N tensors [P_i, 4]
    """Return the boxes that NMS keeps of the best anchors of each level, best first.

    The number of proposals depends on values, so this function synchronises with the device.
    """
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    # One call for each level keeps candidates ordered by level. Equal scores of two levels then rank as in torchvision.
    for i, (logits, level, grid) in enumerate(zip(objectness, deltas, _by_level(anchors, deltas), strict=True)):
        best = ops.candidates(
            [logits],
            [level],
            grid,
            image_sizes,
            score_threshold=-1.0,
            topk_per_level=topk_per_level,
            coder_weights=coder_weights,
            max_log_ratio=max_log_ratio,
        )
        # NMS ranks by the scores that torchvision computes. Those of the op are exact, so other scores would be equal.
        rows = logits.detach().permute(0, 2, 3, 1).flatten(1)  # [N, A*H*W]
        scores = rows.gather(1, best.anchor_index.clamp(min=0)).to(best.boxes.dtype).sigmoid()
        found.append((best.boxes, scores.where(best.anchor_index >= 0, -math.inf), torch.full_like(best.labels, i)))
    boxes, scores, levels = (torch.cat(parts, dim=1) for parts in zip(*found, strict=True))
    kept = (boxes[..., 2:] - boxes[..., :2] >= least_side).all(-1) & (scores >= score_threshold)
    index, count = ops.batched_nms_padded(
        boxes,
        scores.where(kept, -math.inf),
        levels,
        iou_threshold=nms_threshold,
        max_detections=min(max_proposals, scores.shape[1]),
    )
    boxes = boxes.gather(1, index.clamp(min=0)[..., None].expand(-1, -1, 4))
    if not torch.is_autocast_enabled(boxes.device.type):
        boxes = boxes.to(deltas[0].dtype)  # RoI pooling needs the dtype of the features, except under autocast
    return [image[:rows] for image, rows in zip(boxes, count.tolist(), strict=True)]


def rpn_losses(
    objectness: list[Tensor],  # L tensors [N, A, H, W]
    deltas: list[Tensor],  # L tensors [N, A*4, H, W]
    anchors: Tensor | ops.AnchorGrid,  # [N, sum A*H*W, 4]
    gt_boxes: Tensor,  # [N, M, 4]
    matches: Tensor,  # [N, sum A*H*W] int32: object, -1 for background, -2 for ignored
    sampler: Sampler,
    coder_weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
) -> RPNLosses:
    """Sample anchors and return the cross entropy of their objectness and the smooth L1 loss of the positive ones."""
    labels = (matches.clamp(max=0) + 1).to(torch.float32)  # torchvision's codes: 1, 0 for background, -1 for ignored
    positive, negative = (torch.stack(masks).bool() for masks in sampler(list(labels)))
    sampled = positive | negative
    classes = sampled.int() + positive.int() - 2  # 0, -1 for background, -2 for anchors that are not sampled
    box = ops.dense_box_loss(
        deltas,
        anchors,
        gt_boxes,
        matches.where(positive, -1),
        kind="smooth_l1",
        beta=1 / 9,
        coder_weights=coder_weights,
    )
    # Without focus, the focal loss is the cross entropy.
    return RPNLosses(ops.dense_focal_loss(objectness, classes, 1, alpha=-1.0, gamma=0.0), box, sampled.sum(1))


def roi_candidates(
    class_logits: Tensor,  # [R, K + 1]
    box_deltas: Tensor,  # [R, (K + 1) * 4]
    rois: Sequence[Tensor],  # N tensors [R_i, 4], whose numbers of rows add up to R
    image_sizes: Tensor,  # [N, 2] height and width of each image inside the batch
    *,
    score_threshold: float,
    coder_weights: Sequence[float],
    max_log_ratio: float | None,
) -> RoICandidates:
    """Return the boxes of all pairs of a region and a class whose score is above the threshold.

    Their number depends on values, so this function synchronises with the device.
    """
    regions, (rows, num_classes), device = torch.cat(list(rois)), class_logits.shape, class_logits.device
    every_score = F.softmax(class_logits.to(compute_dtype(class_logits)), -1)
    roi, label = (every_score[:, 1:] > score_threshold).nonzero().unbind(1)
    label = label + 1  # class 0 is the background
    image = torch.cat([torch.full((len(r),), i, device=device) for i, r in enumerate(rois)])[roi]
    boxes = ops.decode_boxes(
        box_deltas.reshape(rows, num_classes, 4)[roi, label][:, None],
        regions[roi][:, None],
        coder_weights=coder_weights,
        max_log_ratio=max_log_ratio,
        image_sizes=image_sizes[image],
    )[:, 0]
    large = (boxes[:, 2:] - boxes[:, :2] >= _LEAST_SIDE).all(1)
    return RoICandidates(boxes, every_score[roi, label].where(large, -math.inf), label, image, roi)


def keep_best(
    found: RoICandidates,
    images: int,
    num_scores: int,
    *,
    iou_threshold: float,
    max_detections: int | None,
) -> tuple[list[Tensor], Tensor]:
    """Return the candidates that NMS keeps in each class of each image.

    Args:
        found: The candidates.
        images: Number of images N.
        num_scores: Number of scores of a region, the background's included.
        iou_threshold: Threshold of NMS.
        max_detections: Number of candidates that each image keeps at most; None keeps all.

    Returns:
        Rows of the candidates for each image, N tensors `[D_i]` int64, best first, and whether `max_detections` dropped
        some of an image, `[N]` bool. This function synchronises with the device.
    """
    device = found.boxes.device
    ranked, _ = ops.batched_nms_padded(
        found.boxes[None],
        found.scores[None],
        (found.images * num_scores + found.labels)[None],  # boxes of two images never suppress each other
        iou_threshold=iou_threshold,
        max_detections=len(found.labels),
    )
    index = ranked[0]
    of_image = (found.images[index] == torch.arange(images, device=device)[:, None]) & (index >= 0)  # [N, S]
    kept = of_image
    if max_detections is not None:
        kept = of_image & (of_image.cumsum(1) <= max_detections)
    counts = kept.sum(1).tolist()
    owner = found.images[index].where(kept.any(0), images)  # of what is dropped, an image that comes last
    best = index[owner.argsort(stable=True)[: sum(counts)]]
    return list(best.split(counts)), of_image.sum(1) > kept.sum(1)


def _by_level(
    anchors: Tensor | ops.AnchorGrid,  # [N, sum A*H*W, 4]
    deltas: list[Tensor],  # L tensors [N, A*4, H, W]
) -> Sequence[Tensor | ops.AnchorGrid]:
    """Return the anchors of each level."""
    if isinstance(anchors, Tensor):
        return anchors.split([level[0].numel() // 4 for level in deltas], dim=1)
    return [
        replace(
            anchors, base_anchors=base, anchors_per_cell=(len(base),), grid_sizes=(size,), strides=(s,), offsets=(o,)
        )
        for base, size, s, o in zip(
            anchors.base_anchors.split(list(anchors.anchors_per_cell)),
            anchors.grid_sizes,
            anchors.strides,
            anchors.offsets,
            strict=True,
        )
    ]
