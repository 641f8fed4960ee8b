"""`softmax_cross_entropy` against its reference in float64."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from cases import FLOATING, RTOL, assert_close, unaligned
from launches import assert_moves_at_most
from torch.library import opcheck

import retinanet_ops as ops
from retinanet_ops import reference

CLASSES = (1, 2, 15, 16, 17, 31, 32, 33, 91, 96, 300)


def gpu_check_cases(small):
    """Yield (name, run, tolerance) for `python -m tools.gpu_check`; tolerance 0 demands the same bits."""

    def run(dtype, device):
        torch.manual_seed(0)
        x, targets = rows(700 if small else 70_001, 91, dtype)
        x = x.to(device).requires_grad_()
        loss = ops.softmax_cross_entropy(x, targets.to(device))
        return {"loss": loss, "gradient": torch.autograd.grad(loss.sum(), x)[0]}

    for dtype in FLOATING:
        yield f"softmax_cross_entropy {dtype}", partial(run, dtype), 4e-6 if dtype == torch.float32 else RTOL[dtype]


def rows(count, classes, dtype=torch.float32):
    """Return logits [count, classes], and targets of which some are ignored."""
    targets = torch.randint(0, classes, (count,), dtype=torch.int32)
    targets[::5] = -2
    return (torch.randn(count, classes) * 3).to(dtype), targets


def assert_close_to_one(actual, expected, dtype):
    """Compare sums and differences with terms of up to 1, or of up to `expected`, as their roundings allow."""
    dtype = torch.float64 if dtype == torch.float64 else torch.float32
    torch.testing.assert_close(actual.double().cpu(), expected.cpu(), rtol=RTOL[dtype], atol=RTOL[dtype])


class TestForward:
    @pytest.mark.parametrize("dtype", FLOATING)
    @pytest.mark.parametrize("classes", CLASSES)
    def test_equals_reference(self, device, dtype, classes):
        x, targets = (t.to(device) for t in rows(37, classes, dtype))
        loss = ops.softmax_cross_entropy(x, targets)
        assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert_close_to_one(loss, reference.softmax_cross_entropy(x.double(), targets), dtype)

    def test_equals_torch(self, device):
        x, targets = torch.randn(4, 50, 91, device=device), torch.randint(0, 91, (4, 50), device=device)
        expected = F.cross_entropy(x.flatten(0, 1).double(), targets.flatten(), reduction="none").view(4, 50)
        assert_close_to_one(ops.softmax_cross_entropy(x, targets), expected, torch.float32)

    @pytest.mark.parametrize("dtype", (torch.uint8, torch.int16, torch.int32, torch.int64))
    def test_integer_targets(self, device, dtype):
        x, targets = torch.randn(9, 5, device=device), torch.randint(0, 5, (9,), device=device)
        assert torch.equal(ops.softmax_cross_entropy(x, targets.to(dtype)), ops.softmax_cross_entropy(x, targets))


class TestGradient:
    def test_gradcheck(self, device):
        x, targets = (t.to(device) for t in rows(6, 5, torch.float64))
        x.requires_grad_()
        assert torch.autograd.gradcheck(lambda x: ops.softmax_cross_entropy(x, targets), x)
        assert torch.autograd.gradgradcheck(lambda x: ops.softmax_cross_entropy(x, targets), x)

    @pytest.mark.parametrize("dtype", FLOATING)
    @pytest.mark.parametrize("classes", CLASSES)
    def test_equals_reference(self, device, dtype, classes):
        x, targets = (t.to(device) for t in rows(37, classes, dtype))
        loss = ops.softmax_cross_entropy(x.requires_grad_(), targets)
        grad = torch.rand_like(loss)
        (actual,) = torch.autograd.grad(loss, x, grad)
        exact = x.detach().double().requires_grad_()
        (expected,) = torch.autograd.grad(reference.softmax_cross_entropy(exact, targets), exact, grad.double())
        assert actual.dtype == dtype
        if dtype in (torch.float64, torch.float32):
            assert_close_to_one(actual, expected, dtype)
        else:
            torch.testing.assert_close(actual.double(), expected, rtol=RTOL[dtype], atol=RTOL[dtype])

    def test_rows_without_an_incoming_gradient_are_not_read(self, device):
        x = torch.randn(3, 5, device=device)
        x[1] = math.nan
        x.requires_grad_()
        loss = ops.softmax_cross_entropy(x, torch.tensor([1, 2, 9], device=device))
        (grad,) = torch.autograd.grad(loss[0], x)
        assert grad[0].abs().sum() > 0 and (grad[1:] == 0).all()


class TestEdgeCases:
    def test_large_and_small_logits(self, device):
        x = torch.tensor([[1e4, 0.0, -1e4], [-3e38, 3e38, 0], [-math.inf, 5, 5]], device=device)
        loss = ops.softmax_cross_entropy(x, torch.tensor([1, 1, 2], device=device))
        assert_close(loss, torch.tensor([1e4, 0.0, math.log(2)]))

    def test_nan_and_infinite_logits_make_their_row_nan(self, device):
        for value in (math.nan, math.inf, -math.nan):
            for classes in (3, 91):
                x = torch.randn(3, classes, device=device)
                x[1, classes - 1] = value
                x.requires_grad_()
                loss = ops.softmax_cross_entropy(x, torch.zeros(3, dtype=torch.int32, device=device))
                assert loss.isnan().tolist() == [False, True, False]
                (grad,) = torch.autograd.grad(loss.sum(), x)
                assert grad.isnan().all(1).tolist() == [False, True, False]
                assert grad[::2].isfinite().all()

    def test_ignored_and_invalid_targets(self, device):
        x = torch.randn(6, 5, device=device)
        x[0, 2] = math.nan
        x.requires_grad_()
        targets = torch.tensor([-2, -1, 5, -3, 4, 2**33], device=device)
        loss = ops.softmax_cross_entropy(x, targets)
        assert loss.isnan().tolist() == [False, True, True, True, False, True] and loss[0] == 0 < loss[4]
        (grad,) = torch.autograd.grad(loss.sum(), x)
        assert grad.isnan().all(1).tolist() == [False, True, True, True, False, True] and (grad[0] == 0).all()
        wanted = reference.softmax_cross_entropy(x, targets)
        (wanted_grad,) = torch.autograd.grad(wanted.sum(), x)
        assert torch.equal(loss.isnan(), wanted.isnan()) and torch.equal(grad.isnan(), wanted_grad.isnan())

    def test_strided_and_unaligned(self, device):
        x, targets = (t.to(device) for t in rows(40, 33))
        expected = ops.softmax_cross_entropy(x, targets)
        assert torch.equal(ops.softmax_cross_entropy(unaligned(x), unaligned(targets)), expected)
        assert torch.equal(ops.softmax_cross_entropy(x.t().contiguous().t(), targets), expected)

    def test_empty(self, device):
        x = torch.empty(2, 0, 3, device=device, requires_grad=True)
        loss = ops.softmax_cross_entropy(x, torch.empty(2, 0, dtype=torch.int64, device=device))
        assert loss.shape == (2, 0)
        assert torch.autograd.grad(loss.sum(), x)[0].shape == (2, 0, 3)

    def test_one_row_of_no_dimension(self, device):
        x = torch.randn(7, device=device)
        loss = ops.softmax_cross_entropy(x, torch.tensor(3, device=device))
        assert loss.shape == () and loss == ops.softmax_cross_entropy(x[None], torch.tensor([3], device=device))[0]

    @pytest.mark.backends("cpu")
    def test_independent_of_threads(self):
        x, targets = rows(5000, 91)
        x.requires_grad_()
        threads, results = torch.get_num_threads(), []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            loss = ops.softmax_cross_entropy(x, targets)
            results.append((loss.detach(), torch.autograd.grad(loss.sum(), x)[0]))
        torch.set_num_threads(threads)
        assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(result, results[0], strict=True))


class TestErrors:
    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"inputs": torch.zeros(3, 2).int()}, TypeError, "inputs must be float16.* got torch.int32"),
            ({"inputs": torch.zeros(())}, ValueError, r"inputs must have shape \[..., K\] .* got \[\]"),
            ({"inputs": torch.zeros(3, 0)}, ValueError, r"inputs must have shape .* one class, got \[3, 0\]"),
            ({"targets": torch.zeros(3)}, TypeError, "targets must be an integer tensor, got torch.float32"),
            ({"targets": torch.zeros(2).int()}, ValueError, r"targets must have shape \[3\], got \[2\]"),
            ({"targets": torch.zeros(3, device="meta").int()}, ValueError, "targets must be on inputs's device cpu"),
        ],
    )
    def test_message_names_the_argument(self, change, error, message):
        arguments = {"inputs": torch.zeros(3, 2), "targets": torch.zeros(3).int()} | change
        with pytest.raises(error, match=f"softmax_cross_entropy: {message}"):
            ops.softmax_cross_entropy(**arguments)

    def test_direct_call_of_the_op(self, device):
        x, targets = torch.zeros(3, 2, device=device), torch.zeros(3, dtype=torch.int32, device=device)
        forward, backward = (
            getattr(torch.ops.retinanet_ops, f"softmax_cross_entropy{name}") for name in ("", "_backward")
        )
        for call, message in (
            (lambda: forward(x, targets[:2]), r"targets \[2\] do not fit inputs \[3, 2\]"),
            (lambda: forward(x, targets.long()), "targets must be Int"),
            (lambda: forward(x[:, :0], targets), "expected 1 to 2.31 - 1 classes"),
            (lambda: backward(x[:2, 0], x, targets), r"grad \[2\] does not fit targets \[3\]"),
            (lambda: backward(x[:, 0].double(), x, targets), "grad must be Float"),
        ):
            with pytest.raises(RuntimeError, match=f"softmax_cross_entropy.*: {message}"):
                call()


class TestCompile:
    def test_opcheck_and_one_graph(self, device):
        x, targets = (t.to(device) for t in rows(20, 7))
        x.requires_grad_()
        opcheck(torch.ops.retinanet_ops.softmax_cross_entropy, (x, targets))
        compiled = torch.compile(ops.softmax_cross_entropy, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x, targets), ops.softmax_cross_entropy(x, targets))


@pytest.mark.backends("emulated")
class TestLaunches:
    def test_reads_logits_once_and_writes_gradients_once(self, tracing):
        x, targets = rows(1000, 91)
        x.requires_grad_()
        loss = ops.softmax_cross_entropy(x, targets.clamp(min=0))
        weight = (torch.arange(1000) % 4 == 0).float()  # hard negative mining counts few rows
        (loss * weight).sum().backward()
        forward, backward = tracing.take_launches()
        size = 4 * x.numel()
        assert_moves_at_most([forward], read=size + 4 * 1000, written=4 * 1000)
        assert_moves_at_most([backward], read=size // 4 + 8 * 1000, written=size)

    def test_launches_do_not_depend_on_the_data(self, emulator):
        logs = []
        for x in (torch.randn(70, 9), torch.full((70, 9), math.nan)):
            ops.softmax_cross_entropy(x, torch.zeros(70, dtype=torch.int32))
            logs.append([repr(launch) for launch in emulator.take_launches()])
        assert len(logs[0]) == 1 and logs[0] == logs[1]
