"""The model and the anchors that a configuration describes, whatever its architecture."""

from __future__ import annotations

import os

from torch import Tensor, nn

import retinanet_ops as ops
from retinanet.model.anchors import anchor_grid, base_anchors
from retinanet.model.config import RetinaNetConfig
from retinanet.model.detector import Detector
from retinanet.model.detector_config import AnchorConfig, DetectorConfig
from retinanet.model.faster_rcnn import FasterRCNN
from retinanet.model.fcos import FCOS
from retinanet.model.fcos_config import FCOSConfig
from retinanet.model.network import RetinaNet
from retinanet.model.ssd import SSD
from retinanet.model.ssd_config import SSDConfig
from retinanet.model.ssd_network import default_boxes


def build_model(
    config: DetectorConfig,
    backbone_weights: str | os.PathLike[str] | None = None,
    *,
    backbone: nn.Module | None = None,
) -> Detector:
    """Build the model of a configuration, with random weights unless those of the backbone are given.

    Args:
        config: The configuration.
        backbone_weights: Path to a torchvision state dict of the backbone (ImageNet), or None.
        backbone: Module for a configuration whose backbone is `custom`.

    Raises:
        DataError: The weights of the backbone cannot be read or do not fit.
        ValueError: `backbone` is missing, or is given for another configuration.
    """
    if isinstance(config, SSDConfig):
        if backbone is not None:
            raise ValueError(f"backbone: expected none for the network {config.network}, got {type(backbone).__name__}")
        return SSD(config, backbone_weights)
    if isinstance(config, RetinaNetConfig):
        return RetinaNet(config, backbone_weights, backbone=backbone)
    if isinstance(config, FCOSConfig):
        return FCOS(config, backbone_weights, backbone=backbone)
    return FasterRCNN(config, backbone_weights, backbone=backbone)


def anchor_shapes(config: AnchorConfig) -> Tensor:  # [B, 2] float32
    """Return width and height of anchors, among which is every shape that the model has."""
    boxes = default_boxes(config.layout) if isinstance(config, SSDConfig) else base_anchors(config)
    return boxes[:, 2:] - boxes[:, :2]


def batch_anchors(config: AnchorConfig, height: int, width: int) -> Tensor | ops.AnchorGrid:
    """Return the anchors of a batch whose images have been resized to at most this size."""
    if isinstance(config, SSDConfig):
        return default_boxes(config.layout)
    cell = config.size_divisible
    padded = (-(-height // cell) * cell, -(-width // cell) * cell)
    grids = tuple((-(-padded[0] // 2**level), -(-padded[1] // 2**level)) for level in config.fpn_levels)
    return anchor_grid(config, base_anchors(config), padded, grids)
