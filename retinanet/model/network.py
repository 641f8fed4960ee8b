"""RetinaNet: backbone, feature pyramid and heads, and the calls of losses and post-processing."""

from __future__ import annotations

import os
from typing import Any

from torch import Tensor, nn

import retinanet_ops as ops
from retinanet.model.anchors import anchor_grid, base_anchors
from retinanet.model.backbone import build_backbone
from retinanet.model.config import CUSTOM, RetinaNetConfig
from retinanet.model.detector import Detector
from retinanet.model.heads import HeadOutputs, RetinaNetHead
from retinanet.model.losses import ImageLosses, LossNormaliser, image_losses

#: Suffixes of state-dict entries that count training steps. They are reset when weights are taken from another model.
COUNTERS = ("num_batches_tracked", "normaliser.average")


class RetinaNet(Detector):
    """A RetinaNet as described by one configuration; its state-dict names are torchvision's.

    In training mode a call returns the losses `classification` and `bbox_regression`. In evaluation mode it returns one
    dict per image with `boxes` `[D, 4]`, `scores` `[D]` and `labels` `[D]`, best first.

    Args:
        config: The configuration, which is kept as `model.config`.
        backbone_weights: Path to a torchvision state dict of the backbone (ImageNet), or None.
        backbone: Module for a configuration whose backbone is `custom`. It takes images `[N, 3, H, W]` and returns one
            map `[N, out_channels, H_l, W_l]` for each of `config.fpn_levels`, as a dict or, for one level, as a
            tensor. Its attribute `out_channels` must be `config.fpn_channels`. The module itself decides which of its
            parameters are trained.

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
        super().__init__(config, LossNormaliser(config))
        _check_backbone(config, backbone)
        self.backbone: nn.Module = build_backbone(config, backbone_weights) if backbone is None else backbone
        self.head = RetinaNetHead(config)
        self.register_buffer("base_anchors", base_anchors(config), persistent=False)

    @property
    def body(self) -> nn.Module:
        """The backbone without its pyramid, which is its module `body`, or the whole backbone if there is none."""
        body = getattr(self.backbone, "body", self.backbone)
        return body if isinstance(body, nn.Module) else self.backbone

    def heads(self, pixels: Tensor) -> HeadOutputs:  # [N, 3, H, W] normalised
        """Run the network alone and return the logits and box deltas of each level.

        Raises:
            ValueError: A custom backbone does not return one map for each pyramid level.
        """
        maps = self.backbone(pixels)
        levels = [maps] if isinstance(maps, Tensor) else list(maps.values())
        if len(levels) != len(self.config.fpn_levels):
            raise ValueError(
                f"backbone: expected a map for each of the configuration's fpn_levels {self.config.fpn_levels}, "
                f"got {len(levels)}"
            )
        return self.head(levels)

    def image_losses(
        self,
        pixels: Tensor,  # [N, 3, H, W] normalised
        ground_truth: ops.GroundTruth,  # boxes [N, M, 4] in pixels of the batch, labels [N, M], count [N]
        crowds: ops.PaddedBoxes | None = None,  # boxes [N, C, 4], count [N]
    ) -> ImageLosses:
        """Return the sums of the losses of each image of a padded batch; see `retinanet.model.losses.image_losses`."""
        outputs = self.heads(pixels)
        anchors = self.anchor_grid(pixels, outputs)
        return image_losses(outputs, anchors, ground_truth, self.config, crowds, self.class_weights)

    def _head_arguments(self, pixels: Tensor) -> tuple[list[Tensor], list[Tensor], ops.AnchorGrid]:
        outputs = self.heads(pixels)
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

    def train(self, mode: bool = True) -> RetinaNet:
        """Set the mode; under `backbone_norm="eval"`, the backbone's normalisation layers stay in evaluation mode."""
        super().train(mode)
        if self.config.backbone_norm == "eval":
            for module in self.body.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self


def _check_backbone(config: RetinaNetConfig, backbone: nn.Module | None) -> None:
    if (backbone is None) == (config.backbone == CUSTOM):
        raise ValueError(
            f"backbone: expected a module if and only if the configuration's backbone is {CUSTOM!r}, "
            f"got {type(backbone).__name__} with {config.backbone!r}"
        )
    if backbone is not None and getattr(backbone, "out_channels", None) != config.fpn_channels:
        raise ValueError(
            f"backbone: expected out_channels to be the configuration's fpn_channels {config.fpn_channels}, "
            f"got {getattr(backbone, 'out_channels', 'no such attribute')}"
        )
