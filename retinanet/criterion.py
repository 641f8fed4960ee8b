"""The losses of RetinaNet on batched tensors: focal loss for classes, a box loss for the foreground anchors.

Lin et al. 2017 (arXiv:1708.02002), section 4.1. Every image's sums are divided by its number of foreground
anchors (at least 1), as torchvision does, or by the batch's mean of that number, then averaged over the batch.
Anchors that take no part are masked, never indexed, so no shape depends on values, and with L1 and smooth-L1
nothing waits for the device; torchvision's GIoU, DIoU and CIoU index inside, and do wait for a GPU.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import complete_box_iou_loss, distance_box_iou_loss, generalized_box_iou_loss

import retinanet_ops as ops
from retinanet.config import RetinaNetConfig
from retinanet.heads import HeadOutputs

_IOU_LOSSES = {
    "giou": generalized_box_iou_loss,
    "diou": distance_box_iou_loss,
    "ciou": complete_box_iou_loss,
}


def retinanet_losses(
    outputs: HeadOutputs,  # N images, A anchors, K classes
    anchors: ops.AnchorGrid,
    ground_truth: ops.GroundTruth,  # boxes [N, M, 4], labels [N, M], count [N]
    config: RetinaNetConfig,
    crowd: ops.GroundTruth | None = None,  # boxes [N, C, 4], count [N]
) -> dict[str, Tensor]:
    """Assigns targets to the anchors and computes both losses.

    Args:
        outputs: Logits and deltas of each level, straight from the heads.
        anchors: The anchors that these outputs belong to.
        ground_truth: Padded boxes in pixels of the batch, with class ids.
        config: Gives thresholds, coder weights and loss parameters.
        crowd: Padded regions whose background anchors take no part.

    Returns:
        `classification` and `bbox_regression`, scalars, float32 (float64 for float64 outputs). An image
        without objects has background anchors only: its box loss is 0.
    """
    targets = ops.assign_targets(
        anchors,
        ground_truth.boxes,
        ground_truth.labels,
        ground_truth.count,
        fg_iou_threshold=config.fg_iou_threshold,
        bg_iou_threshold=config.bg_iou_threshold,
        low_quality=config.low_quality,
        crowd_boxes=None if crowd is None else crowd.boxes,
        crowd_count=None if crowd is None else crowd.count,
    )
    positives = targets.num_positive.to(torch.float32)
    normaliser = positives.mean().clamp(min=1) if config.loss_normaliser == "batch" else positives.clamp(min=1)
    classification = ops.dense_focal_loss(
        outputs.cls_logits, targets.labels, alpha=config.focal_alpha, gamma=config.focal_gamma
    )
    deltas = _anchor_rows(outputs.box_deltas, 4)
    box = _box_losses(deltas, anchors, ground_truth.boxes, targets.matches, config)
    return {
        "classification": (classification / normaliser).mean(),
        "bbox_regression": (box / normaliser).mean(),
    }


def _box_losses(
    deltas: Tensor,  # [N, A, 4]
    anchors: ops.AnchorGrid,
    gt_boxes: Tensor,  # [N, M, 4]
    matches: Tensor,  # [N, A] ground-truth index, negative for none
    config: RetinaNetConfig,
) -> Tensor:  # [N]
    deltas = deltas if deltas.dtype == torch.float64 else deltas.float()
    positive = (matches >= 0)[..., None]  # [N, A, 1]
    # Anchors without an object look at an appended zero box, so that M = 0 needs no case of its own.
    index = torch.where(matches >= 0, matches, gt_boxes.shape[1]).long()
    matched = F.pad(gt_boxes, (0, 0, 0, 1)).gather(1, index[..., None].expand(-1, -1, 4))  # [N, A, 4]
    if config.box_loss in _IOU_LOSSES:
        # Masked anchors predict and target their own anchor: loss and gradient are finite, and 0 after the
        # mask.
        predicted = ops.decode_boxes(
            torch.where(positive, deltas, 0.0),
            anchors,
            weights=config.box_weights,
            max_log_ratio=config.max_log_ratio,
        )
        matched = torch.where(positive, matched, anchors.boxes())
        losses = _IOU_LOSSES[config.box_loss](predicted, matched, reduction="none")
        return torch.where(positive[..., 0], losses, 0.0).sum(1)
    target = ops.encode_boxes(matched, anchors, weights=config.box_weights)
    # The mask comes before the absolute value: the zero box has no finite code, and 0 * NaN would reach the
    # gradient.
    difference = torch.where(positive, deltas - target, 0.0)
    if config.box_loss == "l1":
        return difference.abs().sum((1, 2))
    zero = torch.zeros_like(difference)
    return F.smooth_l1_loss(difference, zero, beta=config.smooth_l1_beta, reduction="none").sum((1, 2))


def _anchor_rows(
    levels: list[Tensor],  # L tensors [N, A_l*size, H, W]
    size: int,
) -> Tensor:  # [N, A, size], rows in anchor order
    rows = []
    for level in levels:
        n, channels, height, width = level.shape
        row = level.reshape(n, channels // size, size, height, width).permute(0, 3, 4, 1, 2)
        rows.append(row.reshape(n, -1, size))
    return torch.cat(rows, dim=1)
