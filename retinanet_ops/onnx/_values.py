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
#: What adds nodes to a graph: `op` to the graph that is being exported, and a `Subgraph` to its own nodes.
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


def divided(value: Value, by: Size) -> tuple[Value, Value]:
    """Return quotients and remainders of int64 numbers below 2**31."""
    divisor, shift = vector(by), constant([256])
    quotient = op.Div(value, divisor)
    remainder = op.Sub(value, op.Mul(quotient, divisor))
    # OpenVINO divides in float32, so the quotient of a number above 2**24 may be off by up to 128.
    error = op.Sub(op.Div(op.Add(remainder, op.Mul(shift, divisor)), divisor), shift)
    return op.Add(quotient, error), op.Sub(remainder, op.Mul(error, divisor))


def rows_at(values: Value, index: Value) -> Value:  # [N, R, ...], [N, S] -> [N, S, ...]
    """Return rows of each image of a batch."""
    return op.GatherND(values, op.Unsqueeze(index, constant([2])), batch_dims=1)


class Subgraph:
    """Nodes of the body of a loop or of a branch: `nodes.Add(a, b)` adds one and returns its output.

    Inputs are values of the subgraph or of the graph around it. Constants are values of the graph around it.
    """

    _numbers = itertools.count()

    def __init__(self) -> None:
        """Start without nodes."""
        self._tape = ir.tape.Tape()

    def __getattr__(self, kind: str) -> Callable[..., Any]:
        """Return the function that adds a node of one kind."""

        def add(*inputs: Value, outputs: int = 1, **attributes: Any) -> Any:
            values = [ir.Value(name=self._name()) for _ in range(outputs)]
            self._tape.op_multi_out(kind, inputs, attributes, outputs=values)
            return values[0] if outputs == 1 else values

        return add

    def input(self, dtype: ir.DataType, dimensions: int) -> Value:
        """Return a new input of the subgraph."""
        return ir.Value(name=self._name(), type=ir.TensorType(dtype), shape=ir.Shape([None] * dimensions))

    def graph(self, inputs: Sequence[Value], outputs: Sequence[Value]) -> ir.Graph:
        """Return the graph of the nodes that were added."""
        return ir.Graph(inputs, outputs, nodes=self._tape.nodes, name="subgraph")

    @classmethod
    def _name(cls) -> str:
        """Return a name that no other value of the file has."""
        return f"subgraph_{next(cls._numbers)}"


def loop(
    most: Value,  # [] int64
    states: Sequence[tuple[Value, ir.DataType]],  # matrices
    step: Callable[..., tuple[Value, Sequence[Value], Value]],
) -> tuple[Sequence[Value], Value]:
    """Return the states that a loop leaves, and the results of its iterations, stacked.

    Args:
        most: Largest number of iterations.
        states: States before the loop, and their dtypes. Their shapes do not change.
        step: Function of the nodes of the body and of the states. It returns whether another iteration follows, the new
            states, and the result of the iteration, all of them outputs of nodes of the body.
    """
    body = Subgraph()
    number, go_on = body.input(INT64, 0), body.input(BOOL, 0)
    inside = [body.input(dtype, 2) for _, dtype in states]
    condition, left, result = step(body, *inside)
    graph = body.graph([number, go_on, *inside], [condition, *left, result])
    outputs = _node("Loop", [most, None, *(value for value, _ in states)], len(states) + 1, body=graph)
    return outputs[:-1], outputs[-1]


def either(condition: Value, value: Value, otherwise: Callable[[Nodes], Value]) -> Value:  # bool []
    """Return a value if the condition is false, else the result of a function of the nodes of a branch."""
    same, other = Subgraph(), Subgraph()
    branches = {
        "then_branch": other.graph([], [otherwise(other)]),
        "else_branch": same.graph([], [same.Identity(value)]),
    }
    return _node("If", [condition], 1, **branches)[0]


def _node(kind: str, inputs: Sequence[Value | None], outputs: int, **subgraphs: ir.Graph) -> Sequence[Value]:
    """Add a node to the graph that is being exported.

    `opset18` would give it one output, because the schemas of nodes with subgraphs leave their number open.
    """
    node = ir.Node("", kind, inputs, ir.convenience.convert_attributes(subgraphs), num_outputs=outputs)
    recorder: Any = evaluator.default()
    recorder.nodes.append(node)
    return node.outputs
