import math
from functools import partial

import pytest
import torch
from cases import FLOATING, SIZES, assert_close, unaligned
from launches import assert_moves_at_most, assert_streams
from torch.library import opcheck

import retinanet_ops as ops
from retinanet_ops import reference


def gpu_check_cases(small):
    """Yield (name, run, tolerance) for `python -m tools.gpu_check`; tolerance 0 demands the same bits."""

    def run(dtype, device):
        torch.manual_seed(0)
        x = torch.randn(1_001 if small else 1_000_001).to(device, dtype).requires_grad_()
        y = ops.null_op(x, 1.7)
        return {"y": y, "gradient": torch.autograd.grad(y.sum(), x)[0]}

    for dtype in FLOATING:
        yield f"null_op {dtype}", partial(run, dtype), 0.0


class TestForward:
    @pytest.mark.parametrize("dtype", FLOATING)
    @pytest.mark.parametrize("size", SIZES)
    def test_equals_reference(self, device, dtype, size):
        x = torch.randn(size).to(device, dtype)
        y = ops.null_op(x, 1.7)
        assert y.dtype == dtype
        assert_close(y, reference.null_op(x.double(), 1.7))

    def test_default_scale(self, device):
        assert ops.null_op(torch.tensor([3.0], device=device)).tolist() == [6.0]


class TestGradient:
    def test_gradcheck(self, device):
        x = torch.randn(5, dtype=torch.float64, device=device, requires_grad=True)
        assert torch.autograd.gradcheck(ops.null_op, (x, 1.7))
        assert torch.autograd.gradgradcheck(ops.null_op, (x, 1.7))

    @pytest.mark.parametrize("dtype", FLOATING)
    def test_equals_reference(self, device, dtype):
        x, grad = (torch.randn(65).to(device, dtype) for _ in range(2))
        (actual,) = torch.autograd.grad(ops.null_op(x.requires_grad_(), 1.7), x, grad)
        exact = x.detach().double().requires_grad_()
        (expected,) = torch.autograd.grad(reference.null_op(exact, 1.7), exact, grad.double())
        assert_close(actual, expected)


class TestEdgeCases:
    def test_special_values(self, device):
        x = torch.tensor([math.nan, math.inf, -0.0], device=device)
        assert_close(ops.null_op(x), reference.null_op(x))

    def test_strided_and_unaligned(self, device):
        x = torch.randn(7, 33, device=device)
        expected = ops.null_op(x)
        assert torch.equal(ops.null_op(unaligned(x)), expected)
        assert torch.equal(ops.null_op(x.t()), expected.t())

    def test_empty(self, device):
        assert ops.null_op(torch.empty(0, 3, device=device)).shape == (0, 3)


class TestErrors:
    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"x": torch.zeros(3).int()}, TypeError, "null_op: x must be float16.* got torch.int32"),
            ({"x": torch.zeros(())}, ValueError, r"null_op: x must have at least one dimension, got \[\]"),
            ({"scale": "2"}, TypeError, "null_op: scale must be a number, got '2'"),
        ],
    )
    def test_message_names_the_argument(self, change, error, message):
        with pytest.raises(error, match=message):
            ops.null_op(**({"x": torch.zeros(3), "scale": 2.0} | change))

    def test_direct_call_of_the_op(self, device):
        for x, message in (
            (torch.zeros((), device=device), "null_op: x must have at least one dimension"),
            (torch.zeros(3, device=device).int(), "null_op: expected float16, bfloat16, float32 or float64"),
        ):
            with pytest.raises(RuntimeError, match=message):
                torch.ops.retinanet_ops.null_op(x, 2.0)


class TestCompile:
    def test_opcheck_and_one_graph(self, device):
        x = torch.randn(60, device=device, requires_grad=True)
        opcheck(torch.ops.retinanet_ops.null_op, (x, 2.0))
        compiled = torch.compile(ops.null_op, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x, 1.7), ops.null_op(x, 1.7))


@pytest.mark.backends("emulated")
class TestLaunches:
    def test_reads_and_writes_each_element_once(self, tracing):
        x = torch.randn(100_000)
        ops.null_op(x)
        launches = tracing.take_launches()
        assert_moves_at_most(launches, read=4 * x.numel(), written=4 * x.numel())
        assert_streams(launches)

    def test_launches_do_not_depend_on_the_data(self, emulator):
        logs = []
        for x in (torch.randn(700), torch.full((700,), math.nan)):
            ops.null_op(x)
            logs.append([repr(launch) for launch in emulator.take_launches()])
        assert len(logs[0]) == 1 and logs[0] == logs[1]
