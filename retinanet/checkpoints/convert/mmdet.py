"""RetinaNet checkpoints of MMDetection 2 and 3.

P6 is computed from C5, and P7 from P6 without a ReLU. Log size ratios are bounded on both sides. The anchors of a cell
are in the order of this package. Models with Caffe-style backbones (`caffe` style) take BGR images in 0..255 and have
their strides in 1x1 convolutions.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from retinanet.checkpoints.convert.architecture import style_fields
from retinanet.checkpoints.convert.mmdet_config import model_fields, read_config, style_of
from retinanet.checkpoints.convert.rules import (
    Conversion,
    Layout,
    Rule,
    resnet_rules,
    reverse_input_channels,
    top_rules,
)
from retinanet.common.errors import DataError
from retinanet.model.compat import merge_fields
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


def _meta(conversion: Conversion) -> dict[str, Any]:
    meta = conversion.extras.get("meta")
    return meta if isinstance(meta, dict) else {}


def _check_version(conversion: Conversion) -> None:
    version = _meta(conversion).get("mmdet_version")
    if not isinstance(version, str):
        conversion.notes.append("assuming mmdet 2 or 3: the file does not state a version")
    elif version.split(".")[0] in ("0", "1"):
        raise DataError(
            f"{conversion.path}: meta: expected mmdet_version 2 or 3, got {version}, whose anchors and box coder differ"
        )


def _fields(conversion: Conversion, network: dict[str, Any]) -> dict[str, Any]:
    _check_version(conversion)
    text = _meta(conversion).get("cfg") or _meta(conversion).get("config")
    config = read_config(text) if isinstance(text, str) else None
    stated = None if config is None else style_of(conversion.path, config)
    style = conversion.style or stated or "pytorch"
    if conversion.style is None and stated is None:
        conversion.notes.append(
            "assuming pytorch style (normalised RGB images, strides in 3x3 convolutions): the file does not state a "
            "style; if the backbone is Caffe-style, use --style caffe"
        )
    elif conversion.style is None:
        conversion.notes.append(f"{style} style, as the configuration in the file states")
    if isinstance(text, str) and config is None:
        conversion.notes.append(
            "assuming mmdet's default anchors, box coder and thresholds: the configuration in the file cannot be read"
        )
    usual = {
        "backbone_norm": "eval" if style == "pytorch" else "frozen",
        "p6_source": "c5",
        "anchor_sizes": ANCHOR_SIZES,
        "max_log_ratio": MAX_LOG_RATIO,
        "low_quality": "mmdet",
        "loss_normaliser": "batch",
        "max_detections": 100,
        "compat": {"p7_relu": False, "anchor_profile": "mmdet", "min_log_ratio": -MAX_LOG_RATIO},
    }
    from_file = {} if config is None else model_fields(conversion.path, config, style, conversion.notes)
    return merge_fields(usual, style_fields(conversion, network, style), from_file)


def _adapt(conversion: Conversion, config: RetinaNetConfig) -> None:
    # `style_fields` has set the style.
    if conversion.style == "caffe":
        reverse_input_channels(conversion)


def _class_names(conversion: Conversion) -> Sequence[str] | None:
    for meta in (_meta(conversion).get("dataset_meta"), _meta(conversion)):
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
    dropped=((r"ema_", "a moving average of the weights, which the model does not use"),),
    class_names=_class_names,
)
