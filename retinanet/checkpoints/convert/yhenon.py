"""State dicts of yhenon's pytorch-retinanet.

The project's training script saves whole modules, which only the project's own code can read. The project's box coder
multiplies dx, dy, dw, dh by 0.1, 0.1, 0.2, 0.2; the converted output layer includes these factors.
Anchors are centred on the middle of their cell. P6 is computed from C5. Log size ratios are unbounded, and the numbers
of candidates and detections are unlimited.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from retinanet.checkpoints.convert.rules import (
    UNBOUNDED_LOG_RATIO,
    Conversion,
    Layout,
    Rule,
    resnet_rules,
    scale_deltas,
    top_rules,
)
from retinanet.model.config import RetinaNetConfig
from retinanet_ops.constants import ANCHOR_SIZES

_DELTA_SCALES = (0.1, 0.1, 0.2, 0.2)
#: Limit of candidates per level and of detections, which hardly any image reaches. Without a limit, memory would be
#: needed for every pair of anchor and class.
_MANY = 10_000


def _rules(names: Collection[str]) -> list[Rule]:
    return [
        *resnet_rules(""),
        (r"fpn\.P([345])_1\.", lambda match: f"backbone.fpn.inner_blocks.{int(match[1]) - 3}.0."),
        (r"fpn\.P([345])_2\.", lambda match: f"backbone.fpn.layer_blocks.{int(match[1]) - 3}.0."),
        *top_rules(r"fpn\.P6", r"fpn\.P7_2"),
        (
            r"(classification|regression)Model\.conv(\d)\.",
            lambda match: f"head.{match[1]}_head.conv.{int(match[2]) - 1}.0.",
        ),
        (r"classificationModel\.output\.", "head.classification_head.cls_logits."),
        (r"regressionModel\.output\.", "head.regression_head.bbox_reg."),
    ]


def _fields(conversion: Conversion, network: dict[str, Any]) -> dict[str, Any]:
    conversion.notes.append(
        f"at most {_MANY} candidates per level and {_MANY} detections, whereas the original has no limit"
    )
    return {
        "backbone_norm": "eval",
        "trainable_backbone_layers": None,
        "p6_source": "c5",
        "compat": {"anchor_profile": "yhenon"},
        "anchor_sizes": ANCHOR_SIZES,
        "max_log_ratio": UNBOUNDED_LOG_RATIO,
        "low_quality": "off",
        "box_loss": "smooth_l1",
        "topk": _MANY,
        "max_detections": _MANY,
        "min_size": (608,),
        "max_size": 1024,
    }


def _adapt(conversion: Conversion, config: RetinaNetConfig) -> None:
    scale_deltas(conversion, _DELTA_SCALES)


LAYOUT = Layout(
    signature="classificationModel.output.weight",
    rules=_rules,
    fields=_fields,
    adapt=_adapt,
    dropped=((r"fc\.", "the classifier of the backbone, which a detector does not use"),),
)
