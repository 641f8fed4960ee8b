"""Recognition of a network's architecture from its tensors, as fields of `RetinaNetConfig`."""

from __future__ import annotations

import re
from typing import Any

from retinanet.checkpoints.convert.rules import Conversion
from retinanet.common.errors import DataError
from retinanet.model.pyramid_config import BOTTLENECK_RESNETS

STYLES = ("pytorch", "caffe")

_BLOCK = "backbone.body.layer1.0"
# Keys: blocks of each stage; input channels per group and output channels of the first block's second convolution;
# whether the block has a third convolution.
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


def network_fields(conversion: Conversion) -> dict[str, Any]:
    """Return the fields of `RetinaNetConfig` that the tensors' names and shapes determine: backbone, pyramid and heads.

    Raises:
        DataError: The backbone is not a ResNet of this package, or an essential tensor is missing.
    """
    laterals = _count(conversion, r"backbone\.fpn\.(?:inner|layer)_blocks\.(\d)\.")
    last = conversion.kernel(f"backbone.fpn.inner_blocks.{max(laterals, 1) - 1}.0")  # [channels, C5, 1, 1]
    tops = _count(conversion, r"backbone\.fpn\.extra_blocks\.p([67])\.")
    # If C5 has as many channels as the pyramid, the shape of P6 does not tell whether P6 is computed from C5 or P5.
    from_c5 = not tops or conversion.kernel("backbone.fpn.extra_blocks.p6").shape[1] == last.shape[1]
    first, norm = "head.classification_head.conv.0.0", "head.classification_head.conv.0.1.weight" in conversion.weights
    return {
        "backbone": _resnet(conversion),
        "fpn_levels": tuple(range(6 - laterals, 6 + tops)),
        "fpn_channels": len(last),
        "p6_source": "c5" if from_c5 else "p5",
        "head_depth": _count(conversion, r"head\.classification_head\.conv\.(\d+)\."),
        "head_norm": "group" if norm else "none",
        "compat": {"head_norm_bias": norm and f"{first}.bias" in conversion.weights},
    }


def _resnet(conversion: Conversion) -> str:
    blocks = tuple(_count(conversion, rf"backbone\.body\.layer{n}\.(\d+)\.") for n in (1, 2, 3, 4))
    conv2 = conversion.kernel(f"{_BLOCK}.conv2")  # [width, width / groups, 3, 3]
    name = _RESNETS.get((blocks, conv2.shape[1], conv2.shape[0], f"{_BLOCK}.conv3.weight" in conversion.weights))
    if name is None:
        shape = f"{blocks} blocks, the first with a convolution of shape {list(conv2.shape)}"
        known = ", ".join(_RESNETS.values())
        raise DataError(f"{conversion.path}: backbone: expected one of {known}, got a network of {shape}")
    return name


def _count(conversion: Conversion, pattern: str) -> int:
    """Count the distinct values of the pattern's group among the tensor names, e.g. the blocks of a stage."""
    return len({match[1] for name in conversion.weights if (match := re.match(pattern, name))})


def style_fields(conversion: Conversion, network: dict[str, Any], style: str) -> dict[str, Any]:
    """Set the style of a conversion, and return the fields for the position of strides and the scale of images."""
    conversion.style = style
    if style == "pytorch":
        return {}
    # For an RGB image x in 0..1, the network takes 255 * (x - mean) with the RGB mean, so the standard deviation is
    # 1 / 255.
    strides = {"stride_in_1x1": network["backbone"] in BOTTLENECK_RESNETS}
    return {"image_std": (1 / 255, 1 / 255, 1 / 255), "compat": strides}
