"""The losses of RetinaNet on batched tensors: focal loss for classes, a box loss for the foreground anchors.

Lin et al. 2017 (arXiv:1708.02002), section 4.1. Every image's sums are divided by its number of foreground
anchors (at least 1), as torchvision does, or by the batch's mean of that number, then averaged over the batch.
Nothing waits for the device, and no shape depends on values.
"""

from __future__ import annotations

import torch
from torch import Tensor

import retinanet_ops as ops
from retinanet.config import RetinaNetConfig
from retinanet.heads import HeadOutputs


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
    box = ops.dense_box_loss(
        outputs.box_deltas,
        anchors,
        ground_truth.boxes,
        targets.matches,
        kind=config.box_loss,
        beta=config.smooth_l1_beta,
        weights=config.box_weights,
        max_log_ratio=config.max_log_ratio,
    )
    return {
        "classification": (classification / normaliser).mean(),
        "bbox_regression": (box / normaliser).mean(),
    }
