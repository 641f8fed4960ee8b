"""Plain PyTorch twin of every op: the specification, the oracle of the tests, a baseline, and the fallback.

Each function has the name and the signature of the op it specifies.  Floating results are computed in the dtype of the
arguments (half precision in float32), so calling with float64 gives the oracle.  Nothing here is written for speed:
matching builds the whole IoU matrix, NMS is a loop.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .anchors import AnchorGrid, as_boxes
from .types import BACKGROUND, IGNORED, Detections, Targets, compute_dtype

MAX_LOG_RATIO = math.log(1000.0 / 16)


def sigmoid_focal_loss(
    inputs: Tensor,  # [...] floating
    targets: Tensor,  # same shape as inputs, or integer [...] without the last dimension
    alpha: float = 0.25,
    gamma: float = 2.0,
    reduction: str = "none",
) -> Tensor:  # inputs' shape, or [] for "sum" and "mean"
    """Focal loss of independent logits; see `retinanet_ops.sigmoid_focal_loss`."""
    dtype = compute_dtype(inputs)
    x = inputs.to(dtype)
    if targets.shape == inputs.shape:
        loss = _focal_terms(x, targets.to(dtype), alpha, gamma)
    else:
        loss = _class_focal_terms(x, targets, alpha, gamma, 0.0)
    if reduction == "sum":
        return loss.sum()
    if reduction == "mean":
        return loss.mean()
    return loss.to(inputs.dtype)


def dense_focal_loss(
    cls_logits: Sequence[Tensor],  # L tensors [N, A*K, H, W] floating
    labels: Tensor,  # [N, sum A*H*W] integer
    *,
    alpha: float = 0.25,
    gamma: float = 2.0,
    weight: Tensor | None = None,  # [N, sum A*H*W] floating
    label_smoothing: float = 0.0,
) -> Tensor:  # [N]
    """Focal loss of each image from the heads' tensors; see `retinanet_ops.dense_focal_loss`."""
    dtype = compute_dtype(cls_logits[0])
    logits = sum(level.shape[1] * level.shape[2] * level.shape[3] for level in cls_logits)
    num_classes = max(1, logits // max(1, labels.shape[1]))
    x = torch.cat([_rows(level, num_classes) for level in cls_logits], dim=1).to(dtype)  # [N, A, K]
    terms = _class_focal_terms(x, labels, alpha, gamma, label_smoothing)
    if weight is not None:
        # No 0 * inf and no inf * 0: neither without weight nor where ignored does the other factor count.
        factor = torch.where(labels == IGNORED, 0.0, weight.to(dtype))[..., None]
        terms = torch.where((factor == 0) & ~terms.isfinite(), 0.0, terms) * factor
    return terms.sum((1, 2))


def _class_focal_terms(
    x: Tensor,  # [..., K]
    labels: Tensor,  # [...]
    alpha: float,
    gamma: float,
    smoothing: float,
) -> Tensor:  # [..., K]
    num_classes = x.shape[-1]
    labels = labels.to(torch.int64)[..., None]
    ignored = labels == IGNORED
    invalid = (labels < IGNORED) | (labels >= num_classes)
    targets = (labels == torch.arange(num_classes, device=x.device)).to(x.dtype)
    if smoothing:
        targets = targets * (1 - smoothing) + smoothing / 2
    x = torch.where(ignored, 0.0, torch.where(invalid, math.nan, x))
    return torch.where(ignored, 0.0, _focal_terms(x, targets, alpha, gamma))


def _focal_terms(
    x: Tensor,  # [...]
    t: Tensor,  # [...]
    alpha: float,
    gamma: float,
) -> Tensor:  # [...]
    # softplus(x) is written -logsigmoid(-x): torch's softplus is linear beyond 20, which costs digits in float64.
    alpha_t = alpha * t + (1 - alpha) * (1 - t) if alpha >= 0 else torch.ones_like(t)
    hard = (t == 0) | (t == 1)
    z = torch.where(t == 1, -x, x)
    # A target of 0 or 1 has 1 - p_t = sigmoid(z) and the cross-entropy softplus(z).
    cross_entropy = -F.logsigmoid(-z)
    modulator = torch.exp(gamma * F.logsigmoid(z)) if gamma != 0 else torch.ones_like(z)
    hard_terms = modulator * cross_entropy
    soft_t = torch.where(hard, 0.5, t)
    one_minus_pt = torch.sigmoid(x) * (1 - soft_t) + torch.sigmoid(-x) * soft_t
    soft_terms = one_minus_pt**gamma * -(soft_t * F.logsigmoid(x) + (1 - soft_t) * F.logsigmoid(-x))
    terms = torch.where(hard, hard_terms, soft_terms)
    return alpha_t * torch.where((alpha_t == 0) & (terms == math.inf), 0.0, terms)


def box_iou(
    boxes1: Tensor,  # [M, 4]
    boxes2: Tensor,  # [N, 4]
) -> Tensor:  # [M, N]
    """Pairwise IoU; see `retinanet_ops.box_iou`."""
    dtype = compute_dtype(boxes1, boxes2)
    boxes1, boxes2 = boxes1.to(dtype), boxes2.to(dtype)
    inter, union = _intersection_and_union(boxes1[:, None], boxes2[None])
    return torch.where(inter > 0, inter / torch.where(inter > 0, union, 1.0), 0.0).nan_to_num(nan=0.0)


def _intersection_and_union(
    boxes1: Tensor,  # [..., 4]
    boxes2: Tensor,  # [..., 4]
) -> tuple[Tensor, Tensor]:
    top_left = torch.maximum(boxes1[..., :2], boxes2[..., :2])
    bottom_right = torch.minimum(boxes1[..., 2:], boxes2[..., 2:])
    width, height = (bottom_right - top_left).clamp(min=0).unbind(-1)
    inter = width * height
    return inter, (_area(boxes1) + _area(boxes2)) - inter


def _area(boxes: Tensor) -> Tensor:  # [..., 4] -> [...]
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def _is_valid(boxes: Tensor) -> Tensor:  # [..., 4] -> [...] bool
    sides = boxes[..., 2:] - boxes[..., :2]
    return ((sides > 0) & (sides < math.inf)).all(-1)


def match_anchors(
    anchors: Tensor | AnchorGrid,  # [A, 4] or [N, A, 4]
    gt_boxes: Tensor,  # [N, M, 4]
    gt_count: Tensor,  # [N]
    *,
    fg_iou_threshold: float = 0.5,
    bg_iou_threshold: float = 0.4,
    low_quality: str = "torchvision",
    low_quality_min_iou: float = 0.0,
    crowd_boxes: Tensor | None = None,  # [N, C, 4]
    crowd_count: Tensor | None = None,  # [N]
    crowd_ioa_threshold: float = 0.5,
) -> Tensor:  # [N, A] int32
    """Matches anchors to ground truth; see `retinanet_ops.match_anchors`."""
    boxes = as_boxes(anchors)
    dtype = compute_dtype(boxes, gt_boxes)
    boxes, gt_boxes = boxes.to(dtype), gt_boxes.to(dtype)
    # Comparing with a tensor of the compute dtype rounds the threshold to it, as every op does.
    fg, bg, min_iou, crowd_threshold = torch.tensor(
        [fg_iou_threshold, bg_iou_threshold, low_quality_min_iou, crowd_ioa_threshold],
        dtype=dtype,
        device=boxes.device,
    )
    batch, num_gt = gt_boxes.shape[:2]
    rows = []
    for n in range(batch):
        image_anchors = boxes[n] if boxes.dim() == 3 else boxes
        valid = _is_valid(gt_boxes[n]) & (torch.arange(num_gt, device=boxes.device) < gt_count[n])
        iou = torch.where(valid[:, None], box_iou(gt_boxes[n], image_anchors), -1.0)  # [M, A]
        iou = torch.cat([iou, iou.new_full((1, iou.shape[1]), -1.0)])  # keeps max() defined without ground truth
        best, argmax = iou.max(dim=0)
        match = torch.where(best >= fg, argmax, torch.where(best < bg, BACKGROUND, IGNORED))
        if low_quality != "off" and iou.shape[1] > 0:
            best_of_box = iou.max(dim=1).values
            promotes = (best_of_box > min_iou) & (best_of_box >= 0)
            promoted = (iou == best_of_box[:, None]) & promotes[:, None]  # [M + 1, A]
            if low_quality == "torchvision":
                match = torch.where(promoted.any(0), argmax, match)
            else:
                index = torch.arange(num_gt + 1, device=boxes.device)[:, None]
                last = torch.where(promoted, index, -1).max(dim=0).values
                match = torch.where(last >= 0, last, match)
        if crowd_boxes is not None and crowd_count is not None:
            in_crowd = _is_valid(crowd_boxes[n].to(dtype)) & (
                torch.arange(crowd_boxes.shape[1], device=boxes.device) < crowd_count[n]
            )
            inter, _ = _intersection_and_union(crowd_boxes[n].to(dtype)[:, None], image_anchors[None])
            ioa = torch.where(inter > 0, inter / _area(image_anchors), 0.0)
            covered = ((ioa >= crowd_threshold) & in_crowd[:, None] & (inter > 0)).any(0)
            match = torch.where(covered & (match == BACKGROUND), IGNORED, match)
        rows.append(match.to(torch.int32))
    return torch.stack(rows) if rows else torch.empty(0, boxes.shape[-2], dtype=torch.int32, device=boxes.device)


def assign_targets(
    anchors: Tensor | AnchorGrid,  # [A, 4] or [N, A, 4]
    gt_boxes: Tensor,  # [N, M, 4]
    gt_labels: Tensor,  # [N, M] integer
    gt_count: Tensor,  # [N]
    *,
    fg_iou_threshold: float = 0.5,
    bg_iou_threshold: float = 0.4,
    low_quality: str = "torchvision",
    low_quality_min_iou: float = 0.0,
    crowd_boxes: Tensor | None = None,  # [N, C, 4]
    crowd_count: Tensor | None = None,  # [N]
    crowd_ioa_threshold: float = 0.5,
) -> Targets:
    """Class label of every anchor; see `retinanet_ops.assign_targets`."""
    matches = match_anchors(
        anchors,
        gt_boxes,
        gt_count,
        fg_iou_threshold=fg_iou_threshold,
        bg_iou_threshold=bg_iou_threshold,
        low_quality=low_quality,
        low_quality_min_iou=low_quality_min_iou,
        crowd_boxes=crowd_boxes,
        crowd_count=crowd_count,
        crowd_ioa_threshold=crowd_ioa_threshold,
    )
    padded = torch.cat([gt_labels.to(torch.int32), torch.zeros_like(gt_labels[:, :1], dtype=torch.int32)], dim=1)
    if padded.shape[1] == 0:
        padded = torch.zeros(len(padded), 1, dtype=torch.int32, device=padded.device)
    labels = torch.where(matches >= 0, padded.gather(1, matches.clamp(min=0).long()), matches)
    return Targets(matches, labels, (matches >= 0).sum(1, dtype=torch.int32))


def encode_boxes(
    boxes: Tensor,  # [A, 4] or [N, A, 4]
    anchors: Tensor | AnchorGrid,  # [A, 4] or [N, A, 4]
    *,
    weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
) -> Tensor:  # [A, 4] or [N, A, 4]
    """Boxes as deltas from their anchors; see `retinanet_ops.encode_boxes`."""
    reference = as_boxes(anchors)
    dtype = compute_dtype(boxes, reference)
    centre, size = _centre_and_size(boxes.to(dtype))
    anchor_centre, anchor_size = _centre_and_size(reference.to(dtype))
    scale = torch.tensor(weights, dtype=dtype, device=boxes.device)
    return torch.cat(((centre - anchor_centre) / anchor_size, torch.log(size / anchor_size)), dim=-1) * scale


def decode_boxes(
    deltas: Tensor,  # [A, 4] or [N, A, 4]
    anchors: Tensor | AnchorGrid,  # [A, 4] or [N, A, 4]
    *,
    weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
    max_log_ratio: float = MAX_LOG_RATIO,
    min_log_ratio: float | None = None,
    image_sizes: Tensor | None = None,  # [N, 2] (height, width)
) -> Tensor:  # [A, 4] or [N, A, 4]
    """Boxes from deltas; see `retinanet_ops.decode_boxes`."""
    reference = as_boxes(anchors)
    dtype = compute_dtype(deltas, reference)
    anchor_centre, anchor_size = _centre_and_size(reference.to(dtype))
    deltas = deltas.to(dtype) / torch.tensor(weights, dtype=dtype, device=deltas.device)
    centre = deltas[..., :2] * anchor_size + anchor_centre
    half = torch.exp(deltas[..., 2:].clamp(min=min_log_ratio, max=max_log_ratio)) * anchor_size * 0.5
    boxes = torch.cat((centre - half, centre + half), dim=-1)
    return boxes if image_sizes is None else clip_boxes(boxes, image_sizes)


def _centre_and_size(boxes: Tensor) -> tuple[Tensor, Tensor]:  # [..., 4] -> two [..., 2]
    size = boxes[..., 2:] - boxes[..., :2]
    return boxes[..., :2] + 0.5 * size, size


def clip_boxes(
    boxes: Tensor,  # [..., 4]
    image_sizes: Tensor | tuple[int, int],  # [N, 2] or one (height, width)
) -> Tensor:  # [..., 4]
    """Boxes clipped to their images; see `retinanet_ops.clip_boxes`."""
    if not isinstance(image_sizes, Tensor):
        image_sizes = torch.tensor([image_sizes], device=boxes.device)
    dtype = compute_dtype(boxes)
    limit = image_sizes.to(dtype).flip(-1).repeat(1, 2)  # [N, 4] as (w, h, w, h)
    if boxes.dim() == 3:
        limit = limit[:, None]
    clipped = torch.minimum(boxes.to(dtype).clamp(min=0), limit)
    return clipped.to(boxes.dtype)


def nms(
    boxes: Tensor,  # [C, 4]
    scores: Tensor,  # [C]
    iou_threshold: float,
) -> Tensor:  # [kept] int64
    """Indices that survive NMS, best first; see `retinanet_ops.nms`."""
    return batched_nms(boxes, scores, torch.zeros(len(boxes), dtype=torch.int64, device=boxes.device), iou_threshold)


def batched_nms(
    boxes: Tensor,  # [C, 4]
    scores: Tensor,  # [C]
    idxs: Tensor,  # [C] integer
    iou_threshold: float,
) -> Tensor:  # [kept] int64
    """NMS within each class; see `retinanet_ops.batched_nms`."""
    kept, _ = _greedy_nms(boxes, scores, idxs, iou_threshold, max_detections=len(boxes))
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
    """NMS of a padded batch; see `retinanet_ops.batched_nms_padded`."""
    batch = len(boxes)
    index = torch.full((batch, max_detections), -1, dtype=torch.int64, device=boxes.device)
    count = torch.zeros(batch, dtype=torch.int64, device=boxes.device)
    for n in range(batch):
        valid = boxes.shape[1] if counts is None else int(counts[n].clamp(0, boxes.shape[1]))
        image_labels = (
            torch.zeros(valid, dtype=torch.int64, device=boxes.device) if labels is None else labels[n, :valid]
        )
        kept, _ = _greedy_nms(boxes[n, :valid], scores[n, :valid], image_labels, iou_threshold, max_detections)
        index[n, : len(kept)] = torch.tensor(kept, dtype=torch.int64, device=boxes.device)
        count[n] = len(kept)
    return index, count


def _greedy_nms(
    boxes: Tensor,  # [C, 4]
    scores: Tensor,  # [C]
    labels: Tensor,  # [C]
    iou_threshold: float,
    max_detections: int,
    *,
    class_agnostic: bool = False,
    max_per_class: int | None = None,
) -> tuple[list[int], bool]:
    """Kept indices, best first, and whether a cap dropped a survivor."""
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


def detect(
    cls_logits: Sequence[Tensor],  # L tensors [N, A*K, H, W]
    box_deltas: Sequence[Tensor],  # L tensors [N, A*4, H, W]
    anchors: Tensor | AnchorGrid,  # [A, 4] or [N, A, 4]
    image_sizes: Tensor,  # [N, 2] (height, width)
    *,
    score_threshold: float = 0.05,
    topk: int = 1000,
    iou_threshold: float = 0.5,
    max_detections: int = 100,
    class_agnostic: bool = False,
    max_per_class: int | None = None,
    weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
    max_log_ratio: float = MAX_LOG_RATIO,
) -> Detections:
    """Logits to detections; see `retinanet_ops.detect`."""
    batch = len(cls_logits[0])
    deltas = torch.cat([_rows(d, 4) for d in box_deltas], dim=1)  # [N, A, 4]
    num_classes = cls_logits[0].shape[1] * 4 // box_deltas[0].shape[1]
    boxes = decode_boxes(deltas, anchors, weights=weights, max_log_ratio=max_log_ratio, image_sizes=image_sizes)
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
            flat = _rows(level[n : n + 1], num_classes).flatten().float()
            passing = (flat.double().sigmoid().float() > threshold).nonzero()[:, 0]
            truncated |= len(passing) > topk
            best = passing[torch.sort(flat[passing], descending=True, stable=True).indices[:topk]]
            logits.append(flat[best])
            candidates.append(best + first)
            first += len(flat)
        logit, candidate = torch.cat(logits), torch.cat(candidates)
        candidate, position = candidate.sort()
        logit = logit[position]
        anchor, label = candidate // num_classes, candidate % num_classes
        kept, capped = _greedy_nms(
            boxes[n, anchor],
            logit,
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


def _rows(
    level: Tensor,  # [N, A*size, H, W]
    size: int,
) -> Tensor:  # [N, H*W*A, size]
    n, channels, h, w = level.shape
    return (
        level.reshape(n, channels // size, size, h, w)
        .permute(0, 3, 4, 1, 2)
        .reshape(n, h * w * (channels // size), size)
    )
