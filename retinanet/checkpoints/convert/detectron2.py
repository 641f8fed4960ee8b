"""detectron2's RetinaNet: a `*.pkl` of arrays from its zoo, or a `*.pth` of its trainer.

Strides are in 1x1 convolutions and images are BGR in 0..255, unless the backbone came from torchvision (`pytorch`
style). Slot `a` of a position is `size * ratios + ratio`. P6 is computed from C5. Boxes are clipped after NMS.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import Tensor

from retinanet.checkpoints.convert.architecture import style_fields
from retinanet.checkpoints.convert.rules import (
    Conversion,
    Layout,
    Rule,
    by_size,
    rearrange_slots,
    reverse_input_channels,
    top_rules,
)
from retinanet.model.compat import merge_fields
from retinanet.model.config import RetinaNetConfig
from retinanet_ops.constants import ANCHOR_SIZES


def _rules(names: Collection[str]) -> list[Rule]:
    # The modules of a head are convolutions, each followed by an optional normalisation and by an activation.
    step = 3 if "head.cls_subnet.1.weight" in names else 2
    heads = {"cls": "classification", "bbox": "regression"}
    bottom_up = r"backbone\.bottom_up\."
    return [
        (rf"{bottom_up}stem\.conv1\.norm\.", "backbone.body.bn1."),
        (rf"{bottom_up}stem\.conv1\.", "backbone.body.conv1."),
        *(_stage_rule(bottom_up, n, *module) for n in range(2, 6) for module in _BLOCK_MODULES),
        (r"backbone\.fpn_lateral([345])\.", lambda match: f"backbone.fpn.inner_blocks.{int(match[1]) - 3}.0."),
        (r"backbone\.fpn_output([345])\.", lambda match: f"backbone.fpn.layer_blocks.{int(match[1]) - 3}.0."),
        *top_rules(r"backbone\.top_block\.p6", r"backbone\.top_block\.p7"),
        (
            r"head\.(cls|bbox)_subnet\.(\d+)\.",
            lambda match: f"head.{heads[match[1]]}_head.conv.{int(match[2]) // step}.{int(match[2]) % step}.",
        ),
        (r"head\.cls_score\.", "head.classification_head.cls_logits."),
        (r"head\.bbox_pred\.", "head.regression_head.bbox_reg."),
    ]


_BLOCK_MODULES = (
    (r"conv(\d)\.norm", r"bn\2"),
    (r"conv(\d)", r"conv\2"),
    (r"shortcut\.norm", "downsample.1"),
    (r"shortcut", "downsample.0"),
)


def _stage_rule(prefix: str, stage: int, module: str, new: str) -> Rule:
    return (rf"{prefix}res{stage}\.(\d+)\.{module}\.", rf"backbone.body.layer{stage - 1}.\1.{new}.")


def _fields(conversion: Conversion, network: dict[str, Any]) -> dict[str, Any]:
    if conversion.style is None:
        conversion.notes.append(
            "assuming caffe style (BGR images, strides in 1x1 convolutions): the file does not state a style; for a "
            "backbone from torchvision use --style pytorch"
        )
    fields = {
        "backbone_norm": "frozen",
        "anchor_sizes": ANCHOR_SIZES,
        "loss_normaliser": "ema",
        "max_detections": 100,
        "compat": {"anchor_profile": "detectron2", "clip_after_nms": True},
    }
    fields = merge_fields(fields, style_fields(conversion, network, conversion.style or "caffe"))
    for name, field in (("pixel_mean", "image_mean"), ("pixel_std", "image_std")):
        if name in conversion.dropped:
            fields[field] = _rgb(conversion, conversion.dropped[name][0])
    return fields


def _rgb(conversion: Conversion, channels: Tensor) -> tuple[float, ...]:
    """Return one constant for each channel, converted from images in 0..255 to RGB images in 0..1."""
    values = tuple((channels.flatten().double() / 255).tolist())
    return values[::-1] if conversion.style == "caffe" else values


def _adapt(conversion: Conversion, config: RetinaNetConfig) -> None:
    rearrange_slots(conversion, by_size(len(config.anchor_sizes[0]), range(len(config.aspect_ratios))))
    if conversion.style == "caffe":
        reverse_input_channels(conversion)


LAYOUT = Layout(
    signature="backbone.bottom_up.stem.conv1.weight",
    rules=_rules,
    fields=_fields,
    adapt=_adapt,
    dropped=(
        (r"pixel_(mean|std)$", "a constant, which the configuration holds"),
        (r"anchor_generator\.cell_anchors\.", "anchors, which are computed from the configuration"),
    ),
)
