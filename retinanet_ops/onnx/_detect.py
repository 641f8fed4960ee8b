"""Translations of the ops that read the outputs of the heads."""

from __future__ import annotations

import math
from collections.abc import Sequence

import onnx_ir as ir

from ._boxes import anchor_boxes, clipped, decoded
from ._nms import best_first, kept_boxes
from ._values import (
    FLOAT,
    INT64,
    Size,
    Value,
    cast,
    channels_of,
    compute_dtype,
    constant,
    count_to,
    dtype_of,
    number_of,
    op,
    rank_of,
    rows_at,
    size_of,
    vector,
)

#: Name under which the value that stands for packed keys refers to the logits.
_LOGITS = "retinanet_ops.logits"


def rows_of(
    levels: Sequence[Value],  # L tensors [N, A*size, H, W]
    size: int,
) -> Value:  # [N, sum A*H*W, size]
    """Return the outputs of a head as one row per anchor."""
    shape = constant([0, -1, size])
    rows = [op.Reshape(op.Transpose(level, perm=[0, 2, 3, 1]), shape) for level in levels]
    return op.Concat(*rows, axis=1)


def logit_limit(score_threshold: float) -> float:
    """Return the lowest logit whose exact sigmoid, rounded to float32, is above the threshold, rounded to float32.

    It is infinite if there is none, and the lowest finite number if every number passes.
    """
    import numpy as np

    threshold = np.float32(score_threshold)
    if not threshold < 1:
        return math.inf
    if threshold < 0:
        return float(np.finfo(np.float32).min)
    # As in csrc/detect.h: a sigmoid rounds to a float above the threshold if it is above the midpoint between the
    # threshold and the next float.
    middle = 0.5 * (float(threshold) + float(np.nextafter(threshold, np.float32(np.inf))))

    def passes(logit: np.float32) -> bool:
        return 1 / (1 + math.exp(-float(logit))) > middle

    limit = np.float32(math.log(middle) - math.log1p(-middle))
    while passes(limit):
        limit = np.nextafter(limit, np.float32(-np.inf))
    while not passes(limit):
        limit = np.nextafter(limit, np.float32(np.inf))
    return float(limit)


def _selected(
    cls_logits: Sequence[Value],  # L tensors [N, A*K, H, W]
    score_threshold: float,
    topk: Size,
) -> tuple[Value, Value, Value]:
    """Return the logits and indices [N, S] of the candidates, by index, and whether a level has more of them [N, L].

    Empty slots have the logit -inf. They are among the others, and their index is that of any logit that does not pass.
    """
    limit = logit_limit(score_threshold)
    passing = op.Greater if limit == math.inf else op.GreaterOrEqual
    least, none, most = constant(limit, FLOAT), constant(-math.inf, FLOAT), vector(topk)
    first, columns = constant([0]), constant([1])
    logits, indices, flags = [], [], []
    for level in cls_logits:
        flat = op.Reshape(op.Transpose(cast(level, FLOAT), perm=[0, 2, 3, 1]), constant([0, -1]))
        size = size_of(flat, 1)
        slots = op.Min(most, size)
        passes = passing(flat, least)  # false for NaN
        flat = op.Where(passes, flat, none)
        logit, index = op.TopK(flat, slots, axis=1)
        # TopK of OpenVINO chooses freely among logits that are equal to the last one. Take the first of them instead.
        last = op.Gather(logit, constant([-1]), axis=1)  # [N, 1]
        position = op.Cast(count_to(size), to=FLOAT)
        _, first_tied = op.TopK(op.Where(op.Equal(flat, last), op.Neg(position), none), slots, axis=1)
        above = op.ReduceSum(op.Cast(op.Greater(logit, last), to=INT64), columns)  # [N, 1]
        slot = op.Sub(op.Unsqueeze(count_to(slots), constant([0])), above)
        tied = op.GatherElements(first_tied, op.Max(slot, constant(0)), axis=1)
        index = op.Where(op.Less(slot, constant(0)), index, tied)
        index, order = op.TopK(index, slots, axis=1, largest=0)
        logits.append(op.GatherElements(logit, order, axis=1))
        indices.append(op.Add(index, first))
        flags.append(op.Greater(op.ReduceSum(op.Cast(passes, to=INT64), columns), most))
        first = op.Add(first, size)
    return op.Concat(*logits, axis=1), op.Concat(*indices, axis=1), op.Concat(*flags, axis=1)


def _decoded_rows(
    index: Value,  # [N, S] int64
    box_deltas: Sequence[Value],  # L tensors [N, A*4, H, W]
    anchors: Value,
    grid_sizes: Sequence[Size],
    grid_steps: Sequence[float],
    coder_weights: Sequence[float],
    min_log_ratio: float | None,
    max_log_ratio: float | None,
    offset: float,
    dtype: ir.DataType,
) -> Value:  # [N, S, 4]
    """Return the boxes of anchors."""
    deltas = rows_at(rows_of(box_deltas, 4), index)
    if dtype_of(box_deltas[0]) != dtype:
        deltas = op.Cast(deltas, to=dtype)
    boxes = anchor_boxes(anchors, grid_sizes, grid_steps, dtype)
    of_rows = rows_at(boxes, index) if rank_of(anchors) == 3 else op.Gather(boxes, index, axis=0)
    return decoded(deltas, of_rows, coder_weights, min_log_ratio, max_log_ratio, offset, dtype)


