"""Translation of the pairwise IoU and its relatives, and the formulas that NMS shares with them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import onnx_ir as ir

from ._values import Nodes, Value, constant, dtype_of, op

#: x1, y1, x2 and y2 of boxes.
Corners: TypeAlias = Sequence[Value]


def intersection_and_union(
    nodes: Nodes,
    box: Corners,
    box_area: Value,
    other: Corners,
    other_area: Value,
    zero: Value,
) -> tuple[Value, Value]:
    """Return the areas of intersection and union of pairs of boxes that broadcast."""
    x1, y1, x2, y2 = box
    other_x1, other_y1, other_x2, other_y2 = other
    width = nodes.Max(nodes.Sub(nodes.Min(x2, other_x2), nodes.Max(x1, other_x1)), zero)
    height = nodes.Max(nodes.Sub(nodes.Min(y2, other_y2), nodes.Max(y1, other_y1)), zero)
    shared = nodes.Mul(width, height)
    return shared, nodes.Sub(nodes.Add(box_area, other_area), shared)


def positive(nodes: Nodes, ratio: Value, zero: Value) -> Value:
    """Return 0 instead of an IoU that is no positive number, as that of a degenerate box."""
    return nodes.Where(nodes.Greater(ratio, zero), ratio, zero)


def box_iou(
    boxes1: Value,  # [M, 4]
    boxes2: Value,  # [N, 4]
    kind: str,
) -> Value:  # [M, N]
    """Translate `box_iou`, with the formulas of `csrc/common/iou_kinds.h`."""
    dtype = dtype_of(boxes1)
    zero = constant(0.0, dtype)
    x1, y1, x2, y2 = op.Split(boxes1, axis=1, num_outputs=4)  # [M, 1]
    gx1, gy1, gx2, gy2 = op.Split(op.Transpose(boxes2, perm=[1, 0]), axis=0, num_outputs=4)  # [1, N]
    first, second = (x1, y1, x2, y2), (gx1, gy1, gx2, gy2)
    width, height, other_width, other_height = (op.Sub(b, a) for a, b in ((x1, x2), (y1, y2), (gx1, gx2), (gy1, gy2)))
    shared, union = intersection_and_union(
        op, first, op.Mul(width, height), second, op.Mul(other_width, other_height), zero
    )
    if kind == "iou":
        return positive(op, op.Div(shared, union), zero)
    same = op.Equal(union, zero)
    for one, other in zip(first, second, strict=True):
        same = op.And(same, op.Equal(one, other))
    value = op.Where(same, constant(1.0, dtype), _ratio(shared, union, dtype))
    outer_width = op.Sub(op.Max(x2, gx2), op.Min(x1, gx1))
    outer_height = op.Sub(op.Max(y2, gy2), op.Min(y1, gy1))
    if kind == "giou":
        outer = op.Mul(outer_width, outer_height)
        return op.Sub(value, _ratio(op.Sub(outer, union), outer, dtype))
    half = constant(0.5, dtype)
    dx = op.Mul(half, op.Sub(op.Sub(op.Add(x1, x2), gx1), gx2))
    dy = op.Mul(half, op.Sub(op.Sub(op.Add(y1, y2), gy1), gy2))
    distance = op.Add(op.Mul(dx, dx), op.Mul(dy, dy))
    diagonal = op.Add(op.Mul(outer_width, outer_width), op.Mul(outer_height, outer_height))
    distant = op.Sub(value, _ratio(distance, diagonal, dtype))
    if kind == "diou":
        return distant
    turn = op.Sub(_angle(other_width, other_height, dtype), _angle(width, height, dtype))
    v = op.Mul(constant(4 / math.pi**2, dtype), op.Mul(turn, turn))
    alpha = _ratio(v, op.Add(op.Sub(constant(1.0, dtype), value), v), dtype)
    return op.Sub(distant, op.Mul(alpha, v))


def _ratio(a: Value, b: Value, dtype: ir.DataType) -> Value:
    """Return the quotient, or 0 where the denominator is 0."""
    zero = constant(0.0, dtype)
    empty = op.Equal(b, zero)
    return op.Where(empty, zero, op.Div(a, op.Where(empty, constant(1.0, dtype), b)))


def _angle(width: Value, height: Value, dtype: ir.DataType) -> Value:
    """Return `atan2(width, height)`, which is 0 where both are 0."""
    zero = constant(0.0, dtype)
    flat = op.Equal(height, zero)
    angle = op.Atan(op.Div(width, op.Where(flat, constant(1.0, dtype), height)))
    side = op.Sign(width)
    # Beyond a quarter turn, the side of the width decides the direction; a width of 0 counts as positive.
    half_turn = op.Where(op.Less(width, zero), constant(-math.pi, dtype), constant(math.pi, dtype))
    angle = op.Where(op.Less(height, zero), op.Add(angle, half_turn), angle)
    return op.Where(flat, op.Mul(side, constant(math.pi / 2, dtype)), angle)
