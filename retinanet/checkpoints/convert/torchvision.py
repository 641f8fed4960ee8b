"""torchvision's `retinanet_resnet50_fpn` and `retinanet_resnet50_fpn_v2`, and the same models on other ResNets.

The model names of this package are torchvision's. Before torchvision 0.14, `fpn.inner_blocks.0.0.weight` was called
`fpn.inner_blocks.0.weight`, and the convolutions of the heads were numbered 0, 2, 4, 6, because activations were
counted, too.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from retinanet.checkpoints.convert.rules import Conversion, Layout, Rule

#: Classes of the published weights: one for each category id from 0 to 90, of which COCO does not use 0 and ten others.
COCO_ROWS = 91


def _rules(names: Collection[str]) -> list[Rule]:
    return [
        (r"backbone\.fpn\.(inner|layer)_blocks\.(\d)\.(weight|bias)$", r"backbone.fpn.\1_blocks.\2.0.\3"),
        (
            r"head\.(classification|regression)_head\.conv\.(\d+)\.(weight|bias)$",
            lambda old: f"head.{old[1]}_head.conv.{int(old[2]) // 2}.0.{old[3]}",
        ),
        (r"(?=backbone\.(?:body|fpn)\.|head\.)", ""),
    ]


def _fields(conversion: Conversion, network: dict[str, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = {"box_loss": "giou" if network["head_norm"] == "group" else "l1"}
    if conversion.counts_batches:
        conversion.notes.append(
            "backbone_norm is set to eval: training keeps the statistics of the batch normalisation fixed"
        )
        return fields | {"backbone_norm": "eval"}
    published = conversion.num_classes == COCO_ROWS
    eps = 0.0 if published else 1e-5
    usual = (
        "of the published weights"
        if published
        else "of models trained from ImageNet weights; from COCO weights it is 0"
    )
    conversion.notes.append(f"assuming backbone_norm_eps {eps:g}, the value {usual}: the file does not state it")
    return fields | {"backbone_norm": "frozen", "compat": {"backbone_norm_eps": eps}}


LAYOUT = Layout(signature="backbone.body.conv1.weight", rules=_rules, fields=_fields)
