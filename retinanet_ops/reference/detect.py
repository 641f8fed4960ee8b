"""Post-processing in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..anchors import AnchorGrid
from ..constants import MAX_LOG_RATIO
from ..types import Detections
from .boxes import decode_boxes
from .heads import rows_of
from .nms import greedy_nms


def detect(
    cls_logits: Sequence[Tensor],  # L tensors [N, A*K, H, W]
    box_deltas: Sequence[Tensor],  # L tensors [N, A*4, H, W]
    anchors: Tensor | AnchorGrid,  # [A, 4] or [N, A, 4]
    image_sizes: Tensor,  # [N, 2] (height, width)
    *,
    score_threshold: float = 0.05,
    topk_per_level: int = 1000,
    iou_threshold: float = 0.5,
    max_detections: int = 100,
    class_agnostic: bool = False,
    max_per_class: int | None = None,
    coder_weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
    max_log_ratio: float = MAX_LOG_RATIO,
    min_log_ratio: float | None = None,
    offset: float = 0.0,
) -> Detections:
    """Logits to detections; see `retinanet_ops.detect`."""
    batch = len(cls_logits[0])
    deltas = torch.cat([rows_of(d, 4) for d in box_deltas], dim=1)  # [N, A, 4]
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
    device = deltas.device
    threshold = torch.tensor(score_threshold, dtype=torch.float32, device=device)
    result = Detections(
        boxes=boxes.new_zeros(batch, max_detections, 4),
        scores=torch.zeros(batch, max_detections, device=device),
        labels=torch.full((batch, max_detections), -1, dtype=torch.int64, device=device),
        count=torch.zeros(batch, dtype=torch.int64, device=device),
        anchor_index=torch.full((batch, max_detections), -1, dtype=torch.int64, device=device),
        truncated=torch.zeros(batch, dtype=torch.bool, device=device),
    )
    for n in range(batch):
        logits, candidates, first = [], [], 0
        truncated = False
        for level in cls_logits:
            flat = rows_of(level[n : n + 1], num_classes).flatten().float()
            passing = (flat.double().sigmoid().float() > threshold).nonzero()[:, 0]
            truncated |= len(passing) > topk_per_level
            best = passing[torch.sort(flat[passing], descending=True, stable=True).indices[:topk_per_level]]
            logits.append(flat[best])
            candidates.append(best + first)
            first += len(flat)
        logit, candidate = torch.cat(logits), torch.cat(candidates)
        candidate, position = candidate.sort()
        order = torch.sort(logit[position], descending=True, stable=True).indices
        candidate, logit = candidate[order], logit[position][order]
        anchor, label = candidate // num_classes, candidate % num_classes
        kept, capped = greedy_nms(
            boxes[n, anchor],
            -torch.arange(len(logit), dtype=torch.float64, device=device),  # a logit of -inf is a candidate, too
            label,
            iou_threshold,
            max_detections,
            class_agnostic=class_agnostic,
            max_per_class=max_per_class,
        )
        keep = torch.tensor(kept, dtype=torch.int64, device=device)
        result.boxes[n, : len(kept)] = boxes[n, anchor[keep]]
        result.scores[n, : len(kept)] = logit[keep].double().sigmoid().float()
        result.labels[n, : len(kept)] = label[keep]
        result.anchor_index[n, : len(kept)] = anchor[keep]
        result.count[n] = len(kept)
        result.truncated[n] = truncated or capped
    return result


def gather_class_scores(
    cls_logits: Sequence[Tensor],  # L tensors [N, A*K, H, W]
    anchor_index: Tensor,  # [N, D] integer
    num_classes: int,
) -> Tensor:  # [N, D, K] float32
    """Scores of all classes of chosen anchors; see `retinanet_ops.gather_class_scores`."""
    logits = torch.cat([rows_of(level, num_classes) for level in cls_logits], dim=1)  # [N, A, K]
    known = (anchor_index >= 0) & (anchor_index < logits.shape[1])
    padded = torch.cat((logits, logits.new_full((len(logits), 1, num_classes), -torch.inf)), dim=1)
    row = torch.where(known, anchor_index, logits.shape[1])
    return padded.gather(1, row[..., None].expand(-1, -1, num_classes)).double().sigmoid().float()
