"""The two heads that all pyramid levels share; they return the output tensors of their convolutions, one per level.

Lin et al. 2017 (arXiv:1708.02002), section 4: both heads have the same form and share no parameters. Channel
`a * K + k` of a classification map is class `k` of anchor `a` at that position. Channels `a * 4 + {0, 1, 2, 3}` of a
box map are dx, dy, dw, dh of anchor `a`. Parameter names are torchvision's.
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
        config: Channels, depth, normalisation, anchors per cell, classes and prior probability.
    """

    def __init__(self, config: RetinaNetConfig) -> None:
        """Make both heads."""
        super().__init__()
        self.classification_head = ClassificationHead(config)
        self.regression_head = RegressionHead(config)

    def forward(self, features: list[Tensor]) -> HeadOutputs:  # L tensors [N, C, H, W]
        """Apply both heads to each level."""
        return HeadOutputs(
            [self.classification_head(level) for level in features],
            [self.regression_head(level) for level in features],
        )


class _Head(nn.Module):
    """Base of both heads, which accepts the parameter names of torchvision before 0.14."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Rename layers whose numbers count activations, too, as in torchvision's published file."""
        for name in [name for name in state_dict if name.startswith(f"{prefix}conv.")]:
            if old := re.fullmatch(r"conv\.(\d+)\.(weight|bias)", name.removeprefix(prefix)):
                state_dict[f"{prefix}conv.{int(old[1]) // 2}.0.{old[2]}"] = state_dict.pop(name)
        super()._load_from_state_dict(state_dict, prefix, *rest)


class ClassificationHead(_Head):
    """Class logits of every anchor. The initial bias gives every class the configured prior probability."""

    def __init__(self, config: RetinaNetConfig) -> None:
        """Make the head with its initial weights."""
        super().__init__()
        self.conv = _tower(config)
        self.cls_logits = nn.Conv2d(config.fpn_channels, config.anchors_per_cell * config.num_classes, 3, padding=1)
        _initialise(self)
        prior = config.prior_probability
        nn.init.constant_(self.cls_logits.get_parameter("bias"), -math.log((1 - prior) / prior))

    def forward(self, features: Tensor) -> Tensor:  # [N, C, H, W] -> [N, A*K, H, W]
        """Return the logits of one level."""
        return self.cls_logits(self.conv(features))


class RegressionHead(_Head):
    """Box deltas of every anchor."""

    def __init__(self, config: RetinaNetConfig) -> None:
        """Make the head with its initial weights."""
        super().__init__()
        self.conv = _tower(config)
        self.bbox_reg = nn.Conv2d(config.fpn_channels, config.anchors_per_cell * 4, 3, padding=1)
        _initialise(self)

    def forward(self, features: Tensor) -> Tensor:  # [N, C, H, W] -> [N, A*4, H, W]
        """Return the deltas of one level."""
        return self.bbox_reg(self.conv(features))


def _tower(config: RetinaNetConfig) -> nn.Sequential:
    channels = config.fpn_channels
    norm: Callable[..., nn.Module] | None = None
    bias = None  # torchvision adds a bias unless a norm follows
    if config.head_norm == "group":
        norm, bias = partial(nn.GroupNorm, config.head_norm_groups), config.compat.head_norm_bias
    layers = [Conv2dNormActivation(channels, channels, norm_layer=norm, bias=bias) for _ in range(config.head_depth)]
    return nn.Sequential(*layers)


def _initialise(head: nn.Module) -> None:
    for module in head.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=0.01)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
