"""Reference of matching: one IoU matrix per image."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..anchors import AnchorGrid, as_boxes
from ..constants import BACKGROUND, IGNORED
from ..types import MatchRule, MatchStatistics, PaddedBoxes, Targets, compute_dtype
from ._overlaps import areas, intersection_and_union
from .box_iou import box_iou


def match_anchors(
    anchors: Tensor | AnchorGrid,  # [A, 4] or [N, A, 4]
    gt_boxes: Tensor,  # [N, M, 4]
    gt_count: Tensor,  # [N]
    *,
    rule: MatchRule = MatchRule(),
    crowds: PaddedBoxes | tuple[Tensor, Tensor] | None = None,  # boxes [N, C, 4], count [N]
) -> Tensor:  # [N, A] int32
    """Match anchors to ground truth; see `retinanet_ops.match_anchors`."""
    return match_statistics(anchors, gt_boxes, gt_count, rule=rule, crowds=crowds).matches


def match_statistics(
    anchors: Tensor | AnchorGrid,  # [A, 4] or [N, A, 4]
    gt_boxes: Tensor,  # [N, M, 4]
    gt_count: Tensor,  # [N]
    *,
    rule: MatchRule = MatchRule(),
    crowds: PaddedBoxes | tuple[Tensor, Tensor] | None = None,  # boxes [N, C, 4], count [N]
) -> MatchStatistics:
    """Match anchors and return how well they fit; see `retinanet_ops.match_statistics`."""
    boxes = as_boxes(anchors)
    dtype = compute_dtype(boxes, gt_boxes)
    boxes, gt_boxes = boxes.to(dtype), gt_boxes.to(dtype)
    # The kernels compare with thresholds that are rounded to the compute dtype.
    fg, bg, min_iou, crowd_ioa = torch.tensor(
        [rule.fg_iou, rule.bg_iou, rule.low_quality_min_iou, rule.crowd_ioa], dtype=dtype, device=boxes.device
    )
    batch, num_gt = gt_boxes.shape[:2]
    count = boxes.shape[-2]
    device = boxes.device
    result = MatchStatistics(
        matches=torch.empty(batch, count, dtype=torch.int32, device=device),
        ious=boxes.new_zeros(batch, count),
        gt_best_ious=boxes.new_zeros(batch, num_gt),
        gt_positives=torch.zeros(batch, num_gt, dtype=torch.int32, device=device),
    )
    for n in range(batch):
        image_anchors = boxes[n] if boxes.dim() == 3 else boxes
        valid = _is_valid(gt_boxes[n]) & (torch.arange(num_gt, device=device) < gt_count[n])
        iou = torch.where(valid[:, None], box_iou(gt_boxes[n], image_anchors), -1.0)  # [M, A]
        # An extra row and column keep max() defined without ground truth and without anchors.
        iou = torch.cat([iou, iou.new_full((1, count), -1.0)])
        best_of_gt = torch.cat([iou, iou.new_full((num_gt + 1, 1), -1.0)], dim=1).max(dim=1).values
        best, argmax = iou.max(dim=0)
        match = torch.where(best >= fg, argmax, torch.where(best < bg, BACKGROUND, IGNORED))
        if rule.low_quality != "off":
            promotes = (best_of_gt > min_iou) & (best_of_gt >= 0)
            promoted = (iou == best_of_gt[:, None]) & promotes[:, None]  # [M + 1, A]
            if rule.low_quality == "ssd":  # only the first anchor of a tie
                promoted &= promoted.cumsum(1) == 1
            if rule.low_quality == "torchvision":
                match = torch.where(promoted.any(0), argmax, match)
            else:
                index = torch.arange(num_gt + 1, device=device)[:, None]
                last = torch.where(promoted, index, -1).max(dim=0).values
                match = torch.where(last >= 0, last, match)
        of_match = iou.gather(0, match.clamp(min=0)[None])[0]
        result.ious[n] = torch.where(match >= 0, of_match, torch.where(match == IGNORED, best, 0.0))
        result.gt_best_ious[n] = best_of_gt[:num_gt].clamp(min=0)
        result.gt_positives[n] = (match == torch.arange(num_gt, device=device)[:, None]).sum(1, dtype=torch.int32)
        if crowds is not None:
            crowd_boxes, crowd_count = crowds[0][n].to(dtype), crowds[1][n]
            in_crowd = _is_valid(crowd_boxes) & (torch.arange(len(crowd_boxes), device=device) < crowd_count)
            inter, _ = intersection_and_union(crowd_boxes[:, None], image_anchors[None])
            ioa = torch.where(inter > 0, inter / areas(image_anchors), 0.0)
            covered = ((ioa >= crowd_ioa) & in_crowd[:, None] & (inter > 0)).any(0)
            match = torch.where(covered & (match == BACKGROUND), IGNORED, match)
        result.matches[n] = match
    return result


def assign_targets(
    anchors: Tensor | AnchorGrid,  # [A, 4] or [N, A, 4]
    gt_boxes: Tensor,  # [N, M, 4]
    gt_labels: Tensor,  # [N, M] integer
    gt_count: Tensor,  # [N]
    *,
    rule: MatchRule = MatchRule(),
    crowds: PaddedBoxes | tuple[Tensor, Tensor] | None = None,  # boxes [N, C, 4], count [N]
) -> Targets:
    """Match anchors and return their class labels; see `retinanet_ops.assign_targets`."""
    matches = match_anchors(anchors, gt_boxes, gt_count, rule=rule, crowds=crowds)
    padded = torch.cat([gt_labels.to(torch.int32), torch.zeros_like(gt_labels[:, :1], dtype=torch.int32)], dim=1)
    if padded.shape[1] == 0:
        padded = torch.zeros(len(padded), 1, dtype=torch.int32, device=padded.device)
    labels = torch.where(matches >= 0, padded.gather(1, matches.clamp(min=0).long()), matches)
    return Targets(matches, labels, (matches >= 0).sum(1, dtype=torch.int32))


def _is_valid(boxes: Tensor) -> Tensor:  # [..., 4] -> [...] bool
    sides = boxes[..., 2:] - boxes[..., :2]
    return ((sides > 0) & (sides < math.inf)).all(-1)
