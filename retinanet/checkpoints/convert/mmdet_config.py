"""Reading of the configuration that MMDetection saves in a checkpoint as Python source.

Only literals and calls of `dict` are read. The values become fields of `RetinaNetConfig`. A value that would change
detections and has no corresponding field is an error. Keys that this module does not name have no influence on
detections.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from retinanet.checkpoints.convert.architecture import STYLES
from retinanet.checkpoints.convert.rules import are_numbers
from retinanet.common.errors import DataError

#: The only values that a converted model supports, by the path of the key.
_FIXED: dict[tuple[str, ...], tuple[Any, ...]] = {
    ("backbone", "type"): ("ResNet",),
    ("neck", "num_outs"): (5,),
    ("neck", "start_level"): (1,),
    ("neck", "add_extra_convs"): (True, "on_input"),
    ("bbox_head", "anchor_generator", "type"): ("AnchorGenerator",),
    ("bbox_head", "anchor_generator", "center_offset"): (0,),
    ("bbox_head", "anchor_generator", "base_sizes"): (None,),
    ("bbox_head", "bbox_coder", "type"): ("DeltaXYWHBBoxCoder",),
    ("bbox_head", "bbox_coder", "target_means"): ([0, 0, 0, 0],),
    ("bbox_head", "bbox_coder", "clip_border"): (True,),
    ("bbox_head", "bbox_coder", "add_ctr_clamp"): (False,),
    ("bbox_head", "loss_cls", "use_sigmoid"): (True,),
    ("test_cfg", "nms", "type"): ("nms",),
    ("test_cfg", "min_bbox_size"): (0,),
}
#: Fields of `RetinaNetConfig`, by the path of the key with the same value.
_FIELDS: dict[tuple[str, ...], str] = {
    ("neck", "relu_before_extra_convs"): "p7_relu",
    ("bbox_head", "anchor_generator", "ratios"): "aspect_ratios",
    ("train_cfg", "assigner", "pos_iou_thr"): "fg_iou_threshold",
    ("train_cfg", "assigner", "neg_iou_thr"): "bg_iou_threshold",
    ("bbox_head", "loss_cls", "gamma"): "focal_gamma",
    ("bbox_head", "loss_cls", "alpha"): "focal_alpha",
    ("test_cfg", "nms_pre"): "topk",
    ("test_cfg", "score_thr"): "score_threshold",
    ("test_cfg", "nms", "iou_threshold"): "nms_threshold",
    ("test_cfg", "max_per_img"): "max_detections",
}
_LOSSES = {
    "L1Loss": "l1",
    "SmoothL1Loss": "smooth_l1",
    "GIoULoss": "giou",
    "DIoULoss": "diou",
    "CIoULoss": "ciou",
}


def read_config(text: str) -> dict[str, Any] | None:
    """Return the values that a configuration assigns, by name, or None if it cannot be parsed or assigns no model."""
    try:
        statements = ast.parse(text).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    assigned = {}
    for statement in statements:
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            assigned[statement.targets[0].id] = _value(statement.value)
    return assigned if isinstance(assigned.get("model"), dict) else None


def _value(node: ast.expr) -> Any:
    """Return the value of literals and calls of `dict`, and an Ellipsis for any other expression."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict" and not node.args:
        return {keyword.arg: _value(keyword.value) for keyword in node.keywords}
    if isinstance(node, ast.Dict):
        keys = [_value(key) if key is not None else ... for key in node.keys]
        return {key: _value(value) for key, value in zip(keys, node.values, strict=True) if isinstance(key, str)}
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_value(element) for element in node.elts]
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):
        return ...


def style_of(path: Path, config: Mapping[str, Any]) -> str | None:
    """Return the backbone's style, or None if the configuration does not state it.

    Raises:
        DataError: The style is unknown.
    """
    keys = ("backbone", "style")
    for style in _at(config["model"], keys):
        if style not in STYLES:
            raise _error(path, keys, " or ".join(STYLES), style)
        return str(style)
    return None


