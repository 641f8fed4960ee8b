"""NVIDIA's Object Detection Toolkit (retinanet-examples).

The toolkit's coder, matching and NMS take `x2 - x1 + 1` as the width of a box. In a converted model, such a box ends at
`x2 + 1`. Anchors are centred on the middle of their cell. Slot `a` of a position is `size * ratios + ratio`, with the
ratios in the order of the file. P6 is computed from C5. Batches are padded to multiples of 128.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from retinanet.checkpoints.convert.rules import (
    UNBOUNDED_LOG_RATIO,
    Conversion,
    Layout,
    Rule,
    are_numbers,
    by_size,
    rearrange_slots,
    resnet_rules,
    top_rules,
)
from retinanet.common.errors import DataError
from retinanet.model.config import RetinaNetConfig
from retinanet_ops.constants import ANCHOR_SIZES

_RATIOS = (1.0, 2.0, 0.5)
_DEPTH = 4


def _rules(names: Collection[str]) -> list[Rule]:
    backbone = next(
        (re.escape(name) for key in sorted(names) if (name := key.partition(".features.")[0]) != key), "backbones"
    )
    heads = {"cls": "classification", "box": "regression"}
    return [
        *resnet_rules(rf"{backbone}\.features\."),
        (rf"{backbone}\.lateral([345])\.", lambda match: f"backbone.fpn.inner_blocks.{int(match[1]) - 3}.0."),
        (rf"{backbone}\.smooth([345])\.", lambda match: f"backbone.fpn.layer_blocks.{int(match[1]) - 3}.0."),
        *top_rules(rf"{backbone}\.pyramid6", rf"{backbone}\.pyramid7"),
        (rf"cls_head\.{2 * _DEPTH}\.", "head.classification_head.cls_logits."),
        (rf"box_head\.{2 * _DEPTH}\.", "head.regression_head.bbox_reg."),
        (
            r"(cls|box)_head\.([0246])\.",
            lambda match: f"head.{heads[match[1]]}_head.conv.{int(match[2]) // 2}.0.",
        ),
    ]


def _numbers(conversion: Conversion, key: str, default: tuple[float, ...]) -> tuple[float, ...]:
    values = conversion.extras.get(key, default)
    numbers = list(values) if isinstance(values, tuple) else values
    if not are_numbers(numbers) or min(numbers) <= 0:
        raise DataError(f"{conversion.path}: {key}: expected numbers above 0, got {values!r}")
    return tuple(float(v) for v in numbers)


def _fields(conversion: Conversion, network: dict[str, Any]) -> dict[str, Any]:
    if "angles" in conversion.extras:
        raise DataError(f"{conversion.path}: angles: expected a model of axis-aligned boxes, got one of rotated boxes")
    if "scales" in conversion.extras:
        scales = _numbers(conversion, "scales", ())
        sizes = tuple(tuple(scale * 2**level for scale in scales) for level in range(3, 8))
    else:
        sizes = ANCHOR_SIZES
    conversion.notes.append("a score equal to the threshold gives no detection, whereas the original keeps it")
    return {
        "backbone_norm": "frozen",
        "trainable_backbone_layers": None,
        "p6_source": "c5",
        "anchor_sizes": sizes,
        "aspect_ratios": tuple(sorted(_numbers(conversion, "ratios", _RATIOS))),
        "max_log_ratio": UNBOUNDED_LOG_RATIO,
        "low_quality": "off",
        "box_loss": "smooth_l1",
        "smooth_l1_beta": 0.11,
        "loss_normaliser": "batch",
        "max_detections": 100,
        "size_divisible": 128,
        "compat": {"anchor_profile": "odtk", "box_offset": 1.0},
    }


def _adapt(conversion: Conversion, config: RetinaNetConfig) -> None:
    ratios = _numbers(conversion, "ratios", _RATIOS)
    if sorted(config.aspect_ratios) != sorted(ratios):
        raise DataError(
            f"{conversion.path}: aspect_ratios: expected those of the file, {ratios}, got {config.aspect_ratios}"
        )
    rearrange_slots(conversion, by_size(len(config.anchor_sizes[0]), [ratios.index(r) for r in config.aspect_ratios]))


LAYOUT = Layout(
    signature="cls_head.8.weight",
    rules=_rules,
    fields=_fields,
    adapt=_adapt,
    dropped=((r"backbones\.\w+\.features\.fc\.", "the classifier of the backbone, which a detector does not use"),),
)
