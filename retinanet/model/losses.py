"""The losses of RetinaNet on batched tensors: focal loss for classes, a box loss for the foreground anchors.

Lin et al. 2017 (arXiv:1708.02002), section 4.1. Every image's sums are divided by its number of foreground
anchors (at least 1), as torchvision does, or by a mean of that number, then averaged over the batch.
Nothing waits for the device, and no shape depends on values.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

import retinanet_ops as ops
from retinanet.model.config import RetinaNetConfig
from retinanet.model.float32_buffers import Float32Buffers
from retinanet.model.heads import HeadOutputs


class LossNormaliser(Float32Buffers):
    """What the loss sums of each image are divided by: `loss_normaliser` of the configuration.

    The moving average of `ema` is a buffer `average`, 0 before the first step of training; it changes in training mode
    only. Where processes train together, means are over the images of all in training mode.

    Args:
        config: Gives the rule and the decay.
    """

    average: Tensor  # scalar float32

    def __init__(self, config: RetinaNetConfig) -> None:
        """Begins without an average."""
        super().__init__()
        self.rule = config.loss_normaliser
        self.decay = config.loss_ema_decay
        if self.rule == "ema":
            self.register_buffer("average", torch.zeros((), dtype=torch.float32))

    def forward(
        self,
        num_positive: Tensor,  # [N] integer
    ) -> Tensor:  # [N] or scalar, float32, at least 1
        """The divisor of each image's sums, or of all."""
        positives = num_positive.to(torch.float32)
        if self.rule == "per_image":
            return positives.clamp(min=1)
        # In evaluation another process may have no step to take part in.
        mean = (_mean_of_all_processes(positives) if self.training else positives.mean()).clamp(min=1)
        if self.rule == "batch":
            return mean
        average = torch.where(self.average > 0, self.decay * self.average + (1 - self.decay) * mean, mean)
        if self.training:
            self.average.copy_(average)
        return average


def _mean_of_all_processes(values: Tensor) -> Tensor:  # scalar
    if not (dist.is_available() and dist.is_initialized()):
        return values.mean()
    total = torch.stack((values.sum(), torch.ones_like(values).sum()))
    dist.all_reduce(total)
    return total[0] / total[1]


def retinanet_losses(
    outputs: HeadOutputs,  # N images, A anchors, K classes
    anchors: ops.AnchorGrid,
    ground_truth: ops.GroundTruth,  # boxes [N, M, 4], labels [N, M], count [N]
    config: RetinaNetConfig,
    normaliser: LossNormaliser,
    crowd: ops.PaddedBoxes | None = None,  # boxes [N, C, 4], count [N]
) -> dict[str, Tensor]:
    """Assigns targets to the anchors and computes both losses.

    Args:
        outputs: Logits and deltas of each level, straight from the heads.
        anchors: The anchors that these outputs belong to.
        ground_truth: Padded boxes in pixels of the batch, with class ids.
        config: Gives thresholds, coder weights and loss parameters.
        normaliser: Gives what the sums are divided by.
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
        rule=ops.MatchRule(config.fg_iou_threshold, config.bg_iou_threshold, config.low_quality),
        crowds=crowd,
    )
    divisor = normaliser(targets.num_positive)
    classification = ops.dense_focal_loss(
        outputs.cls_logits,
        targets.labels,
        config.num_classes,
        alpha=config.focal_alpha,
        gamma=config.focal_gamma,
        label_smoothing=config.label_smoothing,
    )
    box = ops.dense_box_loss(
        outputs.box_deltas,
        anchors,
        ground_truth.boxes,
        targets.matches,
        kind=config.box_loss,
        beta=config.smooth_l1_beta,
        coder_weights=config.box_weights,
        max_log_ratio=config.max_log_ratio,
    )
    return {
        "classification": (classification / divisor).mean(),
        "bbox_regression": (box / divisor).mean(),
    }
