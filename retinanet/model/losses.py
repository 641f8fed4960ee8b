"""The losses of RetinaNet on padded batches, and what all detectors share: loss sums by image, and their divisors.

Lin et al. 2017 (arXiv:1708.02002), section 4.1: focal loss for classes, and a box loss for the foreground anchors. The
sums of every image are divided by its number of foreground anchors (at least 1), as torchvision does, or by a mean of
that number, and are then averaged over the batch. This module never synchronises with the device, and none of its
shapes depends on values.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

import retinanet_ops as ops
from retinanet.model.config import RetinaNetConfig
from retinanet.model.float32_buffers import Float32Buffers
from retinanet.model.heads import HeadOutputs


class Normaliser(Float32Buffers):
    """The divisor of an image's loss sums. In training mode, means are over the images of all processes.

    Args:
        rule: `per_image` divides each image by its own number of positives. Other rules have one divisor for all.
    """

    def __init__(self, rule: str) -> None:
        """Keep the rule."""
        super().__init__()
        self.rule = rule

    def forward(self, num_positive: Tensor) -> Tensor:  # [N] integer -> [N] or scalar, float32, above 0
        """Return one divisor for each image, or one for all."""
        positives = num_positive.to(torch.float32)
        if self.rule == "per_image":
            return positives.clamp(min=1)
        # In evaluation mode, other processes may not make this call, and a collective operation would wait for them.
        return self.common(_mean_of_all_processes(positives) if self.training else positives.mean())

    def common(self, mean: Tensor) -> Tensor:  # scalar -> scalar, float32, above 0
        """Return the divisor that all images have, from the mean number of positives."""
        return mean.clamp(min=1)


class LossNormaliser(Normaliser):
    """The divisor of an image's loss sums, by the rule `loss_normaliser` of a RetinaNet's configuration.

    The moving average of `ema` is a buffer `average`. It is 0 before the first training step and changes in training
    mode only. Every divisor is at least 1.

    Args:
        config: The rule and the decay of the moving average.
    """

    average: Tensor  # scalar float32

    def __init__(self, config: RetinaNetConfig) -> None:
        """Start without an average."""
        super().__init__(config.loss_normaliser)
        self.decay = config.compat.loss_ema_decay
        if self.rule == "ema":
            self.register_buffer("average", torch.zeros((), dtype=torch.float32))

    def common(self, mean: Tensor) -> Tensor:  # scalar -> scalar, float32, at least 1
        """Return the divisor that the rules `batch` and `ema` give all images, from the mean number of positives."""
        mean = super().common(mean)
        if self.rule == "batch":
            return mean
        average = torch.where(self.average > 0, self.decay * self.average + (1 - self.decay) * mean, mean)
        if self.training:
            self.average.copy_(average)
        return average


class MatchedNormaliser(Normaliser):
    """The mean number of positives (matched default boxes or points) of an image, or 1 if the batch has none.

    The mean loss of the images divided by it is the sum of all losses divided by the number of all positives.
    """

    def __init__(self) -> None:
        """Take the mean over the batch."""
        super().__init__("batch")

    def common(self, mean: Tensor) -> Tensor:  # scalar -> scalar, above 0
        """Return the divisor from the mean number of positives."""
        # Few positives in many images have a mean below 1, which is the right divisor, too.
        return mean.where(mean > 0, 1.0)


class ImageMeans(Normaliser):
    """The divisor of losses that are means over samples already and have 1 as their number of positives."""

    def __init__(self) -> None:
        """Divide each image by its own number."""
        super().__init__("per_image")


def _mean_of_all_processes(values: Tensor) -> Tensor:  # scalar
    if not (dist.is_available() and dist.is_initialized()):
        return values.mean()
    total = torch.stack((values.sum(), torch.ones_like(values).sum()))
    dist.all_reduce(total)
    return total[0] / total[1]


class ImageLosses(NamedTuple):
    """Sums of the losses of each image by name, and the number that they are to be divided by."""

    sums: dict[str, Tensor]  # [N] float32 (float64 for float64 outputs)
    num_positive: Tensor  # [N] integer, number of foreground anchors, or 1 for losses that are means already


def image_losses(
    outputs: HeadOutputs,  # N images, A anchors, K classes
    anchors: ops.AnchorGrid,
    ground_truth: ops.GroundTruth,  # boxes [N, M, 4], labels [N, M], count [N]
    config: RetinaNetConfig,
    crowds: ops.PaddedBoxes | None = None,  # boxes [N, C, 4], count [N]
    class_weights: Tensor | None = None,  # [K] floating
) -> ImageLosses:
    """Assign targets to the anchors and return the sums of both losses of each image.

    Args:
        outputs: Logits and deltas of each level, in the layout of the heads.
        anchors: The anchors of these outputs.
        ground_truth: Padded boxes in pixels of the batch, with class ids.
        config: Thresholds, coder weights and loss parameters.
        crowds: Padded regions whose background anchors take no part in the loss, or None.
        class_weights: Factor on the focal loss of a foreground anchor, by its class; None is 1 for all. Background
            anchors have the factor 1.

    Returns:
        The sums. An image without objects has background anchors only, and its box loss is 0.
    """
    targets = ops.assign_targets(
        anchors,
        ground_truth.boxes,
        ground_truth.labels,
        ground_truth.count,
        rule=ops.MatchRule(config.fg_iou_threshold, config.bg_iou_threshold, config.low_quality),
        crowds=crowds,
    )
    classification = ops.dense_focal_loss(
        outputs.cls_logits,
        targets.labels,
        config.num_classes,
        anchor_weight=anchor_weights(targets.labels, class_weights),
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
    return ImageLosses({"classification": classification, "bbox_regression": box}, targets.num_positive)


def anchor_weights(
    labels: Tensor,  # [N, A] integer
    class_weights: Tensor | None,  # [K] floating
) -> Tensor | None:  # [N, A] floating
    """Return the factor on the class loss of each anchor: that of its class, or 1 for background and ignored ones."""
    if class_weights is None:
        return None
    # The labels -1 and -2 of background and ignored anchors take the two ones at the end.
    table = torch.cat([class_weights, class_weights.new_ones(2)])
    return table[labels.long()]


def retinanet_losses(
    outputs: HeadOutputs,  # N images, A anchors, K classes
    anchors: ops.AnchorGrid,
    ground_truth: ops.GroundTruth,  # boxes [N, M, 4], labels [N, M], count [N]
    config: RetinaNetConfig,
    normaliser: LossNormaliser,
    crowds: ops.PaddedBoxes | None = None,  # boxes [N, C, 4], count [N]
    class_weights: Tensor | None = None,  # [K] floating
) -> dict[str, Tensor]:
    """Return both losses of a batch: the mean over the images of their sums, each divided by the normaliser's divisor.

    Args:
        outputs: As in `image_losses`.
        anchors: As in `image_losses`.
        ground_truth: As in `image_losses`.
        config: As in `image_losses`.
        normaliser: The divisor of the sums.
        crowds: As in `image_losses`.
        class_weights: As in `image_losses`.

    Returns:
        `classification` and `bbox_regression`, scalars, float32 (float64 for float64 outputs).
    """
    return mean_losses(image_losses(outputs, anchors, ground_truth, config, crowds, class_weights), normaliser)


def mean_losses(losses: ImageLosses, normaliser: Normaliser) -> dict[str, Tensor]:
    """Return the mean over the images of the sums of each loss, divided by the normaliser's divisor."""
    divisor = normaliser(losses.num_positive)
    return {name: (values / divisor).mean() for name, values in losses.sums.items()}
