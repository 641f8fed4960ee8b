"""The two heads that all pyramid levels share; they return the convolutions' own tensors, one per level.

Lin et al. 2017 (arXiv:1708.02002), section 4: both heads have the same form and share no parameters.
Channel `a * K + k` of a classification map is class `k` of anchor `a` at that position, channel `a * 4 +
{0,1,2,3}` of a box map its dx, dy, dw, dh. Parameter names are torchvision's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn
from torchvision.ops.misc import Conv2dNormActivation

from retinanet.model.config import RetinaNetConfig


class HeadOutputs(NamedTuple):
    """Logits and box deltas, one tensor per level, finest first."""

    cls_logits: list[Tensor]  # L tensors [N, A*K, H, W]
    box_deltas: list[Tensor]  # L tensors [N, A*4, H, W]


class RetinaNetHead(nn.Module):
    """Classification and box regression on every level of a pyramid.

    Args:
        config: Gives channels, depth, normalisation, anchors per cell, classes and the prior probability.
    """

    def __init__(self, config: RetinaNetConfig) -> None:
        """Makes both heads."""
        super().__init__()
        self.classification_head = ClassificationHead(config)
        self.regression_head = RegressionHead(config)

    def forward(
        self,
        features: list[Tensor],  # L tensors [N, C, H, W]
    ) -> HeadOutputs:
        """Applies both heads to each level."""
        return HeadOutputs(
            [self.classification_head(level) for level in features],
            [self.regression_head(level) for level in features],
        )


class _Head(nn.Module):
    """What both have in common: the names of older files."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Accepts the names of torchvision's published file, whose layers and activations stand in one sequence."""
        for name in [name for name in state_dict if name.startswith(f"{prefix}conv.")]:
            if old := re.fullmatch(r"conv\.(\d+)\.(weight|bias)", name.removeprefix(prefix)):
                state_dict[f"{prefix}conv.{int(old[1]) // 2}.0.{old[2]}"] = state_dict.pop(name)
        super()._load_from_state_dict(state_dict, prefix, *rest)


class ClassificationHead(_Head):
    """Class logits of every anchor. The bias starts where each class has the configured prior probability."""

    def __init__(self, config: RetinaNetConfig) -> None:
        """Makes the head with its initial weights."""
        super().__init__()
        self.conv = _tower(config)
        self.cls_logits = nn.Conv2d(config.fpn_channels, config.anchors_per_cell * config.num_classes, 3, padding=1)
        _initialise(self)
        prior = config.prior_probability
        nn.init.constant_(self.cls_logits.get_parameter("bias"), -math.log((1 - prior) / prior))

    def forward(
        self,
        features: Tensor,  # [N, C, H, W]
    ) -> Tensor:  # [N, A*K, H, W]
        """Logits of one level."""
        return self.cls_logits(self.conv(features))


class RegressionHead(_Head):
    """Box deltas of every anchor."""

    def __init__(self, config: RetinaNetConfig) -> None:
        """Makes the head with its initial weights."""
        super().__init__()
        self.conv = _tower(config)
        self.bbox_reg = nn.Conv2d(config.fpn_channels, config.anchors_per_cell * 4, 3, padding=1)
        _initialise(self)

    def forward(
        self,
        features: Tensor,  # [N, C, H, W]
    ) -> Tensor:  # [N, A*4, H, W]
        """Deltas of one level."""
        return self.bbox_reg(self.conv(features))


def _tower(config: RetinaNetConfig) -> nn.Sequential:
    channels = config.fpn_channels
    norm: Callable[..., nn.Module] | None = None
    bias = None  # unless a norm follows
    if config.head_norm == "group":
        norm, bias = partial(nn.GroupNorm, config.head_norm_groups), config.head_norm_bias
    layers = [Conv2dNormActivation(channels, channels, norm_layer=norm, bias=bias) for _ in range(config.head_depth)]
    return nn.Sequential(*layers)


def _initialise(head: nn.Module) -> None:
    for module in head.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=0.01)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
