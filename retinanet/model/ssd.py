"""SSD: feature extractors, torchvision's heads, and the calls of losses and post-processing."""

from __future__ import annotations

import os
from collections.abc import Sequence

from torch import Tensor, nn

import retinanet_ops as ops
from retinanet.model.detector import DenseAnchorDetector
from retinanet.model.heads import HeadOutputs
from retinanet.model.losses import ImageLosses, MatchedNormaliser
from retinanet.model.ssd_config import SSDConfig
from retinanet.model.ssd_losses import foreground_logits, ssd_image_losses
from retinanet.model.ssd_network import build_network, default_boxes


class SSD(DenseAnchorDetector):
    """An SSD as described by one configuration; its state-dict names are torchvision's if it has the network.

    In training mode a call returns the losses `classification` and `bbox_regression`. In evaluation mode it returns one
    dict per image with `boxes` `[D, 4]`, `scores` `[D]` and `labels` `[D]`, best first.

    Images are resized to the square that the network takes, whatever their aspect ratio. Labels are 0..K-1 as
    everywhere in this package; the background class of torchvision's SSD exists inside the model only, with
    `cls_loss="mining"`.

    Args:
        config: The configuration, which is kept as `model.config`.
        backbone_weights: Path to a torchvision state dict of the classification network (ImageNet), or None.

    Raises:
        DataError: The weights of the backbone cannot be read or do not fit.

    Attributes:
        config: The configuration.
        score_thresholds: The score thresholds with the best F1 on a validation set, or None if none were chosen. They
            do not change what a call returns; `config.score_threshold` does.

    Example:
        >>> model = SSD(SSDConfig(class_names=("tree",), network="ssdlite320", cls_loss="focal"))
        >>> images = [torch.rand(3, 300, 400), torch.rand(3, 500, 400)]
        >>> boxes = torch.tensor([[10.0, 10, 60, 80]])
        >>> targets = [{"boxes": boxes, "labels": torch.tensor([0])}] * 2
        >>> losses = model(images, targets)
        >>> detections = model.eval()(images)
    """

    config: SSDConfig
    default_boxes: Tensor  # [A, 4] float32, in pixels of the resized image

    def __init__(self, config: SSDConfig, backbone_weights: str | os.PathLike[str] | None = None) -> None:
        """Build the network with random weights, except those of the backbone where they are given."""
        super().__init__(config, MatchedNormaliser())
        self.backbone, self.head = build_network(config, backbone_weights)
        self.register_buffer("default_boxes", default_boxes(config.layout), persistent=False)

    @property
    def body(self) -> nn.Module:
        """The feature extractor: the classification network and the extra blocks behind it."""
        return self.backbone

    def heads(self, pixels: Tensor) -> HeadOutputs:  # [N, 3, size, size] normalised
        """Run the network alone and return the logits and box deltas of each level."""
        # The last map of most networks has one cell, and batch normalisation needs two values to train.
        alone = self.training and len(pixels) == 1 and self.config.trains_norm
        levels = list(self.backbone(pixels.expand(2, -1, -1, -1) if alone else pixels).values())
        logits, deltas = (
            [layer(level) for layer, level in zip(head.module_list, levels, strict=True)]
            for head in (self.head.classification_head, self.head.regression_head)
        )
        return HeadOutputs([x[:1] for x in logits], [x[:1] for x in deltas]) if alone else HeadOutputs(logits, deltas)

    def image_losses(
        self,
        pixels: Tensor,  # [N, 3, size, size] normalised
        ground_truth: ops.GroundTruth,  # boxes [N, M, 4] in pixels of the batch, labels [N, M], count [N]
        crowds: ops.PaddedBoxes | None = None,  # boxes [N, C, 4], count [N]
        image_sizes: Sequence[tuple[int, int]] | None = None,  # height, width of each image inside the padded batch
    ) -> ImageLosses:
        """Return the sums of the losses of each image; see `retinanet.model.ssd_losses.ssd_image_losses`."""
        outputs = self.heads(pixels)
        return ssd_image_losses(outputs, self.default_boxes, ground_truth, self.config, crowds, self.class_weights)

    def _head_arguments(
        self,
        outputs: HeadOutputs,
        pixels: Tensor,  # [N, 3, size, size]
    ) -> tuple[list[Tensor], list[Tensor], Tensor]:
        logits, deltas = outputs
        if self.config.cls_loss == "mining":
            logits = foreground_logits(logits, self.config.num_scores)
        return logits, deltas, self.default_boxes
