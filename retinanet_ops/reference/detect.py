"""Reference of detection: from the outputs of the heads to candidates and to padded detections."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .._image_sizes import ImageSizes
from ..anchors import AnchorGrid
from ..constants import MAX_LOG_RATIO
from ..types import Candidates, Detections
from ._rows import rows_of
from .box_coding import clip_boxes, decode_boxes
from .nms import greedy_nms


def candidates(
    cls_logits: Sequence[Tensor],  # L tensors [N, A*K, H, W]
    box_deltas: Sequence[Tensor],  # L tensors [N, A*4, H, W]
    anchors: Tensor | AnchorGrid,  # [A, 4] or [N, A, 4]
    image_sizes: ImageSizes | None = None,  # [N, 2] (height, width), or one pair for all
    *,
    score_threshold: float = 0.05,
    topk_per_level: int = 1000,
    coder_weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
    max_log_ratio: float | None = MAX_LOG_RATIO,
    min_log_ratio: float | None = None,
    offset: float = 0.0,
) -> Candidates:
    """Return the best candidates of each level before NMS; see `retinanet_ops.candidates`."""
    deltas = rows_of(box_deltas, 4)  # [N, A, 4]
    batch, device = len(deltas), deltas.device
    num_classes = cls_logits[0].shape[1] * 4 // box_deltas[0].shape[1]
    boxes = decode_boxes(
        deltas,
        anchors,
        coder_weights=coder_weights,
        max_log_ratio=max_log_ratio,
        min_log_ratio=min_log_ratio,
        image_sizes=image_sizes,
        offset=offset,
    )
    threshold = torch.tensor(score_threshold, dtype=torch.float32, device=device)
    slots = sum(min(topk_per_level, math.prod(level.shape[1:])) for level in cls_logits)
    result = Candidates(
        boxes=boxes.new_zeros(batch, slots, 4),
        scores=torch.full((batch, slots), -math.inf, device=device),
        labels=torch.full((batch, slots), -1, dtype=torch.int64, device=device),
        anchor_index=torch.full((batch, slots), -1, dtype=torch.int64, device=device),
        truncated=torch.zeros(batch, dtype=torch.bool, device=device),
    )
    for n in range(batch):
        level_logits, level_indices, first = [], [], 0
        for level in cls_logits:
            flat = rows_of([level[n : n + 1]], num_classes).flatten().float()
            passing = (flat.double().sigmoid().float() > threshold).nonzero()[:, 0]
            result.truncated[n] |= len(passing) > topk_per_level
            best = passing[torch.sort(flat[passing], descending=True, stable=True).indices[:topk_per_level]]
            level_logits.append(flat[best])
            level_indices.append(best + first)
            first += len(flat)
        logit, index = torch.cat(level_logits), torch.cat(level_indices)
        index, position = index.sort()
        order = torch.sort(logit[position], descending=True, stable=True).indices
        index, logit = index[order], logit[position][order]
        anchor = index // num_classes
        result.boxes[n, : len(index)] = boxes[n, anchor]
        result.scores[n, : len(index)] = logit.double().sigmoid().float()
        result.labels[n, : len(index)] = index % num_classes
        result.anchor_index[n, : len(index)] = anchor
    return result


def detect(
    cls_logits: Sequence[Tensor],  # L tensors [N, A*K, H, W]
    box_deltas: Sequence[Tensor],  # L tensors [N, A*4, H, W]
    anchors: Tensor | AnchorGrid,  # [A, 4] or [N, A, 4]
    image_sizes: ImageSizes,  # [N, 2] (height, width), or one pair for all
    *,
    score_threshold: float = 0.05,
    topk_per_level: int = 1000,
    iou_threshold: float = 0.5,
    max_detections: int = 100,
    class_agnostic: bool = False,
    max_per_class: int | None = None,
    coder_weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
    max_log_ratio: float | None = MAX_LOG_RATIO,
    min_log_ratio: float | None = None,
    offset: float = 0.0,
    clip: str = "before_nms",
) -> Detections:
    """Return the detections of each image; see `retinanet_ops.detect`."""
    chosen = candidates(
        cls_logits,
        box_deltas,
        anchors,
        image_sizes if clip == "before_nms" else None,
        score_threshold=score_threshold,
        topk_per_level=topk_per_level,
        coder_weights=coder_weights,
        max_log_ratio=max_log_ratio,
        min_log_ratio=min_log_ratio,
        offset=offset,
    )
    batch, device = len(chosen.boxes), chosen.boxes.device
    result = Detections(
        boxes=chosen.boxes.new_zeros(batch, max_detections, 4),
        scores=torch.zeros(batch, max_detections, device=device),
        labels=torch.full((batch, max_detections), -1, dtype=torch.int64, device=device),
        count=torch.zeros(batch, dtype=torch.int64, device=device),
        anchor_index=torch.full((batch, max_detections), -1, dtype=torch.int64, device=device),
        truncated=chosen.truncated.clone(),
    )
    for n in range(batch):
        count = int((chosen.labels[n] >= 0).sum())
        kept, capped = greedy_nms(
            chosen.boxes[n, :count],
            -torch.arange(count, dtype=torch.float64, device=device),  # scores that keep the order of the candidates
            chosen.labels[n, :count],
            iou_threshold,
            max_detections,
            class_agnostic=class_agnostic,
            max_per_class=max_per_class,
        )
        keep = torch.tensor(kept, dtype=torch.int64, device=device)
        result.boxes[n, : len(kept)] = chosen.boxes[n, keep]
        result.scores[n, : len(kept)] = chosen.scores[n, keep]
        result.labels[n, : len(kept)] = chosen.labels[n, keep]
        result.anchor_index[n, : len(kept)] = chosen.anchor_index[n, keep]
        result.count[n] = len(kept)
        result.truncated[n] |= capped
    if clip == "after_nms":
        result = result._replace(boxes=clip_boxes(result.boxes, image_sizes))
    return result
