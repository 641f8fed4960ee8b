"""RetinaNet: backbone, feature pyramid and heads, and the calls of losses and post-processing."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

import retinanet_ops as ops
from retinanet.model.anchors import anchor_grid, base_anchors
from retinanet.model.config import RetinaNetConfig
from retinanet.model.detector import DenseAnchorDetector
from retinanet.model.heads import HeadOutputs, RetinaNetHead
from retinanet.model.losses import ImageLosses, LossNormaliser, image_losses
from retinanet.model.pyramid import PyramidDetector

#: Suffixes of state-dict entries that count training steps. They are reset when weights are taken from another model.
COUNTERS = ("num_batches_tracked", "normaliser.average")


class RetinaNet(PyramidDetector, DenseAnchorDetector):
    """A RetinaNet as described by one configuration; its state-dict names are torchvision's.

    In training mode a call returns the losses `classification` and `bbox_regression`. In evaluation mode it returns one
    dict per image with `boxes` `[D, 4]`, `scores` `[D]` and `labels` `[D]`, best first.

    Args:
        config: The configuration, which is kept as `model.config`.
        backbone_weights: Path to a torchvision state dict of the backbone (ImageNet), or None.
        backbone: Module for a configuration whose backbone is `custom`; see `PyramidDetector`.

    Raises:
        DataError: The weights of the backbone cannot be read or do not fit.
        ValueError: `backbone` is missing, is given for another configuration, or does not fit the configuration.

    Attributes:
        config: The configuration.
        score_thresholds: The score thresholds with the best F1 on a validation set, or None if none were chosen. They
            do not change what a call returns; `config.score_threshold` does.

    Example:
        >>> model = RetinaNet(RetinaNetConfig(class_names=("tree",), backbone="resnet18"))
        >>> images = [torch.rand(3, 300, 400), torch.rand(3, 500, 400)]
        >>> boxes = torch.tensor([[10.0, 10, 60, 80]])
        >>> targets = [{"boxes": boxes, "labels": torch.tensor([0])}] * 2
        >>> losses = model(images, targets)
        >>> detections = model.eval()(images)
    """

    config: RetinaNetConfig
    base_anchors: Tensor  # [L * anchors per cell, 4] float32

    def __init__(
        self,
        config: RetinaNetConfig,
        backbone_weights: str | os.PathLike[str] | None = None,
        *,
        backbone: nn.Module | None = None,
    ) -> None:
        """Build the network with random weights, except those of the backbone where they are given."""
        super().__init__(config, LossNormaliser(config), backbone_weights, backbone)
        self.head = RetinaNetHead(config)
        self.register_buffer("base_anchors", base_anchors(config), persistent=False)

    def heads(self, pixels: Tensor) -> HeadOutputs:  # [N, 3, H, W] normalised
        """Run the network alone and return the logits and box deltas of each level."""
        return self.head(self.maps(pixels))

    def image_losses(
        self,
        pixels: Tensor,  # [N, 3, H, W] normalised
        ground_truth: ops.GroundTruth,  # boxes [N, M, 4] in pixels of the batch, labels [N, M], count [N]
        crowds: ops.PaddedBoxes | None = None,  # boxes [N, C, 4], count [N]
        image_sizes: Sequence[tuple[int, int]] | None = None,  # height, width of each image inside the padded batch
    ) -> ImageLosses:
        """Return the sums of the losses of each image of a padded batch; see `retinanet.model.losses.image_losses`."""
        outputs = self.heads(pixels)
        anchors = self.anchor_grid(pixels, outputs)
        return image_losses(outputs, anchors, ground_truth, self.config, crowds, self.class_weights)

    def _head_arguments(
        self,
        outputs: HeadOutputs,
        pixels: Tensor,  # [N, 3, H, W]
    ) -> tuple[list[Tensor], list[Tensor], ops.AnchorGrid]:
        return outputs.cls_logits, outputs.box_deltas, self.anchor_grid(pixels, outputs)

    def _candidate_options(self) -> dict[str, Any]:
        return super()._candidate_options() | {"min_log_ratio": self.config.compat.min_log_ratio}

    @property
    def _clip(self) -> str:
        return "after_nms" if self.config.compat.clip_after_nms else "before_nms"

    def anchor_grid(
        self,
        pixels: Tensor,  # [N, 3, H, W]
        outputs: HeadOutputs,
    ) -> ops.AnchorGrid:
        """Return the anchors that a batch's outputs belong to; see `retinanet.model.anchors`."""
        grid_sizes = tuple((level.shape[-2], level.shape[-1]) for level in outputs.cls_logits)
        return anchor_grid(self.config, self.base_anchors, (pixels.shape[-2], pixels.shape[-1]), grid_sizes)
