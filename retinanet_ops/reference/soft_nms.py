"""References of Soft-NMS: a loop over images and detections, and one pass over the candidates of each image."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..types import compute_dtype
from .box_iou import box_iou


def soft_nms(
    boxes: Tensor,  # [N, C, 4]
    scores: Tensor,  # [N, C]
    labels: Tensor | None = None,  # [N, C] integer
    *,
    max_detections: int,
    method: str = "gaussian",
    iou_threshold: float = 0.3,
    sigma: float = 0.5,
    min_score: float = 0.001,
    counts: Tensor | None = None,  # [N]
) -> tuple[Tensor, Tensor, Tensor]:  # [N, D] int64, [N, D], [N] int64
    """Return indices, lowered scores and number of the boxes that Soft-NMS takes; see `retinanet_ops.soft_nms`."""
    dtype = compute_dtype(boxes, scores)
    threshold, variance, least = (torch.tensor(v, dtype=dtype) for v in (iou_threshold, sigma, min_score))
    batch = len(boxes)
    index = torch.full((batch, max_detections), -1, dtype=torch.int64, device=boxes.device)
    taken_scores = torch.zeros(batch, max_detections, dtype=dtype, device=boxes.device)
    count = torch.zeros(batch, dtype=torch.int64, device=boxes.device)
    for n in range(batch):
        valid = boxes.shape[1] if counts is None else int(counts[n].clamp(0, boxes.shape[1]))
        image, lowered = boxes[n, :valid].to(dtype), scores[n, :valid].to(dtype).nan_to_num(nan=0.0, posinf=math.inf)
        for d in range(max_detections if valid else 0):
            best = int(lowered.max(0).indices)  # the first of equal scores
            if not lowered[best] > least:
                break
            index[n, d], taken_scores[n, d], count[n] = best, lowered[best], d + 1
            iou = box_iou(image[best : best + 1], image)[0]
            factor = _factors(iou, method, threshold, variance)
            rival = True if labels is None else labels[n, :valid] == labels[n, best]
            lowered = torch.where(torch.as_tensor(rival, device=boxes.device), lowered * factor, lowered)
            lowered[best] = 0
            lowered = lowered.nan_to_num(nan=0.0, posinf=math.inf)
    return index, taken_scores, count


def soft_nms_scores(
    boxes: Tensor,  # [N, C, 4]
    scores: Tensor,  # [N, C]
    labels: Tensor | None = None,  # [N, C] integer
    *,
    method: str = "gaussian",
    iou_threshold: float = 0.3,
    sigma: float = 0.5,
    counts: Tensor | None = None,  # [N]
) -> Tensor:  # [N, C]
    """Return the scores that one pass of Soft-NMS leaves; see `retinanet_ops.soft_nms_scores`."""
    dtype = compute_dtype(boxes, scores)
    threshold, variance = (torch.tensor(v, dtype=dtype) for v in (iou_threshold, sigma))
    lowered = scores.detach().to(dtype, copy=True)
    for n in range(len(boxes)):
        valid = boxes.shape[1] if counts is None else int(counts[n].clamp(0, boxes.shape[1]))
        image, given, of_image = (
            boxes[n, :valid].detach().to(dtype),
            scores[n, :valid].detach().to(dtype),
            lowered[n, :valid],
        )
        exists, place = given > -math.inf, torch.arange(valid, device=boxes.device)
        for i in place[exists].tolist():
            later = exists & ((given < given[i]) | ((given == given[i]) & (place > i)))
            if labels is not None:
                later &= labels[n, :valid] == labels[n, i]
            factor = _factors(box_iou(image[i : i + 1], image)[0], method, threshold, variance)
            of_image.copy_(torch.where(later, of_image * factor, of_image))
    return lowered


def _factors(
    iou: Tensor,  # [C], with the box that lowers scores
    method: str,
    threshold: Tensor,
    variance: Tensor,
) -> Tensor:  # [C]
    return (-(iou * iou / variance)).exp() if method == "gaussian" else torch.where(iou > threshold, 1 - iou, 1.0)
