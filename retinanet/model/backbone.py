"""Backbones with a feature pyramid, assembled from torchvision's modules under torchvision's names.

A backbone turns images into the maps C2..C5 (strides 4, 8, 16, 32). The feature pyramid network (Lin et al. 2017,
arXiv:1612.03144) turns some of these maps into P-levels with equally many channels and appends P6 and P7 (strides
64, 128). Parameter names are those of torchvision's detection models: `body.*`, `fpn.inner_blocks.*`,
`fpn.layer_blocks.*`, `fpn.extra_blocks.p6` and `.p7`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import models
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock

from retinanet.common.torch_files import load_weights
from retinanet.model.pyramid_config import MOBILENETS, PyramidFields


class TopLevels(ExtraFPNBlock):
    """The levels P6 and P7, for pyramids that have them: P6 = conv(P5 or C5), P7 = conv(relu(P6)), both with stride 2.

    Faster R-CNN has no P7 and takes every second cell of P5 as P6.

    Args:
        c5_channels: Channels of C5, the last map of the backbone.
        channels: Channels of the pyramid.
        top_level: Last level of the pyramid. Below 6, the module adds nothing.
        source: Map from which P6 is computed by a convolution, `p5` or `c5`; or `pool` for every second cell of P5 and
            no P7.
        relu: Whether P7 is computed from relu(P6) instead of P6 itself.
    """

    def __init__(self, c5_channels: int, channels: int, top_level: int, source: str, relu: bool = True) -> None:
        """Make the convolutions of the levels that the pyramid has."""
        super().__init__()
        self.source = source
        self.relu = relu
        self.pools = source == "pool" and top_level >= 6
        convolves = top_level >= 6 and not self.pools
        self.p6 = nn.Conv2d(channels if source == "p5" else c5_channels, channels, 3, 2, 1) if convolves else None
        self.p7 = nn.Conv2d(channels, channels, 3, 2, 1) if top_level >= 7 else None
        for conv in (self.p6, self.p7):
            if conv is not None:
                nn.init.kaiming_uniform_(conv.weight, a=1)
                nn.init.constant_(conv.get_parameter("bias"), 0)

    def forward(
        self,
        results: list[Tensor],  # pyramid levels [N, channels, H, W], finest first
        x: list[Tensor],  # backbone maps, finest first
        names: list[str],
    ) -> tuple[list[Tensor], list[str]]:
        """Append the top levels and their names."""
        if self.pools:
            results.append(F.max_pool2d(results[-1], 1, 2))
            names.append("pool")
        if self.p6 is not None:
            results.append(self.p6(results[-1] if self.source == "p5" else x[-1]))
            names.append("p6")
        if self.p7 is not None:
            results.append(self.p7(F.relu(results[-1]) if self.relu else results[-1]))
            names.append("p7")
        return results, names


def build_backbone(
    config: PyramidFields,
    weights: str | os.PathLike[str] | None = None,
) -> BackboneWithFPN:
    """Build the backbone and feature pyramid of a configuration.

    Args:
        config: Backbone, normalisation, trained stages and pyramid.
        weights: Path to a torchvision state dict of the bare backbone (ImageNet), whose classifier is dropped. None
            keeps the random initialisation.

    Returns:
        A module from images `[N, 3, H, W]` to an ordered dict of one map `[N, fpn_channels, H_l, W_l]` per level.

    Raises:
        DataError: The weights cannot be read or do not fit the backbone.
    """
    network = getattr(models, config.backbone)(weights=None, norm_layer=_norm_layer(config))
    if weights is not None:
        load_weights(network, Path(weights), config.backbone, ignored=("fc.", "classifier."))
    if config.conventions.stride_in_1x1:
        for stage in (network.layer2, network.layer3, network.layer4):
            stage[0].conv1.stride, stage[0].conv2.stride = stage[0].conv2.stride, stage[0].conv1.stride
    stages = _mobilenet_stages(network) if config.backbone in MOBILENETS else _resnet_stages(network)
    if config.trainable_backbone_layers is not None:
        for stage in stages.modules[: len(stages.modules) - config.trainable_backbone_layers]:
            for name in stage:
                stages.body.get_submodule(name).requires_grad_(False)
    maps = [level for level in config.fpn_levels if level <= 5]
    return BackboneWithFPN(
        stages.body,
        return_layers={stages.maps[level - 2]: str(i) for i, level in enumerate(maps)},
        in_channels_list=[stages.channels[level - 2] for level in maps],
        out_channels=config.fpn_channels,
        extra_blocks=TopLevels(
            stages.channels[-1],
            config.fpn_channels,
            config.fpn_levels[-1],
            config.p6_source,
            config.conventions.p7_relu,
        ),
    )


def _norm_layer(config: PyramidFields) -> Callable[..., nn.Module]:
    norms = {"frozen": FrozenBatchNorm2d, "sync": nn.SyncBatchNorm}
    eps = config.conventions.backbone_norm_eps
    if eps is None:
        eps = 1e-3 if config.backbone.startswith("mobilenet_v3") else 1e-5
    return partial(norms.get(config.backbone_norm, nn.BatchNorm2d), eps=eps)


class _Stages(NamedTuple):
    """The modules of a network before its classifier, in groups that are frozen or trained together."""

    body: nn.Module
    modules: list[tuple[str, ...]]  # the groups, first stage first
    maps: list[str]  # modules that produce C2..C5
    channels: list[int]  # of C2..C5


def _resnet_stages(network: models.ResNet) -> _Stages:
    layers = ["layer1", "layer2", "layer3", "layer4"]
    # Channels double from stage to stage. Those of the last stage are `inplanes`.
    channels = [network.inplanes // 2**k for k in (3, 2, 1, 0)]
    return _Stages(network, [("conv1", "bn1"), *((layer,) for layer in layers)], layers, channels)


def _mobilenet_stages(network: models.MobileNetV2 | models.MobileNetV3) -> _Stages:
    body = network.features
    last = len(body) - 1
    # torchvision marks the blocks that halve the resolution, but not the first convolution, which halves it, too.
    halving = [i for i, block in enumerate(body) if getattr(block, "_is_cn", False)]
    ends = [*(i - 1 for i in halving[1:]), last]
    starts = [0, *halving, last]
    modules = [tuple(map(str, range(a, b))) for a, b in zip(starts, [*starts[1:], last + 1], strict=True)]
    return _Stages(body, modules, [str(i) for i in ends], [body[i].out_channels for i in ends])
