"""torchvision's `retinanet_resnet50_fpn` and `retinanet_resnet50_fpn_v2`, and the same on other ResNets.

The names are ours, but for those of files from before torchvision 0.14: `fpn.inner_blocks.0.weight` was not yet
`fpn.inner_blocks.0.0.weight`, and the convolutions of the heads stood at 0, 2, 4, 6 among their activations.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from retinanet.checkpoints.convert.rules import Draft, Layout, Rule

#: Rows of the published weights: the ids of COCO's categories, of which 0 and ten others are unused.
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


def _fields(draft: Draft, network: dict[str, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = {"box_loss": "giou" if network["head_norm"] == "group" else "l1"}
    if draft.counts_batches:
        draft.notes.append("backbone_norm eval: fine-tuning leaves the statistics of the batch normalisation alone")
        return fields | {"backbone_norm": "eval"}
    published = draft.num_classes == COCO_ROWS
    eps = 0.0 if published else 1e-5
    usual = "as the published weights" if published else "as after training from ImageNet's; from COCO's it is 0"
    draft.notes.append(f"backbone_norm_eps {eps:g}, {usual}: the file does not tell")
    return fields | {"backbone_norm": "frozen", "backbone_norm_eps": eps}


LAYOUT = Layout(signature="backbone.body.conv1.weight", rules=_rules, fields=_fields)
