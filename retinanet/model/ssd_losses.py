"""The losses of SSD on padded batches: softmax with hard negatives or focal loss for classes, smooth L1 for boxes.

Liu et al. 2016 (arXiv:1512.02325), section 2.2. The sums of all images are divided by the number of default boxes that
are matched in the batch, as torchvision does. This module never synchronises with the device, and none of its shapes
depends on values.
"""

from __future__ import annotations

from torch import Tensor

import retinanet_ops as ops
from retinanet.model.heads import HeadOutputs
from retinanet.model.losses import ImageLosses, anchor_weights
from retinanet.model.ssd_config import SSDConfig
from retinanet_ops.types import compute_dtype

# Keeps the logit of a score of 0 or 1 finite.
_LEAST_SCORE = 1e-7


def ssd_image_losses(
    outputs: HeadOutputs,  # N images, A default boxes
    default_boxes: Tensor,  # [A, 4]
    ground_truth: ops.GroundTruth,  # boxes [N, M, 4], labels [N, M], count [N]
    config: SSDConfig,
    crowds: ops.PaddedBoxes | None = None,  # boxes [N, C, 4], count [N]
    class_weights: Tensor | None = None,  # [K] floating
) -> ImageLosses:
    """Match the default boxes to objects and return the sums of both losses of each image.

    Args:
        outputs: Logits and deltas of each level, in the layout of the heads.
        default_boxes: The default boxes of these outputs.
        ground_truth: Padded boxes in pixels of the batch, with class ids.
        config: Threshold, coder weights and loss parameters.
        crowds: Padded regions whose background default boxes take no part in the loss, or None.
        class_weights: Factor on the class loss of a matched default box, by its class; None is 1 for all.

    Returns:
        The sums. The box loss of an image without objects is 0.
    """
    targets = ops.assign_targets(
        default_boxes,
        ground_truth.boxes,
        ground_truth.labels,
        ground_truth.count,
        rule=ops.MatchRule(config.fg_iou_threshold, config.fg_iou_threshold, "ssd"),
        crowds=crowds,
    )
    weights = anchor_weights(targets.labels, class_weights)
    if config.cls_loss == "focal":
        classification = ops.dense_focal_loss(
            outputs.cls_logits,
            targets.labels,
            config.num_classes,
            anchor_weight=weights,
            alpha=config.focal_alpha,
            gamma=config.focal_gamma,
        )
    else:
        classification = _mining_loss(outputs.cls_logits, targets.labels, config, weights)
    box = ops.dense_box_loss(
        outputs.box_deltas,
        default_boxes,
        ground_truth.boxes,
        targets.matches,
        kind="smooth_l1",
        beta=config.smooth_l1_beta,
        coder_weights=config.box_weights,
    )
    return ImageLosses({"classification": classification, "bbox_regression": box}, targets.num_positive)


def _mining_loss(
    cls_logits: list[Tensor],  # L tensors [N, A_l * (K + 1), H, W]
    labels: Tensor,  # [N, A] int32: class id, -1 background, -2 ignored
    config: SSDConfig,
    weights: Tensor | None,  # [N, A] floating
) -> Tensor:  # [N]
    """Return the softmax cross entropy of each image over its matched default boxes and its hard negatives."""
    # Class 0 is the background, as which ignored default boxes have a loss that is not counted.
    classes = (labels + 1).clamp(min=0)
    entropy = ops.dense_softmax_cross_entropy(cls_logits, classes, config.num_scores)
    counted = (labels >= 0) | ops.hard_negative_mask(
        entropy, labels, ratio=config.negative_ratio, min_negatives=config.min_negatives
    )
    losses = entropy if weights is None else entropy * weights
    return losses.where(counted, 0).sum(1)


def foreground_logits(
    cls_logits: list[Tensor],  # L tensors [N, A_l * (K + 1), H, W]
    num_scores: int,
) -> list[Tensor]:  # L tensors [N, A_l * K, H, W]
    """Return logits without the background, whose sigmoids are the softmax scores of the classes.

    The op `detect` takes the sigmoid of what it gets.
    """
    rows = (level.to(compute_dtype(level)).unflatten(1, (-1, num_scores)) for level in cls_logits)
    return [level.softmax(2)[:, :, 1:].logit(_LEAST_SCORE).flatten(1, 2) for level in rows]
