"""Reference of NMS: a loop over the boxes by score."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..types import class_ids, compute_dtype
from .box_iou import box_iou


def nms(
    boxes: Tensor,  # [C, 4]
    scores: Tensor,  # [C]
    iou_threshold: float,
) -> Tensor:  # [kept] int64
    """Return the indices that NMS keeps, best first; see `retinanet_ops.nms`."""
    return batched_nms(boxes, scores, torch.zeros(len(boxes), dtype=torch.int64, device=boxes.device), iou_threshold)


def batched_nms(
    boxes: Tensor,  # [C, 4]
    scores: Tensor,  # [C]
    idxs: Tensor,  # [C] integer, floating or bool
    iou_threshold: float,
) -> Tensor:  # [kept] int64
    """Return the indices that NMS keeps within each class; see `retinanet_ops.batched_nms`."""
    if boxes.shape == (0,):
        return boxes.new_empty(0, dtype=torch.int64)
    kept, _ = greedy_nms(boxes, scores, class_ids(idxs), iou_threshold, max_detections=len(boxes))
    return torch.tensor(kept, dtype=torch.int64, device=boxes.device)


def batched_nms_padded(
    boxes: Tensor,  # [N, C, 4]
    scores: Tensor,  # [N, C]
    labels: Tensor | None = None,  # [N, C] integer
    *,
    iou_threshold: float,
    max_detections: int,
    counts: Tensor | None = None,  # [N]
) -> tuple[Tensor, Tensor]:  # [N, D] int64, [N] int64
    """Return the indices and number of boxes that NMS keeps in each image; see `retinanet_ops.batched_nms_padded`."""
    batch = len(boxes)
    index = torch.full((batch, max_detections), -1, dtype=torch.int64, device=boxes.device)
    count = torch.zeros(batch, dtype=torch.int64, device=boxes.device)
    for n in range(batch):
        valid = boxes.shape[1] if counts is None else int(counts[n].clamp(0, boxes.shape[1]))
        image_labels = (
            torch.zeros(valid, dtype=torch.int64, device=boxes.device) if labels is None else labels[n, :valid]
        )
        kept, _ = greedy_nms(boxes[n, :valid], scores[n, :valid], image_labels, iou_threshold, max_detections)
        index[n, : len(kept)] = torch.tensor(kept, dtype=torch.int64, device=boxes.device)
        count[n] = len(kept)
    return index, count


def greedy_nms(
    boxes: Tensor,  # [C, 4]
    scores: Tensor,  # [C]
    labels: Tensor,  # [C]
    iou_threshold: float,
    max_detections: int,
    *,
    class_agnostic: bool = False,
    max_per_class: int | None = None,
) -> tuple[list[int], bool]:
    """Return the kept indices, best first, and whether a limit dropped a box that no kept box suppresses."""
    dtype = compute_dtype(boxes)
    threshold = torch.tensor(iou_threshold, dtype=dtype, device=boxes.device)
    boxes = boxes.to(dtype)
    order = torch.sort(scores, descending=True, stable=True).indices
    order = order[~(scores[order].isnan() | (scores[order] == -math.inf))]
    alive = torch.ones(len(boxes), dtype=torch.bool, device=boxes.device)
    kept: list[int] = []
    per_class: dict[int, int] = {}
    truncated = False
    for i in order.tolist():
        if not alive[i]:
            continue
        label = int(labels[i])
        if max_per_class is not None and per_class.get(label, 0) >= max_per_class:
            truncated = True
            continue
        if len(kept) == max_detections:
            return kept, True
        kept.append(i)
        per_class[label] = per_class.get(label, 0) + 1
        same_class = torch.ones_like(alive) if class_agnostic else labels == label
        alive &= ~((box_iou(boxes[i : i + 1], boxes)[0] > threshold) & same_class)
    return kept, truncated
