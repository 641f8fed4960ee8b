"""Non-maximum suppression as a loop, each iteration of which keeps one box of every image.

The ONNX operator NonMaxSuppression is not used, for these reasons:

- Runtimes differ in whether an IoU that equals the threshold suppresses. In onnxruntime it does not, in OpenVINO it
  does.
- For NMS by class it takes a score of every box for every class: 12 million numbers for 10,000 boxes and 1,203 classes.
- It orders the corners of inverted boxes, whose IoU is 0 here.

The tensors of the loop have the size of the boxes. It compares classes as integers, and its formulas are those of the
kernels. A limit of each class costs no second pass.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from ._overlaps import intersection_and_union, positive
from ._values import (
    DOUBLE,
    FLOAT,
    INT64,
    Nodes,
    Size,
    Value,
    constant,
    count_to,
    dtype_of,
    loop,
    number_of,
    op,
    rows_at,
    scalar,
    size_of,
    vector,
)

#: The lowest finite number of each dtype of scores.
_LOWEST = {dtype: float(np.finfo(dtype.numpy()).min) for dtype in (FLOAT, DOUBLE)}


def kept_boxes(
    boxes: Value,  # [N, C, 4]
    scores: Value,  # [N, C], of a floating dtype; -inf: no candidate
    labels: Value | None,  # [N, C] int64; None: all boxes are of one class
    iou_threshold: float,
    slots: Value,  # [1] int64
    dtype: ir.DataType,
    *,
    score_dtype: ir.DataType = FLOAT,
    max_per_class: Size = 0,  # 0: no limit
    class_agnostic: bool = False,
) -> tuple[Value, Value, Value]:
    """Return the indices of the boxes that NMS keeps [N, D], their number [N], and whether a limit dropped one [N].

    Boxes are ordered by (score descending, index ascending). Unused slots hold -1. `dtype` is that of the boxes.
    """
    limited = not isinstance(max_per_class, int) or max_per_class > 0
    candidates = size_of(boxes, 1)
    none, zero, threshold = constant(-math.inf, score_dtype), constant(0.0, dtype), constant(iou_threshold, dtype)
    lowest, per_class = constant(_LOWEST[score_dtype], score_dtype), vector(max_per_class)
    one = constant([1])  # as an axis, that of the boxes
    # One more box, which is no candidate, keeps every tensor non-empty, and stands for "no box left".
    boxes = op.Pad(boxes, constant([0, 0, 0, 0, 1, 0]), zero)
    scores = op.Pad(scores, constant([0, 0, 0, 1]), none)  # [N, C + 1]
    if class_agnostic and not limited:
        labels = None
    elif labels is not None:
        labels = op.Pad(labels, constant([0, 0, 0, 1]), constant(0))
    elif limited:
        labels = op.Expand(constant([0]), op.Shape(scores))
    position = op.Unsqueeze(count_to(op.Add(candidates, one)), constant([0]))  # [1, C + 1]
    candidates = scalar(candidates)
    edges = [op.Squeeze(edge, constant([2])) for edge in op.Split(boxes, axis=2, num_outputs=4)]  # [N, C + 1]
    area = op.Mul(op.Sub(edges[2], edges[0]), op.Sub(edges[3], edges[1]))

    def best_of(nodes: Nodes, scores: Value) -> Value:  # [N, C + 1] -> [N, 1]
        """Return the first of the best candidates, or C if there is none."""
        top = nodes.Max(nodes.ReduceMax(scores, one, keepdims=1), lowest)
        return nodes.ReduceMin(nodes.Where(nodes.Equal(scores, top), position, candidates), one, keepdims=1)

    def step(
        body: Nodes,
        best: Value,  # [N, 1]
        left: Value,  # [N, C + 1]: scores of the boxes that are neither kept nor suppressed
        *taken: Value,  # [N, C + 1]: number of kept boxes of the same class
    ) -> tuple[Value, list[Value], Value]:
        kept = [body.GatherElements(edge, best, axis=1) for edge in edges]
        kept_area = body.GatherElements(area, best, axis=1)
        shared, union = intersection_and_union(body, kept, kept_area, edges, area, zero)
        ratio = body.Div(shared, union)
        if iou_threshold < 0:  # a comparison with another threshold is false for every ratio that is not positive
            ratio = positive(body, ratio, zero)
        suppressed = body.Greater(ratio, threshold)
        if labels is not None:
            same_class = body.Equal(labels, body.GatherElements(labels, best, axis=1))
            if not class_agnostic:
                suppressed = body.And(suppressed, same_class)
        if limited:  # a box that ranks before the kept one is left, because its class has enough boxes
            score = body.GatherElements(left, best, axis=1)
            tied = body.And(body.Equal(left, score), body.Greater(position, best))
            suppressed = body.And(suppressed, body.Or(body.Less(left, score), tied))
        left = body.Where(body.Or(suppressed, body.Equal(position, best)), none, left)
        eligible = left
        if limited:
            # Without a box left, the kept box is the last one, which counts for no other.
            found = body.Less(best, candidates)
            taken = (body.Add(taken[0], body.Cast(body.And(same_class, found), to=INT64)),)
            eligible = body.Where(body.Less(taken[0], per_class), left, none)
        next_best = best_of(body, eligible)
        more = body.Less(body.ReduceMin(next_best, keepdims=0), candidates)
        return more, [next_best, left, *taken], body.Identity(best)

    states = [(best_of(op, scores), INT64), (scores, score_dtype)]
    if limited:
        states.append((op.Expand(constant([0]), op.Shape(scores)), INT64))
    # At least one iteration gives its result a shape.
    (_, left, *_), kept = loop(scalar(op.Max(slots, one)), states, step)  # [iterations, N, 1]
    index = op.Transpose(op.Squeeze(kept, constant([2])), perm=[1, 0])
    number = number_of(op.Less(index, candidates), 1)
    dropped = op.Or(op.Greater(number_of(op.Greater(left, none), 1), constant(0)), op.Greater(number, slots))
    free = op.Max(op.Sub(slots, size_of(index, 1)), constant([0]))
    index = op.Pad(index, op.Concat(constant([0, 0, 0]), free, axis=0), candidates)
    index = op.Slice(index, constant([0]), slots, one)  # shorter if there are no slots
    return op.Where(op.Less(index, candidates), index, constant(-1)), op.Min(number, slots), dropped


def _scores_of_candidates(
    scores: Value,  # [N, C]
    counts: Value | None,  # [N] int64
    dtype: ir.DataType,
) -> tuple[Value, ir.DataType]:  # [N, C]
    """Return scores that are -inf where there is no candidate, and their dtype. `dtype` is that of the argument."""
    if dtype not in (FLOAT, DOUBLE):
        scores, dtype = op.Cast(scores, to=FLOAT), FLOAT
    none = constant(-math.inf, dtype)
    valid = op.Greater(scores, none)  # false for NaN
    if counts is not None:
        position = op.Unsqueeze(count_to(size_of(scores, 1)), constant([0]))
        valid = op.And(valid, op.Less(position, op.Unsqueeze(counts, constant([1]))))
    return op.Where(valid, scores, none), dtype


def best_first(scores: Value) -> tuple[Value, Value]:  # [N, C] -> [N, C], [N, C] int64
    """Return the scores of each image and their indices by (score descending, index ascending)."""
    candidates = size_of(scores, 1)
    ranked, order = op.TopK(scores, candidates, axis=1)
    # TopK of OpenVINO leaves equal scores in any order. Number the runs of equal scores, and sort within them. OpenVINO
    # computes the keys with 32 bits, which are enough for 46,340 candidates.
    first, columns = constant([0]), constant([1])
    before = op.Slice(op.Concat(op.Slice(ranked, first, columns, columns), ranked, axis=1), first, candidates, columns)
    run = op.CumSum(op.Cast(op.Less(ranked, before), to=INT64), constant(1))
    _, place = op.TopK(op.Add(op.Mul(run, candidates), order), candidates, axis=1, largest=0)
    return ranked, op.GatherElements(order, place, axis=1)


def rank_scores(
    scores: Value,  # [N, C]
    counts: Value | None,  # [N] int64
) -> tuple[Value, Value]:  # [N, C] int64, [N] int64
    """Translate `rank_scores`."""
    scores, dtype = _scores_of_candidates(scores, counts, dtype_of(scores))
    return best_first(scores)[1], number_of(op.Greater(scores, constant(-math.inf, dtype)), 1)


def batched_nms_padded(
    boxes: Value,  # [N, C, 4]
    scores: Value,  # [N, C]
    labels: Value | None,  # [N, C] int64
    counts: Value | None,  # [N] int64
    iou_threshold: float,
    max_detections: Size,
) -> tuple[Value, Value]:  # [N, D] int64, [N] int64
    """Translate `batched_nms_padded`."""
    scores, score_dtype = _scores_of_candidates(scores, counts, dtype_of(scores))
    slots = vector(max_detections)
    index, count, _ = kept_boxes(boxes, scores, labels, iou_threshold, slots, dtype_of(boxes), score_dtype=score_dtype)
    return index, count


def nms(
    boxes: Value,  # [C, 4]
    scores: Value,  # [C]
    labels: Value | None,  # [C] int64
    iou_threshold: float,
) -> Value:  # [kept] int64
    """Translate `nms`."""
    first = constant([0])
    rows, image_scores = op.Unsqueeze(boxes, first), op.Unsqueeze(scores, first)
    image_scores, score_dtype = _scores_of_candidates(image_scores, None, dtype_of(scores))
    index, count, _ = kept_boxes(
        rows,
        image_scores,
        None if labels is None else op.Unsqueeze(labels, first),
        iou_threshold,
        size_of(scores, 0),
        dtype_of(boxes),
        score_dtype=score_dtype,
    )
    return op.Slice(op.Squeeze(index, first), first, count)


def nms_sorted(
    boxes: Value,  # [N, C, 4]
    order: Value | None,  # [N, C] int64
    count: Value,  # [N] int64
    labels: Value | None,  # [N, C] int64
    iou_threshold: float,
    max_detections: Size,
    max_per_class: Size,
    class_agnostic: bool,
) -> tuple[Value, Value, Value]:  # [N, D] int64, [N] int64, [N] bool
    """Translate `nms_sorted`."""
    dtype = dtype_of(boxes)
    if order is not None:
        boxes = rows_at(boxes, order)
        labels = None if labels is None else op.GatherElements(labels, order, axis=1)
    position = op.Unsqueeze(count_to(size_of(boxes, 1)), constant([0]))
    valid = op.Less(position, op.Unsqueeze(count, constant([1])))
    scores = op.Where(valid, constant(0.0, FLOAT), constant(-math.inf, FLOAT))
    index, kept, truncated = kept_boxes(
        boxes,
        scores,
        labels,
        iou_threshold,
        vector(max_detections),
        dtype,
        max_per_class=max_per_class,
        class_agnostic=class_agnostic,
    )
    if order is not None:
        # The order gets a last element -1, to which the -1 of an unused slot points.
        index = op.GatherElements(op.Pad(order, constant([0, 0, 0, 1]), constant(-1)), index, axis=1)
    return index, kept, truncated
