"""The network that tensors belong to, as fields of `RetinaNetConfig`."""

from __future__ import annotations

import re
from typing import Any

from retinanet.checkpoints.convert.rules import Draft
from retinanet.common.errors import DataError
from retinanet.model.config import BOTTLENECK_RESNETS

STYLES = ("pytorch", "caffe")

_BLOCK = "backbone.body.layer1.0"
# Blocks of each stage, channels into and out of the first block's second convolution.
_RESNETS: dict[tuple[tuple[int, ...], int, int, bool], str] = {
    ((2, 2, 2, 2), 64, 64, False): "resnet18",
    ((3, 4, 6, 3), 64, 64, False): "resnet34",
    ((3, 4, 6, 3), 64, 64, True): "resnet50",
    ((3, 4, 23, 3), 64, 64, True): "resnet101",
    ((3, 8, 36, 3), 64, 64, True): "resnet152",
    ((3, 4, 6, 3), 4, 128, True): "resnext50_32x4d",
    ((3, 4, 23, 3), 8, 256, True): "resnext101_32x8d",
    ((3, 4, 23, 3), 4, 256, True): "resnext101_64x4d",
    ((3, 4, 6, 3), 128, 128, True): "wide_resnet50_2",
    ((3, 4, 23, 3), 128, 128, True): "wide_resnet101_2",
}


def network_fields(draft: Draft) -> dict[str, Any]:
    """Backbone, pyramid and heads of the tensors, as fields of `RetinaNetConfig`.

    Raises:
        DataError: The backbone is none of the ResNets that there are here, or an essential tensor is missing.
    """
    laterals = _count(draft, r"backbone\.fpn\.(?:inner|layer)_blocks\.(\d)\.")
    last = draft.kernel(f"backbone.fpn.inner_blocks.{max(laterals, 1) - 1}.0")  # [channels, C5, 1, 1]
    tops = _count(draft, r"backbone\.fpn\.extra_blocks\.p([67])\.")
    # Where C5 is as wide as the pyramid, the shape of P6 does not tell what it is made of.
    from_c5 = not tops or draft.kernel("backbone.fpn.extra_blocks.p6").shape[1] == last.shape[1]
    first, norm = "head.classification_head.conv.0.0", "head.classification_head.conv.0.1.weight" in draft.weights
    return {
        "backbone": _resnet(draft),
        "fpn_levels": tuple(range(6 - laterals, 6 + tops)),
        "fpn_channels": len(last),
        "p6_source": "c5" if from_c5 else "p5",
        "head_depth": _count(draft, r"head\.classification_head\.conv\.(\d+)\."),
        "head_norm": "group" if norm else "none",
        "head_norm_bias": norm and f"{first}.bias" in draft.weights,
    }


def _resnet(draft: Draft) -> str:
    blocks = tuple(_count(draft, rf"backbone\.body\.layer{n}\.(\d+)\.") for n in (1, 2, 3, 4))
    conv2 = draft.kernel(f"{_BLOCK}.conv2")  # [width, width / groups, 3, 3]
    name = _RESNETS.get((blocks, conv2.shape[1], conv2.shape[0], f"{_BLOCK}.conv3.weight" in draft.weights))
    if name is None:
        shape = f"{blocks} blocks, the first with a convolution {list(conv2.shape)}"
        raise DataError(f"{draft.path}: expected one of {', '.join(_RESNETS.values())}, got a network of {shape}")
    return name


def _count(draft: Draft, pattern: str) -> int:
    """How many numbers stand in the group of a pattern at the beginning of names: those with any tensor at all."""
    return len({found[1] for name in draft.weights if (found := re.match(pattern, name))})


def style_fields(draft: Draft, network: dict[str, Any], style: str) -> dict[str, Any]:
    """Where the strides are and what the input is, by the style of the weights; see `Draft`."""
    draft.style = style
    if style == "pytorch":
        return {}
    # 255 x - 255 mean, with the mean in RGB like our images.
    return {"stride_in_1x1": network["backbone"] in BOTTLENECK_RESNETS, "image_std": (1 / 255, 1 / 255, 1 / 255)}