def select_candidates(
    cls_logits: Sequence[Value],  # L tensors [N, A*K, H, W]
    num_classes: Size,
    score_threshold: float,
    topk: Size,
) -> tuple[Value, Value]:  # [N, S] int64, [N, L] bool
    """Translate `select_candidates`.

    The kernel packs a logit and an index into each key, which ONNX cannot unpack. The keys of the graph are indices,
    or -1 in empty slots, and refer to the logits, which `decode_candidates` reads.
    """
    logit, index, truncated = _selected(cls_logits, score_threshold, topk)
    logit, order = best_first(logit)
    index = op.GatherElements(index, order, axis=1)
    keys = op.Where(op.Greater(logit, constant(-math.inf, FLOAT)), index, constant(-1))
    keys.meta[_LOGITS] = logit
    return keys, truncated


def decode_candidates(
    keys: Value,  # [N, S] int64
    box_deltas: Sequence[Value],  # L tensors [N, A*4, H, W]
    anchors: Value,
    grid_sizes: Sequence[Size],
    grid_steps: Sequence[float],
    image_sizes: Value | None,  # [N, 2]
    num_classes: Size,
    coder_weights: Sequence[float],
    min_log_ratio: float | None,
    max_log_ratio: float | None,
    offset: float,
) -> tuple[Value, Value, Value, Value]:
    """Translate `decode_candidates`: return boxes [N, S, 4], and scores, labels and anchor indices [N, S]."""
    logit = keys.meta.get(_LOGITS)
    if logit is None:
        raise NotImplementedError(
            "retinanet_ops.onnx: retinanet_ops::decode_candidates has a translation only for the keys that "
            "select_candidates returns, unchanged; call retinanet_ops.candidates"
        )
    dtype = compute_dtype(*box_deltas) if grid_sizes else dtype_of(anchors)
    used, zero = op.GreaterOrEqual(keys, constant(0)), constant(0)
    index, classes = op.Max(keys, zero), vector(num_classes)
    anchor = op.Div(index, classes)
    label = op.Sub(index, op.Mul(anchor, classes))
    boxes = _decoded_rows(
        anchor,
        box_deltas,
        anchors,
        grid_sizes,
        grid_steps,
        coder_weights,
        min_log_ratio,
        max_log_ratio,
        offset,
        dtype,
    )
    if image_sizes is not None:
        boxes = clipped(boxes, image_sizes, dtype)
    unused = constant(-1)
    return (
        op.Where(op.Unsqueeze(used, constant([2])), boxes, constant(0.0, dtype)),
        op.Where(used, op.Sigmoid(logit), constant(-math.inf, FLOAT)),
        op.Where(used, label, unused),
        op.Where(used, anchor, unused),
    )


def detect(
    cls_logits: Sequence[Value],  # L tensors [N, A*K, H, W]
    box_deltas: Sequence[Value],  # L tensors [N, A*4, H, W]
    anchors: Value,
    grid_sizes: Sequence[Size],
    grid_steps: Sequence[float],
    image_sizes: Value,  # [N, 2]
    score_threshold: float,
    topk: Size,
    iou_threshold: float,
    max_detections: Size,
    max_per_class: Size,
    class_agnostic: bool,
    coder_weights: Sequence[float],
    min_log_ratio: float | None,
    max_log_ratio: float | None,
    offset: float,
    clip_after_nms: bool,
) -> tuple[Value, Value, Value, Value, Value, Value]:
    """Translate `detect`.

    Returns boxes [N, D, 4], scores and labels [N, D], count [N], anchor_index [N, D] and truncated [N].
    """
    dtype = compute_dtype(*box_deltas) if grid_sizes else compute_dtype(*box_deltas, anchors)
    logit, index, level_truncated = _selected(cls_logits, score_threshold, topk)
    classes = constant(channels_of(cls_logits[0]) * 4 // channels_of(box_deltas[0]))
    anchor = op.Div(index, classes)
    label = op.Sub(index, op.Mul(anchor, classes))
    boxes = _decoded_rows(
        anchor,
        box_deltas,
        anchors,
        grid_sizes,
        grid_steps,
        coder_weights,
        min_log_ratio,
        max_log_ratio,
        offset,
        dtype,
    )
    sizes = cast(image_sizes, dtype)
    if not clip_after_nms:
        boxes = clipped(boxes, sizes, dtype)
    position, kept, capped = kept_boxes(
        boxes,
        logit,
        label,
        iou_threshold,
        vector(max_detections),
        dtype,
        max_per_class=max_per_class,
        class_agnostic=class_agnostic,
    )
    used, unused = op.GreaterOrEqual(position, constant(0)), constant(-1)
    position = op.Max(position, constant(0))
    boxes = rows_at(boxes, position)
    if clip_after_nms:
        boxes = clipped(boxes, sizes, dtype)
    scores, labels, anchor_index = (op.GatherElements(of, position, axis=1) for of in (logit, label, anchor))
    truncated = op.Or(capped, op.Greater(number_of(level_truncated, 1), constant(0)))
    return (
        op.Where(op.Unsqueeze(used, constant([2])), boxes, constant(0.0, dtype)),
        op.Where(used, op.Sigmoid(scores), constant(0.0, FLOAT)),
        op.Where(used, labels, unused),
        kept,
        op.Where(used, anchor_index, unused),
        truncated,
    )


def gather_class_scores(
    cls_logits: Sequence[Value],  # L tensors [N, A*K, H, W]
    anchor_index: Value,  # [N, D] int64
    num_classes: int,
) -> Value:  # [N, D, K] float32
    """Translate `gather_class_scores`."""
    logits = rows_of(cls_logits, num_classes)
    zero = constant(0)
    valid = op.And(op.GreaterOrEqual(anchor_index, zero), op.Less(anchor_index, size_of(logits, 1)))
    rows = rows_at(logits, op.Where(valid, anchor_index, zero))
    scores = op.Sigmoid(op.Cast(rows, to=FLOAT))
    return op.Where(op.Unsqueeze(valid, constant([2])), scores, constant(0.0, FLOAT))
