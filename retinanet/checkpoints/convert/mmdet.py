"""MMDetection's RetinaNet, version 2 or 3.

P6 is made of C5, P7 of P6 without a ReLU; log size ratios are bounded from both sides; slots are ordered as ours.
Models on Caffe's weights (`caffe` style) take BGR in 0..255 and have their strides in 1x1 convolutions.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from retinanet.checkpoints.convert.architecture import style_fields
from retinanet.checkpoints.convert.mmdet_config import model_fields, read_config, style_of
from retinanet.checkpoints.convert.rules import (
    Draft,
    Layout,
    Rule,
    resnet_rules,
    reverse_input_channels,
    top_rules,
)
from retinanet.common.errors import DataError
from retinanet.model.config import RetinaNetConfig
from retinanet_ops.constants import ANCHOR_SIZES, MAX_LOG_RATIO


def _rules(names: Collection[str]) -> list[Rule]:
    head = r"bbox_head\.{}_convs\.(\d+)\.{}\."
    return [
        *resnet_rules(r"backbone\."),
        (r"neck\.lateral_convs\.(\d)\.conv\.", r"backbone.fpn.inner_blocks.\1.0."),
        (r"neck\.fpn_convs\.([012])\.conv\.", r"backbone.fpn.layer_blocks.\1.0."),
        *top_rules(r"neck\.fpn_convs\.3\.conv", r"neck\.fpn_convs\.4\.conv"),
        *(
            (head.format(short, module), rf"head.{long}_head.conv.\1.{number}.")
            for short, long in (("cls", "classification"), ("reg", "regression"))
            for number, module in enumerate(("conv", "gn"))
        ),
        (r"bbox_head\.retina_cls\.", "head.classification_head.cls_logits."),
        (r"bbox_head\.retina_reg\.", "head.regression_head.bbox_reg."),
    ]


def _meta(draft: Draft) -> dict[str, Any]:
    meta = draft.rest.get("meta")
    return meta if isinstance(meta, dict) else {}


def _check_version(draft: Draft) -> None:
    version = _meta(draft).get("mmdet_version")
    if not isinstance(version, str):
        draft.notes.append("of mmdet 2 or 3, it is assumed: the file names no version")
    elif version.split(".")[0] in ("0", "1"):
        raise DataError(
            f"{draft.path}: meta: expected mmdet_version 2 or 3, got {version}, whose anchors and coder are others"
        )


def _fields(draft: Draft, network: dict[str, Any]) -> dict[str, Any]:
    _check_version(draft)
    text = _meta(draft).get("cfg") or _meta(draft).get("config")
    config = read_config(text) if isinstance(text, str) else None
    told = None if config is None else style_of(draft.path, config)
    style = draft.style or told or "pytorch"
    if draft.style is None and told is None:
        draft.notes.append(
            "pytorch style assumed: normalised RGB, strides in 3x3 convolutions; --style caffe for others"
        )
    elif draft.style is None:
        draft.notes.append(f"{style} style: the configuration in the file says so")
    if isinstance(text, str) and config is None:
        draft.notes.append("the configuration in the file is not understood: anchors, coder and thresholds are assumed")
    return {
        "backbone_norm": "eval" if style == "pytorch" else "frozen",
        "p6_source": "c5",
        "p7_relu": False,
        "anchor_profile": "mmdet",
        "anchor_sizes": ANCHOR_SIZES,
        "min_log_ratio": -MAX_LOG_RATIO,
        "max_log_ratio": MAX_LOG_RATIO,
        "low_quality": "mmdet",
        "loss_normaliser": "batch",
        "max_detections": 100,
        **style_fields(draft, network, style),
        **({} if config is None else model_fields(draft.path, config, style, draft.notes)),
    }


def _adapt(draft: Draft, config: RetinaNetConfig) -> None:
    if draft.style == "caffe":
        reverse_input_channels(draft)


def _class_names(draft: Draft) -> Sequence[str] | None:
    for meta in (_meta(draft).get("dataset_meta"), _meta(draft)):
        for key in ("classes", "CLASSES"):
            names = meta.get(key) if isinstance(meta, dict) else None
            names = (names,) if isinstance(names, str) else names
            if isinstance(names, (list, tuple)) and names and all(isinstance(name, str) for name in names):
                return names
    return None


LAYOUT = Layout(
    signature="bbox_head.retina_cls.weight",
    rules=_rules,
    fields=_fields,
    adapt=_adapt,
    dropped=((r"ema_", "a moving average that was kept beside the weights"),),
    class_names=_class_names,
)
