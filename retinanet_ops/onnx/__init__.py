"""Translations of the ops to ONNX, for detectors that `torch.onnx.export` exports with NMS inside.

The graphs hold operators of ONNX opset 18 only. No other operator domain is needed, so a runtime needs no extension.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch

try:
    import onnx_ir  # noqa: F401
    import onnxscript  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"retinanet_ops.onnx needs onnx and onnxscript, and there is no module {error.name!r}; "
        "run: pip install 'retinanet-ops[onnx]'",
        name=error.name,
    ) from None

from . import _boxes, _detect, _nms, _overlaps

__all__ = ["translations"]

_TRANSLATED: tuple[Callable[..., Any], ...] = (
    _boxes.clip_boxes,
    _boxes.decode_boxes,
    _boxes.encode_boxes,
    _overlaps.box_iou,
    _detect.decode_candidates,
    _detect.detect,
    _detect.gather_class_scores,
    _detect.select_candidates,
    _nms.batched_nms_padded,
    _nms.nms,
    _nms.nms_sorted,
    _nms.rank_scores,
)

_TRAINING = "it belongs to training; export the model after model.eval(), without its losses and its matching"
_SOFT_NMS = "export the boxes and scores before it, and call it on what the runtime returns; or use batched_nms_padded"

#: Ops without a translation, and what to do instead.
_REFUSED = {
    "assign_points": _TRAINING,
    "assign_targets": _TRAINING,
    "box_iou_backward": _TRAINING,
    "box_iou_loss": _TRAINING,
    "box_iou_loss_backward": _TRAINING,
    "dense_box_loss": _TRAINING,
    "dense_box_loss_backward": _TRAINING,
    "dense_focal_loss": _TRAINING,
    "dense_focal_loss_backward": _TRAINING,
    "dense_softmax_cross_entropy": _TRAINING,
    "dense_softmax_cross_entropy_backward": _TRAINING,
    "hard_negative_mask": _TRAINING,
    "sigmoid_focal_loss": _TRAINING,
    "sigmoid_focal_loss_backward": _TRAINING,
    "soft_nms": _SOFT_NMS,
    "soft_nms_scores": _SOFT_NMS,
}


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return the translation of every op to ONNX, for `torch.onnx.export(custom_translation_table=...)`.

    The export needs `dynamo=True` and `opset_version=18` or higher. `detect`, `candidates`, `nms`, `batched_nms`,
    `batched_nms_padded`, `gather_class_scores`, the coding and clipping of boxes and `box_iou` and its relatives have a
    translation. The numbers of images, candidates and cells may be dynamic; the channels of the heads are fixed.

    Returns:
        A table from operators to functions. Those of ops for training and of Soft-NMS raise `NotImplementedError`, so
        that an export that meets one of them fails with a line that names the op and the remedy.

    Indices, labels and counts equal those of the ops, ties included. Boxes and scores may differ in their last bits,
    because runtimes have their own exp and sigmoid. Boxes keep their dtype, float32 or float64, and heads may be in
    half precision. A candidate whose logit is -inf never passes, whatever the threshold is.
    """
    ops = torch.ops.retinanet_ops
    table = {getattr(ops, function.__name__).default: _plain(function) for function in _TRANSLATED}
    return table | {getattr(ops, name).default: _refusal(name, remedy) for name, remedy in _REFUSED.items()}


def _plain(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function without annotations, which the exporter would take for those of an ONNX Script function."""

    def translation(*arguments, **options):  # type: ignore[no-untyped-def]
        return function(*arguments, **options)

    return translation


def _refusal(name: str, remedy: str) -> Callable[..., NoReturn]:
    """Return a translation that raises."""

    def refuse(*arguments, **options):  # type: ignore[no-untyped-def]
        raise NotImplementedError(f"retinanet_ops::{name} has no translation to ONNX: {remedy}")

    return refuse
