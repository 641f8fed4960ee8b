"""The networks of SSD, assembled from torchvision's modules, under torchvision's names where it has the network.

A feature extractor turns images into the maps of 6 or 7 levels. The head of each level returns class logits and box
deltas for the default boxes of that level.
"""

from __future__ import annotations

import math
import os
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torchvision.models import mobilenet_v2, mobilenet_v3_large
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.ssd import SSDFeatureExtractorVGG, SSDHead
from torchvision.models.detection.ssdlite import SSDLiteFeatureExtractorMobileNet, SSDLiteHead
from torchvision.models.vgg import cfgs, make_layers
from torchvision.ops.misc import Conv2dNormActivation

from retinanet.common.torch_files import load_weights
from retinanet.model.ssd_config import SSDConfig, SSDNetwork

_VGG_CHANNELS = (512, 1024, 512, 256, 256, 256, 256)
_LITE_CHANNELS = (512, 256, 256, 128)
_MOBILENET_V2_CHANNELS = 256
# torchvision's SSDlite normalises with this layer.
_LITE_NORM = partial(nn.BatchNorm2d, eps=0.001, momentum=0.03)


def build_network(
    config: SSDConfig, weights: str | os.PathLike[str] | None = None
) -> tuple[nn.Module, SSDHead | SSDLiteHead]:
    """Build the feature extractor and the heads of a configuration.

    Args:
        config: Network, trained stages and number of class logits.
        weights: Path to a torchvision state dict of the bare backbone (ImageNet), whose classifier is dropped. None
            keeps the random initialisation.

    Returns:
        A module from images `[N, 3, H, W]` to an ordered dict of one map per level, and the heads.

    Raises:
        DataError: The weights cannot be read or do not fit the backbone.
    """
    layout = config.layout
    per_cell = list(layout.anchors_per_cell)
    extractor: nn.Module
    if layout.backbone == "vgg16":
        extractor, channels = _vgg_extractor(config, weights), list(_VGG_CHANNELS[: len(per_cell)])
    elif layout.backbone == "mobilenet_v2":
        extractor, channels = _mobilenet_v2_extractor(config, weights)
    else:
        extractor, channels = _lite_extractor(config, weights)
    head: SSDHead | SSDLiteHead
    if config.is_lite:
        head = SSDLiteHead(channels, per_cell, config.num_scores, _LITE_NORM)
    else:
        head = SSDHead(channels, per_cell, config.num_scores)
    if config.cls_loss == "focal":
        prior = config.prior_probability
        for level in head.classification_head.module_list:
            output = output_layer(level)
            nn.init.constant_(output.get_parameter("bias"), -math.log((1 - prior) / prior))
    return extractor, head


def output_layer(level: nn.Module) -> nn.Conv2d:
    """Return the last convolution of the head of a level."""
    return cast(nn.Conv2d, level[-1] if isinstance(level, nn.Sequential) else level)


def default_boxes(layout: SSDNetwork) -> Tensor:  # [A, 4] float32
    """Return the default boxes of a network, in pixels of the resized image; they are the same for every image."""
    generator = DefaultBoxGenerator(
        [list(ratios) for ratios in layout.aspect_ratios],
        scales=list(layout.scales),
        steps=None if layout.steps is None else list(layout.steps),
    )
    # The generator reads nothing of the images and the maps but their sizes.
    images = ImageList(torch.empty(1, 3, layout.size, layout.size, device="meta"), [(layout.size, layout.size)])
    maps = [torch.empty(1, 1, side, side) for side in layout.grid_sizes]
    return cast(Tensor, generator(images, maps)[0])


def _vgg_extractor(config: SSDConfig, weights: str | os.PathLike[str] | None) -> SSDFeatureExtractorVGG:
    # torchvision's `vgg16` would also make a classifier of 120 million weights.
    blocks = make_layers(cfgs["D"], batch_norm=False)
    for module in blocks:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(module.get_parameter("bias"))
    _load(blocks, config, weights)
    _freeze(blocks, [0, *(i for i, b in enumerate(blocks) if isinstance(b, nn.MaxPool2d))][:-1], config)
    highres = config.network == "ssd512_vgg16"
    extractor = SSDFeatureExtractorVGG(blocks, highres)
    if highres:
        # torchvision's extra blocks give maps of 6, 4 and 1 cells for images of 512 pixels. Those of the paper halve
        # each map and give 4, 2 and 1.
        for block, stride in ((3, 2), (4, 2), (5, 1)):
            conv = cast(nn.Conv2d, cast(nn.Sequential, extractor.extra[block])[2])
            conv.stride, conv.padding = (stride, stride), (1, 1)
    return extractor


