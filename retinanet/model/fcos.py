"""FCOS: backbone, feature pyramid and torchvision's head, and the calls of losses and post-processing."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.models.detection.fcos import FCOSHead

import retinanet_ops as ops
from retinanet.model.fcos_config import FCOSConfig
from retinanet.model.losses import ImageLosses, MatchedNormaliser, anchor_weights
from retinanet.model.pyramid import PyramidDetector
from retinanet_ops import _fcos
from retinanet_ops._fcos import Outputs, Points


class FCOS(PyramidDetector):
    """An FCOS as described by one configuration; its state-dict names are torchvision's.

    In training mode a call returns the losses `classification`, `bbox_regression` and `bbox_ctrness`. In evaluation
    mode it returns one dict per image with `boxes` `[D, 4]`, `scores` `[D]` and `labels` `[D]`, best first.

    Tian et al. 2019 (arXiv:1904.01355) with centre sampling and GIoU loss. The sums of all images are divided by the
    number of points of the batch that are assigned to objects, as torchvision does. If there are none, they are divided
    by the number of images, where torchvision divides by 1.

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
        >>> model = FCOS(FCOSConfig(class_names=("tree",), backbone="resnet18"))
        >>> images = [torch.rand(3, 300, 400), torch.rand(3, 500, 400)]
        >>> boxes = torch.tensor([[10.0, 10, 60, 80]])
        >>> targets = [{"boxes": boxes, "labels": torch.tensor([0])}] * 2
        >>> losses = model(images, targets)
        >>> detections = model.eval()(images)
    """

    loss_names = ("classification", "bbox_regression", "bbox_ctrness")

    config: FCOSConfig
    base_anchors: Tensor  # [L, 4] float32, a square with the stride as its side for each level

    def __init__(
        self,
        config: FCOSConfig,
        backbone_weights: str | os.PathLike[str] | None = None,
        *,
        backbone: nn.Module | None = None,
    ) -> None:
        """Build the network with random weights, except those of the backbone where they are given."""
        super().__init__(config, MatchedNormaliser(), backbone_weights, backbone)
        self.head = FCOSHead(config.fpn_channels, 1, config.num_classes, config.head_depth)
        prior = config.prior_probability
        nn.init.constant_(self.head.classification_head.cls_logits.bias, -math.log((1 - prior) / prior))
        half = torch.tensor([2.0 ** (level - 1) for level in config.fpn_levels])
        self.register_buffer("base_anchors", torch.stack([-half, -half, half, half], dim=1), persistent=False)

    def heads(self, pixels: Tensor) -> Outputs:  # [N, 3, H, W] normalised
        """Run the network alone and return the logits, distances and centreness of each level."""
        classification, regression = self.head.classification_head, self.head.regression_head
        outputs = Outputs([], [], [])
        for level in self.maps(pixels):
            outputs.logits.append(classification.cls_logits(classification.conv(level)))
            shared = regression.conv(level)
            outputs.distances.append(regression.bbox_reg(shared).relu())
            outputs.centreness.append(regression.bbox_ctrness(shared))
        return outputs

    def image_losses(
        self,
        pixels: Tensor,  # [N, 3, H, W] normalised
        ground_truth: ops.GroundTruth,  # boxes [N, M, 4] in pixels of the batch, labels [N, M], count [N]
        crowds: ops.PaddedBoxes | None = None,  # boxes [N, C, 4], count [N]
        image_sizes: Sequence[tuple[int, int]] | None = None,  # height, width of each image inside the padded batch
    ) -> ImageLosses:
        """Return the sums of the losses of each image of a padded batch."""
        outputs = self.heads(pixels)
        points = self.points(pixels, outputs)
        targets = _fcos.assign(points, ground_truth, self.config.center_sampling_radius, crowds)
        losses = _fcos.image_losses(
            outputs,
            points,
            ground_truth,
            targets,
            anchor_weight=anchor_weights(targets.labels, self.class_weights),
            alpha=self.config.focal_alpha,
            gamma=self.config.focal_gamma,
        )
        return ImageLosses(losses._asdict(), targets.num_positive)

    def detections(
        self,
        pixels: Tensor,  # [N, 3, H, W] normalised
        image_sizes: Tensor,  # [N, 2] (height, width) of each image inside the padded batch
    ) -> ops.Detections:  # config.max_detections slots for each image
        """Return the padded detections of a batch, in pixels of the batch; see `retinanet_ops.detect`."""
        config = self.config
        return _fcos.detections(
            self.candidates(pixels, image_sizes),
            iou_threshold=config.nms_threshold,
            max_detections=config.max_detections,
        )

    def detections_of(
        self,
        outputs: Outputs,
        pixels: Tensor,  # [N, 3, H, W], of which only the size is used
        image_sizes: Tensor,  # [N, 2] (height, width) of each image inside the padded batch
    ) -> ops.Detections:  # config.max_detections slots for each image
        """Return what `detections` returns, up to rounding, from the outputs of `heads` by one op."""
        config = self.config
        return _fcos.detect(
            outputs,
            self.anchor_grid(pixels, [level.shape[-2:] for level in outputs.logits]),
            image_sizes,
            score_threshold=config.score_threshold,
            topk_per_level=config.topk,
            iou_threshold=config.nms_threshold,
            max_detections=config.max_detections,
        )

    def candidates(
        self,
        pixels: Tensor,  # [N, 3, H, W] normalised
        image_sizes: Tensor,  # [N, 2] (height, width) of each image inside the padded batch
    ) -> ops.Candidates:
        """Return the padded candidates of a batch before NMS, clipped, in pixels of the batch."""
        outputs = self.heads(pixels)
        return _fcos.best_candidates(
            outputs,
            self.points(pixels, outputs),
            image_sizes,
            score_threshold=self.config.score_threshold,
            topk_per_level=self.config.topk,
        )

    def points(
        self,
        pixels: Tensor,  # [N, 3, H, W]
        outputs: Outputs,
    ) -> Points:
        """Return the points that a batch's outputs belong to."""
        return _fcos.points_of(self.anchor_grid(pixels, [level.shape[-2:] for level in outputs.logits]))

    def anchor_grid(
        self,
        pixels: Tensor,  # [N, 3, H, W]
        grid_sizes: Sequence[Sequence[int]],  # height, width of each level's maps
    ) -> ops.AnchorGrid:
        """Return the squares around the points of a batch; their side is the stride of the level."""
        sizes = [(height, width) for height, width in grid_sizes]
        return ops.AnchorGrid.from_base_anchors(
            self.base_anchors, sizes, image_size=(pixels.shape[-2], pixels.shape[-1])
        )
