"""Formulas of boxes, and the translations of their coding and clipping."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from ._values import FLOAT, Size, Value, cast, constant, count_to, dtype_of, op, rank_of, shape, vector


def anchor_boxes(
    anchors: Value,  # [A, 4], [N, A, 4] or base anchors [B, 4]
    grid_sizes: Sequence[Size],  # height, width and anchors per cell of each level; empty without a grid
    grid_steps: Sequence[float],  # stride y, stride x, offset y and offset x of each level; empty without a grid
    dtype: ir.DataType,
) -> Value:  # [A, 4] or [N, A, 4]
    """Return the anchors that the three arguments of a schema stand for."""
    if not grid_sizes:
        return cast(anchors, dtype)
    levels: list[Value] = []
    first = constant([0])
    for i in range(len(grid_sizes) // 3):
        height, width, per_cell = (vector(size) for size in grid_sizes[3 * i : 3 * i + 3])
        stride_y, stride_x, offset_y, offset_x = grid_steps[4 * i : 4 * i + 4]
        end = op.Add(first, per_cell)
        base = op.Slice(anchors, first, end, constant([0]))
        first = end
        # The order of operations is that of `AnchorGrid.boxes`.
        cells = shape(height, width, 1, 1)
        y = op.Expand(op.Reshape(_centres(height, stride_y, offset_y), constant([-1, 1, 1, 1])), cells)
        x = op.Expand(op.Reshape(_centres(width, stride_x, offset_x), constant([1, -1, 1, 1])), cells)
        levels.append(op.Reshape(op.Add(op.Concat(x, y, x, y, axis=3), base), constant([-1, 4])))
    boxes = op.Concat(*levels, axis=0)
    return boxes if dtype == FLOAT else op.Cast(boxes, to=dtype)


def _centres(cells: Value, stride: float, offset: float) -> Value:  # [1] -> [cells] float32
    index = op.Cast(count_to(cells), to=FLOAT)
    return op.Add(op.Mul(index, constant(stride, FLOAT)), constant(offset, FLOAT))


def halves(values: Value) -> tuple[Value, Value]:  # [..., 4] -> two [..., 2]
    """Return the first two and the last two columns."""
    first, second = op.Split(values, axis=-1, num_outputs=2)
    return first, second


def _centre_and_size(
    boxes: Value,  # [..., 4]
    offset: float,
    dtype: ir.DataType,
) -> tuple[Value, Value]:  # two [..., 2]
    """Return the centres and the sides of boxes, as (x, y)."""
    first, second = halves(boxes)
    size = op.Sub(second, first)
    if offset:
        size = op.Add(size, constant(offset, dtype))
    return op.Add(first, op.Mul(size, constant(0.5, dtype))), size


def decoded(
    deltas: Value,  # [..., 4]
    anchors: Value,  # [..., 4]
    coder_weights: Sequence[float],
    min_log_ratio: float | None,
    max_log_ratio: float | None,
    offset: float,
    dtype: ir.DataType,
) -> Value:  # [..., 4]
    """Return the boxes that deltas describe; see `retinanet_ops.decode_boxes`."""
    centre, size = _centre_and_size(anchors, offset, dtype)
    shift, log_ratio = halves(op.Div(deltas, constant(list(coder_weights), dtype)))
    centre = op.Add(op.Mul(shift, size), centre)
    # Runtimes differ in whether Min and Max keep NaN.
    if min_log_ratio is not None:
        low = constant(min_log_ratio, dtype)
        log_ratio = op.Where(op.Less(log_ratio, low), low, log_ratio)
    if max_log_ratio is not None:
        high = constant(max_log_ratio, dtype)
        log_ratio = op.Where(op.Greater(log_ratio, high), high, log_ratio)
    half = op.Mul(op.Mul(op.Exp(log_ratio), size), constant(0.5, dtype))
    second = op.Add(centre, half)
    if offset:
        second = op.Sub(second, constant(offset, dtype))
    return op.Concat(op.Sub(centre, half), second, axis=-1)


def clipped(
    boxes: Value,  # [N, S, 4], or [A, 4] for one image
    image_sizes: Value,  # [N, 2] (height, width)
    dtype: ir.DataType,
    batched: bool = True,
) -> Value:  # shape of boxes
    """Return boxes clipped to `0..width` and `0..height` of their images; NaN stays NaN."""
    limit = op.Gather(image_sizes, constant([1, 0, 1, 0]), axis=1)  # [N, 4]
    if batched:
        limit = op.Unsqueeze(limit, constant([1]))
    zero = constant(0.0, dtype)
    boxes = op.Where(op.Less(boxes, zero), zero, boxes)
    return op.Where(op.Greater(boxes, limit), limit, boxes)


def encode_boxes(
    boxes: Value,  # [A, 4] or [N, A, 4]
    anchors: Value,
    grid_sizes: Sequence[Size],
    grid_steps: Sequence[float],
    coder_weights: Sequence[float],
    offset: float,
) -> Value:  # shape of boxes
    """Translate `encode_boxes`."""
    dtype = dtype_of(boxes)
    centre, size = _centre_and_size(boxes, offset, dtype)
    anchor_centre, anchor_size = _centre_and_size(anchor_boxes(anchors, grid_sizes, grid_steps, dtype), offset, dtype)
    shift = op.Div(op.Sub(centre, anchor_centre), anchor_size)
    deltas = op.Concat(shift, op.Log(op.Div(size, anchor_size)), axis=-1)
    return op.Mul(deltas, constant(list(coder_weights), dtype))


def decode_boxes(
    deltas: Value,  # [A, 4] or [N, A, 4]
    anchors: Value,
    grid_sizes: Sequence[Size],
    grid_steps: Sequence[float],
    coder_weights: Sequence[float],
    min_log_ratio: float | None,
    max_log_ratio: float | None,
    offset: float,
    image_sizes: Value | None,  # [N, 2]
) -> Value:  # shape of deltas
    """Translate `decode_boxes`."""
    dtype = dtype_of(deltas)
    of_rows = anchor_boxes(anchors, grid_sizes, grid_steps, dtype)
    boxes = decoded(deltas, of_rows, coder_weights, min_log_ratio, max_log_ratio, offset, dtype)
    return boxes if image_sizes is None else clipped(boxes, image_sizes, dtype, rank_of(deltas) == 3)


def clip_boxes(
    boxes: Value,  # [A, 4] or [N, A, 4]
    image_sizes: Value,  # [N, 2]
) -> Value:  # shape of boxes
    """Translate `clip_boxes`."""
    return clipped(boxes, image_sizes, dtype_of(boxes), rank_of(boxes) == 3)