def model_fields(path: Path, config: Mapping[str, Any], style: str, notes: list[str]) -> dict[str, Any]:
    """Return the fields of `RetinaNetConfig` that a configuration states.

    Args:
        path: The checkpoint, for messages.
        config: The result of `read_config`.
        style: The backbone's style, which also decides the order of the input's channels.
        notes: Receives a line for each difference that only affects training.

    Raises:
        DataError: A key has a value that this package does not support.
    """
    # Early versions of MMDetection 2 assign `train_cfg` and `test_cfg` beside the model.
    beside = {name: config[name] for name in ("train_cfg", "test_cfg") if isinstance(config.get(name), Mapping)}
    model = {**beside, **{key: value for key, value in config["model"].items() if value is not None}}
    for keys, expected in _FIXED.items():
        for value in _at(model, keys):
            if _comparable(value) not in expected:
                raise _error(path, keys, " or ".join(map(repr, expected)), value)
    fields = {name: _plain(value) for keys, name in _FIELDS.items() for value in _at(model, keys)}
    fields |= _anchors(path, model) | _losses(path, model, notes) | _input(path, config, model, style)
    for stds in _at(model, ("bbox_head", "bbox_coder", "target_stds")):
        if not are_numbers(stds, 4) or min(stds) <= 0:
            raise _error(path, ("bbox_head", "bbox_coder", "target_stds"), "4 numbers above 0", stds)
        fields["box_weights"] = tuple(1.0 / value for value in stds)
    return fields


def _anchors(path: Path, model: Mapping[str, Any]) -> dict[str, Any]:
    where = ("bbox_head", "anchor_generator")
    for generator in _dicts_at(path, model, where):
        strides, scales = generator.get("strides", [8, 16, 32, 64, 128]), generator.get("scales")
        if not are_numbers(strides, 5) or list(strides) != [8, 16, 32, 64, 128]:
            raise _error(path, (*where, "strides"), "[8, 16, 32, 64, 128]", strides)
        if scales is None:
            base, count = generator.get("octave_base_scale", 4), generator.get("scales_per_octave", 3)
            if not are_numbers([base, count], 2) or base <= 0 or not 1 <= count <= 100 or count != int(count):
                raise _error(
                    path,
                    (*where, "octave_base_scale"),
                    "a base scale above 0 and a number of scales per octave from 1 to 100",
                    [base, count],
                )
            scales = [base * 2 ** (i / count) for i in range(int(count))]
        if not are_numbers(scales):
            raise _error(path, (*where, "scales"), "numbers", scales)
        return {"anchor_sizes": tuple(tuple(stride * scale for scale in scales) for stride in strides)}
    return {}


def _losses(path: Path, model: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for loss in _dicts_at(path, model, ("bbox_head", "loss_bbox")):
        kind = loss.get("type")
        if kind not in _LOSSES:
            notes.append(
                f"box_loss is set to l1, because {kind} of the configuration in the file is not supported; it only "
                "matters for training"
            )
            return {}
        fields["box_loss"] = _LOSSES[kind]
        if kind == "SmoothL1Loss":
            fields["smooth_l1_beta"] = loss.get("beta", 1.0)
    return fields


def _input(path: Path, config: Mapping[str, Any], model: Mapping[str, Any], style: str) -> dict[str, Any]:
    """Return mean and standard deviation for RGB images in 0..1.

    The configuration states them for images in 0..255 and in the order of the network's channels.
    """
    for name, source, rgb in (("data_preprocessor", model, "bgr_to_rgb"), ("img_norm_cfg", config, "to_rgb")):
        for values in _dicts_at(path, source, (name,)):
            mean, std = values.get("mean"), values.get("std")
            if not (are_numbers(mean, 3) and are_numbers(std, 3) and min(std) > 0):
                raise _error(path, (name,), "3 numbers as mean and 3 numbers above 0 as std", [mean, std])
            if values.get(rgb, rgb == "to_rgb") is (style == "caffe"):
                raise _error(path, (name, rgb), f"{style != 'caffe'} for the {style} style", style == "caffe")
            order = -1 if style == "caffe" else 1
            # Round off the last bits of the quotient, so that the fields read as decimal numbers.
            return {
                field: tuple(round(value / 255, 15) for value in numbers[::order])
                for field, numbers in (("image_mean", mean), ("image_std", std))
            }
    return {}


def _at(config: Mapping[str, Any], keys: Sequence[str]) -> Iterator[Any]:
    """Yield the value at a path of keys, unless it is missing, None or unreadable."""
    value: Any = config
    for key in keys:
        if not isinstance(value, Mapping) or key not in value:
            return
        value = value[key]
    if value is not None and value is not ...:
        yield value


def _dicts_at(path: Path, config: Mapping[str, Any], keys: Sequence[str]) -> Iterator[Mapping[str, Any]]:
    for value in _at(config, keys):
        if not isinstance(value, Mapping):
            raise _error(path, keys, "a dict", value)
        yield value


def _comparable(value: Any) -> Any:
    return [float(v) for v in value] if are_numbers(value) else value


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _error(path: Path, keys: Sequence[str], expected: str, got: Any) -> DataError:
    return DataError(f"{path}: configuration in the file: {'.'.join(keys)}: expected {expected}, got {got!r}")
