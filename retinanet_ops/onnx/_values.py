"""Constants and shapes of ONNX graphs, and the bodies of loops."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import onnx_ir as ir
from onnxscript import evaluator, opset18

#: A value of an ONNX graph. Only the arguments of a translation know their dtype and shape.
Value: TypeAlias = ir.Value
#: A number that may depend on the input: a Python integer, or an int64 scalar of the graph.
Size: TypeAlias = int | ir.Value
#: What adds nodes to a graph: `op` to the graph that is being exported, and a `LoopBody` to that of a loop.
Nodes: TypeAlias = Any

INT64, FLOAT, DOUBLE, BOOL = ir.DataType.INT64, ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.BOOL

op: Nodes = opset18


def constant(value: Any, dtype: ir.DataType = INT64) -> Value:
    """Return a constant tensor."""
    return op.Constant(value=ir.tensor(value, dtype=dtype))


def dtype_of(argument: Value) -> ir.DataType:
    """Return the dtype of an argument of a translation."""
    assert argument.dtype is not None
    return argument.dtype


def rank_of(argument: Value) -> int:
    """Return the number of dimensions of an argument of a translation."""
    assert argument.shape is not None
    return len(argument.shape)


def channels_of(level: Value) -> int:  # [N, C, H, W]
    """Return the number of channels of the output of a head, which no input changes."""
    assert level.shape is not None
    channels = level.shape[1]
    if not isinstance(channels, int):
        raise ValueError(f"retinanet_ops.onnx: the heads must have a fixed number of channels, got {level.shape}")
    return channels


def compute_dtype(*values: Value) -> ir.DataType:
    """Return the dtype in which arguments are computed: float64 if one of them is float64, else float32."""
    return DOUBLE if any(value.dtype == DOUBLE for value in values) else FLOAT


def cast(value: Value, dtype: ir.DataType) -> Value:
    """Return an argument in another dtype."""
    return value if value.dtype == dtype else op.Cast(value, to=dtype)


def vector(size: Size) -> Value:  # [1] int64
    """Return a size as a tensor of one element."""
    return op.Reshape(size, constant([1])) if isinstance(size, ir.Value) else constant([int(size)])


def scalar(value: Value) -> Value:  # [1] -> []
    """Return the element of a tensor of one element."""
    return op.Squeeze(value, constant([0]))


def size_of(value: Value, axis: int) -> Value:  # [1] int64
    """Return the size of one axis."""
    return op.Shape(value, start=axis, end=axis + 1)


def shape(*sizes: Value | int) -> Value:  # [number of sizes] int64
    """Return a shape from sizes, each an integer or a tensor of one element."""
    return op.Concat(*[constant([size]) if isinstance(size, int) else size for size in sizes], axis=0)


def count_to(size: Value) -> Value:  # [1] int64 -> [size] int64
    """Return 0, 1, ... up to a size."""
    return op.Range(constant(0), scalar(size), constant(1))


def number_of(condition: Value, axis: int) -> Value:  # bool -> int64, without the axis
    """Return how many elements along an axis are true."""
    return op.ReduceSum(op.Cast(condition, to=INT64), constant([axis]), keepdims=0)


def rows_at(values: Value, index: Value) -> Value:  # [N, R, ...], [N, S] -> [N, S, ...]
    """Return rows of each image of a batch."""
    return op.GatherND(values, op.Unsqueeze(index, constant([2])), batch_dims=1)


class LoopBody:
    """Nodes of the body of a loop: `body.Add(a, b)` adds one and returns its output.

    Inputs are values of the body or of the graph around it. Constants are values of the graph around it.
    """

    _numbers = itertools.count()

    def __init__(self) -> None:
        """Start without nodes."""
        self._tape = ir.tape.Tape()
        self._prefix = f"body_{next(self._numbers)}"  # a name must not occur twice in a file

    def value(self, dtype: ir.DataType | None = None, dimensions: int = 0) -> Value:
        """Return a new value; an input of the body has a dtype and a number of dimensions."""
        name = f"{self._prefix}_{next(self._numbers)}"
        if dtype is None:
            return ir.Value(name=name)
        return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape([None] * dimensions))

    def __getattr__(self, kind: str) -> Callable[..., Value]:
        """Return the function that adds a node of one kind."""

        def add(*inputs: Value, **attributes: Any) -> Value:
            return self._tape.op(kind, inputs, attributes, output=self.value())

        return add

    def graph(self, inputs: Sequence[Value], outputs: Sequence[Value]) -> ir.Graph:
        """Return the graph of the nodes that were added."""
        return ir.Graph(inputs, outputs, nodes=self._tape.nodes, name="body")


def loop(
    most: Value,  # [] int64
    start: Value,  # [] bool
    states: Sequence[tuple[Value, ir.DataType]],  # matrices
    step: Callable[..., tuple[Value, Sequence[Value]]],
) -> Sequence[Value]:
    """Return the states that a loop leaves.

    Args:
        most: Largest number of iterations.
        start: Whether the first iteration takes place.
        states: States before the loop, and their dtypes. Their shapes do not change.
        step: Function of the nodes of the body, the number of the iteration and the states. It returns whether another
            iteration follows, and the new states, which are outputs of nodes of the body.
    """
    body = LoopBody()
    number, go_on = body.value(INT64), body.value(BOOL)
    inside = [body.value(dtype, 2) for _, dtype in states]
    condition, results = step(body, number, *inside)
    node = ir.Node(
        "",
        "Loop",
        [most, start, *(value for value, _ in states)],
        ir.convenience.convert_attributes({"body": body.graph([number, go_on, *inside], [condition, *results])}),
        num_outputs=len(states),
    )
    # `opset18.Loop` would give the node one output, because the schema leaves their number open.
    recorder: Any = evaluator.default()
    recorder.nodes.append(node)
    return node.outputs
