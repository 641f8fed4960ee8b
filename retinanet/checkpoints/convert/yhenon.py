"""yhenon's pytorch-retinanet: a state dict; its own training saves modules, which only its own code can read.

Its coder multiplies dx, dy, dw, dh by 0.1, 0.1, 0.2, 0.2: the output layer does it here. Anchors are centred on the
middle of their cell; P6 is made of C5; no bound on log size ratios, no limit of candidates or detections.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from retinanet.checkpoints.convert.rules import (
    UNBOUNDED_LOG_RATIO,
    Draft,
    Layout,
    Rule,
    resnet_rules,
    scale_deltas,
    top_rules,
)
from retinanet.model.config import RetinaNetConfig
from retinanet_ops.constants import ANCHOR_SIZES

_DELTA_SCALES = (0.1, 0.1, 0.2, 0.2)
#: Candidates of a level, and detections, that hardly any image exceeds: without a limit, memory would be for all rows.
_MANY = 10_000


def _rules(names: Collection[str]) -> list[Rule]:
    return [
        *resnet_rules(""),
        (r"fpn\.P([345])_1\.", lambda found: f"backbone.fpn.inner_blocks.{int(found[1]) - 3}.0."),
        (r"fpn\.P([345])_2\.", lambda found: f"backbone.fpn.layer_blocks.{int(found[1]) - 3}.0."),
        *top_rules(r"fpn\.P6", r"fpn\.P7_2"),
        (
            r"(classification|regression)Model\.conv(\d)\.",
            lambda found: f"head.{found[1]}_head.conv.{int(found[2]) - 1}.0.",
        ),
        (r"classificationModel\.output\.", "head.classification_head.cls_logits."),
        (r"regressionModel\.output\.", "head.regression_head.bbox_reg."),
    ]


def _fields(draft: Draft, network: dict[str, Any]) -> dict[str, Any]:
    draft.notes.append(f"at most {_MANY} candidates of a level and detections, where the original has no limit")
    return {
        "backbone_norm": "eval",
        "trainable_backbone_layers": None,
        "p6_source": "c5",
        "anchor_profile": "yhenon",
        "anchor_sizes": ANCHOR_SIZES,
        "max_log_ratio": UNBOUNDED_LOG_RATIO,
        "low_quality": "off",
        "box_loss": "smooth_l1",
        "topk": _MANY,
        "max_detections": _MANY,
        "min_size": (608,),
        "max_size": 1024,
    }


def _adapt(draft: Draft, config: RetinaNetConfig) -> None:
    scale_deltas(draft, _DELTA_SCALES)


LAYOUT = Layout(
    signature="classificationModel.output.weight",
    rules=_rules,
    fields=_fields,
    adapt=_adapt,
    dropped=((r"fc\.", "the classifier of the backbone, unused"),),
)
