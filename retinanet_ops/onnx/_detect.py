"""Translations of the ops that read the outputs of the heads."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from ._boxes import anchor_boxes, clipped, decoded
from ._nms import best_first, kept_boxes
from ._values import (
    BOOL,
    FLOAT,
    INT64,
    Nodes,
    Size,
    Value,
    cast,
    channels_of,
    compute_dtype,
    constant,
    count_to,
    divided,
    dtype_of,
    either,
    number_of,
    op,
    rank_of,
    rows_at,
    scalar,
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
    first, one = constant([0]), constant([1])
    logits, indices, flags = [], [], []
    for level in cls_logits:
        flat = op.Reshape(op.Transpose(cast(level, FLOAT), perm=[0, 2, 3, 1]), constant([0, -1]))
        flat = op.Where(passing(flat, least), flat, none)  # without NaN
        size = size_of(flat, 1)
        slots = op.Min(most, size)
        best, order = op.TopK(flat, op.Min(op.Add(most, one), size), axis=1)
        logit, following = (op.Slice(best, a, b, one) for a, b in ((constant([0]), slots), (slots, op.Add(slots, one))))
        flags.append(op.Cast(op.ReduceSum(op.Cast(op.Greater(following, none), to=INT64), one), to=BOOL))
        index = _first_of_equal(flat, logit, op.Slice(order, constant([0]), slots, one), following, slots)
        index, order = op.TopK(index, slots, axis=1, largest=0)
        logits.append(op.GatherElements(logit, order, axis=1))
        indices.append(op.Add(index, first))
        first = op.Add(first, size)
    return op.Concat(*logits, axis=1), op.Concat(*indices, axis=1), op.Concat(*flags, axis=1)


def _first_of_equal(
    flat: Value,  # [N, size] logits of a level
    logit: Value,  # [N, k], best first
    index: Value,  # [N, k] int64
    following: Value,  # [N, 1] the logit after the last, or [N, 0]
    slots: Value,  # [1] int64, k
) -> Value:  # [N, k] int64
    """Return the indices of the best logits; of those that are equal to the last one, the first.

    ONNX demands the latter of TopK, but OpenVINO chooses freely among equal logits.
    """
    last = op.Gather(logit, constant([-1]), axis=1)  # [N, 1]
    candidate = op.Greater(last, constant(-math.inf, FLOAT))
    cut = op.Cast(op.And(op.Equal(following, last), candidate), to=INT64)
    is_cut = op.Cast(op.ReduceSum(cut, keepdims=0), to=BOOL)
    size, slot = scalar(size_of(flat, 1)), count_to(slots)
    zero, one, columns = constant(0), constant(1), constant([1])

    def chosen(nodes: Nodes) -> Value:
        # OpenVINO has a float32 in place of this integer, which is exact for levels of up to 2**24 logits.
        tied = nodes.Where(nodes.Equal(flat, last), nodes.Range(zero, size, one), size)
        first_tied, _ = nodes.TopK(tied, slots, outputs=2, axis=1, largest=0)  # [N, k]
        above = nodes.ReduceSum(nodes.Cast(nodes.Greater(logit, last), to=INT64), columns, keepdims=1)
        place = nodes.Sub(slot, above)  # among the tied ones; negative for the others, which keep their index
        source = nodes.Where(nodes.Less(place, zero), slot, nodes.Add(place, slots))
        either_index = nodes.Concat(index, nodes.Min(first_tied, nodes.Sub(size, one)), axis=1)
        return nodes.GatherElements(either_index, source, axis=1)

    return either(is_cut, index, chosen)


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

    The kernel packs a logit and an index into each key, which ONNX cannot unpack. The keys of the graph are indices
    that refer to the logits, which `decode_candidates` reads.
    """
    logit, index, truncated = _selected(cls_logits, score_threshold, topk)
    logit, order = best_first(logit)
    keys = op.GatherElements(index, order, axis=1)
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
    used = op.Greater(logit, constant(-math.inf, FLOAT))
    anchor, label = divided(keys, num_classes)
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
    num_classes = channels_of(cls_logits[0]) * 4 // channels_of(box_deltas[0])
    anchor, label = divided(index, num_classes)
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
