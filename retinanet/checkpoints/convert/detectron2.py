"""detectron2's RetinaNet: a `*.pkl` of arrays from its zoo, or a `*.pth` of its trainer.

Strides lie in 1x1 convolutions and images are BGR in 0..255, unless the backbone came from torchvision (`pytorch`
style). Slot `a` of a position is `size * ratios + ratio`; P6 is made of C5; boxes are clipped after NMS.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import Tensor

from retinanet.checkpoints.convert.architecture import style_fields
from retinanet.checkpoints.convert.rules import (
    Draft,
    Layout,
    Rule,
    by_size,
    rearrange_slots,
    reverse_input_channels,
    top_rules,
)
from retinanet.model.config import RetinaNetConfig
from retinanet_ops.constants import ANCHOR_SIZES


def _rules(names: Collection[str]) -> list[Rule]:
    # A module of a head is a convolution, perhaps its normalisation, and an activation.
    step = 3 if "head.cls_subnet.1.weight" in names else 2
    heads = {"cls": "classification", "bbox": "regression"}
    bottom_up = r"backbone\.bottom_up\."
    return [
        (rf"{bottom_up}stem\.conv1\.norm\.", "backbone.body.bn1."),
        (rf"{bottom_up}stem\.conv1\.", "backbone.body.conv1."),
        *(_stage_rule(bottom_up, n, *module) for n in range(2, 6) for module in _BLOCK_MODULES),
        (r"backbone\.fpn_lateral([345])\.", lambda found: f"backbone.fpn.inner_blocks.{int(found[1]) - 3}.0."),
        (r"backbone\.fpn_output([345])\.", lambda found: f"backbone.fpn.layer_blocks.{int(found[1]) - 3}.0."),
        *top_rules(r"backbone\.top_block\.p6", r"backbone\.top_block\.p7"),
        (
            r"head\.(cls|bbox)_subnet\.(\d+)\.",
            lambda found: f"head.{heads[found[1]]}_head.conv.{int(found[2]) // step}.{int(found[2]) % step}.",
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


def _stage_rule(prefix: str, stage: int, module: str, ours: str) -> Rule:
    return (rf"{prefix}res{stage}\.(\d+)\.{module}\.", rf"backbone.body.layer{stage - 1}.\1.{ours}.")


def _fields(draft: Draft, network: dict[str, Any]) -> dict[str, Any]:
    if draft.style is None:
        draft.notes.append("caffe style assumed: BGR images, strides in 1x1 convolutions; --style pytorch for others")
    fields = {
        "backbone_norm": "frozen",
        "anchor_profile": "detectron2",
        "anchor_sizes": ANCHOR_SIZES,
        "loss_normaliser": "ema",
        "max_detections": 100,
        "clip_after_nms": True,
        **style_fields(draft, network, draft.style or "caffe"),
    }
    for name, field in (("pixel_mean", "image_mean"), ("pixel_std", "image_std")):
        if name in draft.dropped:
            fields[field] = _rgb(draft, draft.dropped[name][0])
    return fields


def _rgb(draft: Draft, channels: Tensor) -> tuple[float, ...]:
    """A constant of each channel of images in 0..255, for those in 0..1."""
    values = tuple((channels.flatten().double() / 255).tolist())
    return values[::-1] if draft.style == "caffe" else values


def _adapt(draft: Draft, config: RetinaNetConfig) -> None:
    rearrange_slots(draft, by_size(len(config.anchor_sizes[0]), range(len(config.aspect_ratios))))
    if draft.style == "caffe":
        reverse_input_channels(draft)


LAYOUT = Layout(
    signature="backbone.bottom_up.stem.conv1.weight",
    rules=_rules,
    fields=_fields,
    adapt=_adapt,
    dropped=(
        (r"pixel_(mean|std)$", "a constant, kept in the configuration"),
        (r"anchor_generator\.cell_anchors\.", "anchors, made anew from the configuration"),
    ),
)