def _lite_extractor(
    config: SSDConfig, weights: str | os.PathLike[str] | None
) -> tuple[SSDLiteFeatureExtractorMobileNet, list[int]]:
    blocks = mobilenet_v3_large(weights=None, norm_layer=_LITE_NORM, reduced_tail=config.reduced_tail).features
    if weights is None:
        for module in blocks.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.03)
    _load(blocks, config, weights)
    starts = _mobilenet_stages(blocks)
    _freeze(blocks, starts, config)
    c4 = starts[-2]
    channels = [blocks[c4].block[0].out_channels, blocks[-1].out_channels, *_LITE_CHANNELS]
    return SSDLiteFeatureExtractorMobileNet(blocks, c4, _LITE_NORM), channels


class MobileNetV2Extractor(nn.Module):
    """The maps of a MobileNetV2 and of the extra blocks behind it.

    As in SSDlite, the maps with a higher resolution than the last one are those inside the blocks that halve the
    resolution, where these blocks have most channels.

    Args:
        features: The layers of the MobileNetV2.
        inside: Positions of the blocks whose inner map is a level, in ascending order.
        extra: Blocks that each halve the resolution once more.
    """

    def __init__(self, features: nn.Sequential, inside: Sequence[int], extra: Sequence[nn.Module]) -> None:
        """Keep the layers."""
        super().__init__()
        self.features = features
        self.extra = nn.ModuleList(extra)
        self.inside = tuple(inside)

    def forward(self, pixels: Tensor) -> OrderedDict[str, Tensor]:  # [N, 3, H, W] -> L maps [N, C_l, H_l, W_l]
        """Return the map of each level, that with the highest resolution first."""
        maps = []
        x = pixels
        for position, block in enumerate(self.features):
            if position in self.inside:
                # These blocks have a stride of 2, and therefore no connection around them.
                expand, *others = cast(nn.Sequential, block.conv)
                x = expand(x)
                maps.append(x)
                for layer in others:
                    x = layer(x)
            else:
                x = block(x)
        maps.append(x)
        for block in self.extra:
            maps.append(block(maps[-1]))
        return OrderedDict((str(level), x) for level, x in enumerate(maps))


def _mobilenet_v2_extractor(
    config: SSDConfig, weights: str | os.PathLike[str] | None
) -> tuple[MobileNetV2Extractor, list[int]]:
    features = mobilenet_v2(weights=None).features
    _load(features, config, weights)
    starts = _mobilenet_stages(features)
    _freeze(features, starts, config)
    sides = config.layout.grid_sizes
    # SSDlite begins at a stride of 16, SSD at 8.
    inside = starts[-2:-1] if config.is_lite else starts[-3:-1]
    channels = [features[block].conv[0].out_channels for block in inside] + [features[-1].out_channels]
    extra = []
    for before, side in zip(sides[len(channels) - 1 :], sides[len(channels) :], strict=False):
        extra.append(_extra_block(channels[-1], padding=int((before + 1) // 2 == side), lite=config.is_lite))
        channels.append(_MOBILENET_V2_CHANNELS)
    return MobileNetV2Extractor(features, inside, extra), channels


def _extra_block(channels: int, padding: int, lite: bool) -> nn.Sequential:
    """Return layers that halve the resolution; without padding, 3 x 3 cells become one."""
    layer = partial(Conv2dNormActivation, norm_layer=_LITE_NORM, activation_layer=nn.ReLU6)
    half = _MOBILENET_V2_CHANNELS // 2
    spatial = {"kernel_size": 3, "stride": 2, "padding": padding}
    if lite:
        layers = [layer(half, half, groups=half, **spatial), layer(half, _MOBILENET_V2_CHANNELS, kernel_size=1)]
    else:
        layers = [layer(half, _MOBILENET_V2_CHANNELS, **spatial)]
    return nn.Sequential(layer(channels, half, kernel_size=1), *layers)


def _mobilenet_stages(blocks: nn.Sequential) -> list[int]:
    """Return the first block of each stage of a MobileNet; the last stage is the last block."""
    # torchvision marks the blocks that halve the resolution.
    return [0, *(i for i, block in enumerate(blocks) if getattr(block, "_is_cn", False)), len(blocks) - 1]


def _load(blocks: nn.Sequential, config: SSDConfig, weights: str | os.PathLike[str] | None) -> None:
    if weights is not None:
        load_weights(nn.ModuleDict({"features": blocks}), Path(weights), config.backbone, ignored=("classifier.",))


def _freeze(blocks: nn.Sequential, starts: Sequence[int], config: SSDConfig) -> None:
    """Freeze all stages before the trained ones; `starts` holds the first block of each stage."""
    layers = config.trainable_backbone_layers
    if layers is not None:
        end = len(blocks) if layers == 0 else starts[len(starts) - layers]
        for block in blocks[:end]:
            block.requires_grad_(False)
