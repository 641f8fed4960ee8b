"""`dense_softmax_cross_entropy` against its reference in float64."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from cases import FLOATING, RTOL, assert_close, unaligned
from focal_cases import LAYOUTS
from launches import assert_moves_at_most
from torch.library import opcheck

import retinanet_ops as ops
from retinanet_ops import reference
from retinanet_ops.reference._rows import rows_of

CLASSES = (1, 5, 33)
# Areas around a chunk of 128 cells on the CPU and a warp of 32 anchors on CUDA, and a single cell.
GRIDS = ((9, 15), (4, 8), (1, 1))
PER_CELL = 3


def gpu_check_cases(small):
    """Yield (name, run, tolerance) for `python -m tools.gpu_check`; tolerance 0 demands the same bits."""
    sides = (12, 5) if small else (38, 19, 10, 5, 3, 1)

    def run(dtype, layout, device):
        torch.manual_seed(0)
        levels, targets = heads(91, dtype, layout, [(n, n) for n in sides])
        levels = [level.detach().to(device).requires_grad_() for level in levels]
        loss = ops.dense_softmax_cross_entropy(levels, targets.to(device), 91)
        grads = torch.autograd.grad(loss.sum(), levels)
        return {"loss": loss} | {f"gradient {i}": grad for i, grad in enumerate(grads)}

    for dtype in FLOATING:
        for layout in LAYOUTS:
            tolerance = 4e-6 if dtype == torch.float32 else RTOL[dtype]
            yield f"dense_softmax_cross_entropy {dtype} {layout}", partial(run, dtype, layout), tolerance


def heads(classes, dtype=torch.float32, layout=LAYOUTS[0], grids=GRIDS, images=2):
    """Return the logits of each level, with requires_grad, and targets of which some are ignored."""
    levels = [(torch.randn(images, PER_CELL * classes, h, w) * 3).to(dtype) for h, w in grids]
    targets = torch.randint(0, classes, (images, sum(PER_CELL * h * w for h, w in grids)), dtype=torch.int32)
    targets[:, ::5] = -2
    return [level.contiguous(memory_format=layout).requires_grad_() for level in levels], targets


def on(device, levels, targets):
    return [level.detach().to(device).requires_grad_() for level in levels], targets.to(device)


def gradients(function, levels, targets, classes, grad):
    loss = function(levels, targets, classes)
    return loss.detach(), torch.autograd.grad(loss, levels, grad.to(loss))


def sparse_gradient(targets):
    """Return an incoming gradient in which one anchor in six counts, as after hard negative mining."""
    count = targets.shape[1]
    grad = torch.linspace(0.5, 1.5, count) * (torch.arange(count) % 6 == 1)
    return grad.expand(targets.shape).clone()


def assert_close_to_one(actual, expected, dtype):
    """Compare sums and differences with terms of up to 1, or of up to `expected`, as their roundings allow."""
    torch.testing.assert_close(actual.double().cpu(), expected.cpu(), rtol=RTOL[dtype], atol=RTOL[dtype])


class TestForwardAndGradient:
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("dtype", FLOATING)
    @pytest.mark.parametrize("classes", CLASSES)
    def test_equals_reference(self, device, dtype, classes, layout):
        levels, targets = on(device, *heads(classes, dtype, layout))
        wide = [level.detach().double().requires_grad_() for level in levels]
        for grad in (sparse_gradient(targets), torch.rand(targets.shape)):
            loss, grads = gradients(ops.dense_softmax_cross_entropy, levels, targets, classes, grad.to(device))
            expected, expected_grads = gradients(
                reference.dense_softmax_cross_entropy, wide, targets, classes, grad.to(device)
            )
            assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert_close_to_one(loss, expected, loss.dtype)
            for level, actual, wanted in zip(levels, grads, expected_grads, strict=True):
                assert actual.dtype == dtype and actual.stride() == level.stride()
                assert_close_to_one(actual, wanted, dtype)

    def test_equals_torch(self, device):
        levels, targets = on(device, *heads(91))
        targets = targets.clamp(min=0).long()
        rows = rows_of(levels, 91).double()
        expected = F.cross_entropy(rows.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
        assert_close_to_one(ops.dense_softmax_cross_entropy(levels, targets, 91), expected, torch.float32)

    def test_rows_as_a_level(self, device):
        levels, targets = on(device, *heads(7))
        rows = rows_of(levels, 7).contiguous()  # [N, A, K]
        actual = ops.dense_softmax_cross_entropy([rows.unsqueeze(2).permute(0, 3, 1, 2)], targets, 7)
        assert_close_to_one(actual, ops.dense_softmax_cross_entropy(levels, targets, 7).double(), torch.float32)

    def test_gradcheck(self, device):
        levels, targets = on(device, *heads(3, torch.float64, grids=((2, 2), (1, 1)), images=1))

        def loss(*levels):
            return ops.dense_softmax_cross_entropy(levels, targets, 3)

        assert torch.autograd.gradcheck(loss, levels)
        assert torch.autograd.gradgradcheck(loss, levels)

    def test_gradient_of_some_levels_only(self, device):
        levels, targets = on(device, *heads(3))
        expected = torch.autograd.grad(ops.dense_softmax_cross_entropy(levels, targets, 3).sum(), levels)[1]
        fixed = [level.detach() if i != 1 else level for i, level in enumerate(levels)]
        ops.dense_softmax_cross_entropy(fixed, targets, 3).sum().backward()
        assert torch.equal(levels[1].grad, expected) and levels[0].grad is None

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_anchors_without_an_incoming_gradient_are_not_read(self, device, layout):
        levels, targets = heads(5, layout=layout)
        grad = sparse_gradient(targets)
        grad[:, 200:] = 0  # whole chunks and levels without a gradient
        counts = grad != 0
        rows = rows_of(levels, 5)
        rows = torch.where(counts[..., None], rows, math.nan)
        begin, odd = 0, []
        for level in levels:
            n, _, h, w = level.shape
            of_level = rows[:, begin : begin + PER_CELL * h * w].unflatten(1, (h, w, PER_CELL))
            odd.append(of_level.permute(0, 3, 4, 1, 2).reshape(n, -1, h, w).contiguous(memory_format=layout))
            begin += PER_CELL * h * w
        results = []
        for values in (levels, odd):
            inputs, on_device = on(device, values, targets.clamp(min=0))
            results.append(gradients(ops.dense_softmax_cross_entropy, inputs, on_device, 5, grad.to(device))[1])
        assert all(map(torch.equal, *results)) and results[1][0].any() and not results[1][-1].any()


class TestEdgeCases:
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_large_and_small_logits(self, device, layout):
        rows = torch.tensor([[1e4, 0.0, -1e4], [-3e38, 3e38, 0], [-math.inf, 5, 5], [0, 0, -200]], device=device)
        level = rows.T[None, :, :, None].contiguous(memory_format=layout).requires_grad_()  # [1, 3, 4, 1]
        loss = ops.dense_softmax_cross_entropy([level], torch.tensor([[1, 1, 2, 0]], device=device), 3)
        assert_close(loss, torch.tensor([[1e4, 0.0, math.log(2), math.log(2)]]))
        (grad,) = torch.autograd.grad(loss.sum(), level)
        wanted = torch.tensor([[1.0, -1, 0], [0, 0, 0], [0, 0.5, -0.5], [-0.5, 0.5, 0]])
        assert_close(grad[0, :, :, 0].T, wanted)

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("value", (math.nan, math.inf, -math.nan))
    def test_nan_and_infinite_logits_make_their_anchor_nan(self, device, value, layout):
        for classes in (3, 91):
            x = torch.randn(1, classes, 3, 1)
            x[0, classes - 1, 1] = value
            x = x.to(device).contiguous(memory_format=layout).requires_grad_()
            loss = ops.dense_softmax_cross_entropy([x], torch.zeros(1, 3, dtype=torch.int32, device=device), classes)
            assert loss[0].isnan().tolist() == [False, True, False]
            (grad,) = torch.autograd.grad(loss.sum(), x)
            assert grad.isnan().all(1)[0, :, 0].tolist() == [False, True, False]
            assert grad[:, :, ::2].isfinite().all()

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_ignored_and_invalid_targets(self, device, layout):
        x = torch.randn(1, 5, 6, 1)
        x[0, 2, 0] = math.nan
        x = x.to(device).contiguous(memory_format=layout).requires_grad_()
        targets = torch.tensor([[-2, -1, 5, -3, 4, 2**33]], device=device)
        loss = ops.dense_softmax_cross_entropy([x], targets, 5)
        assert loss[0].isnan().tolist() == [False, True, True, True, False, True] and loss[0, 0] == 0 < loss[0, 4]
        (grad,) = torch.autograd.grad(loss.sum(), x)
        assert grad.isnan().all(1)[0, :, 0].tolist() == [False, True, True, True, False, True]
        assert (grad[:, :, 0] == 0).all()
        wanted = reference.dense_softmax_cross_entropy([x], targets, 5)
        (wanted_grad,) = torch.autograd.grad(wanted.sum(), x)
        assert torch.equal(loss.isnan(), wanted.isnan()) and torch.equal(grad.isnan(), wanted_grad.isnan())
        (grad,) = torch.autograd.grad(ops.dense_softmax_cross_entropy([x], targets, 5)[0, 4], x)
        assert (grad[:, :, :4] == 0).all() and grad[:, :, 4].any()

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_layouts_do_not_change_results(self, device, layout):
        levels, targets = heads(33)
        expected = ops.dense_softmax_cross_entropy(on(device, levels, targets)[0], targets.to(device), 33)
        for others in (
            [level.detach().contiguous(memory_format=layout) for level in levels],
            [unaligned(level.detach()) for level in levels],
            [level.detach().repeat_interleave(2, dim=3)[..., ::2] for level in levels],
            # Levels may have different layouts.
            [level.detach().contiguous(memory_format=LAYOUTS[i % 2]) for i, level in enumerate(levels)],
        ):
            others, on_device = [other.to(device) for other in others], targets.to(device)
            assert_close_to_one(
                ops.dense_softmax_cross_entropy(others, on_device, 33), expected.double(), torch.float32
            )

    @pytest.mark.parametrize("dtype", (torch.uint8, torch.int16, torch.int32, torch.int64))
    def test_integer_targets(self, device, dtype):
        levels, targets = on(device, *heads(5))
        targets = targets.clamp(min=0)
        actual = ops.dense_softmax_cross_entropy(levels, targets.to(dtype), 5)
        assert torch.equal(actual, ops.dense_softmax_cross_entropy(levels, targets, 5))

    @pytest.mark.parametrize(("images", "grids"), ((0, GRIDS), (2, ((0, 5),)), (2, ((2, 3), (0, 0)))))
    def test_empty(self, device, images, grids):
        levels, targets = on(device, *heads(3, grids=grids, images=images))
        loss = ops.dense_softmax_cross_entropy(levels, targets, 3)
        assert loss.shape == targets.shape
        grads = torch.autograd.grad(loss.sum(), levels)
        assert [g.shape for g in grads] == [level.shape for level in levels]

    @pytest.mark.backends("cpu")
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_independent_of_threads(self, layout):
        levels, targets = heads(91, layout=layout, grids=((20, 30), (9, 9)))
        grad = sparse_gradient(targets)
        threads, results = torch.get_num_threads(), []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            loss, grads = gradients(ops.dense_softmax_cross_entropy, levels, targets, 91, grad)
            results.append([loss, *grads])
        torch.set_num_threads(threads)
        assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(result, results[0], strict=True))


class TestErrors:
    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"cls_logits": torch.zeros(1, 4, 3, 1)}, TypeError, "cls_logits must be a list of tensors, got Tensor"),
            ({"cls_logits": [torch.zeros(1, 4, 3, 1).int()]}, TypeError, r"cls_logits\[0\] must be float16"),
            (
                {"cls_logits": [torch.zeros(1, 5, 3, 1)]},
                ValueError,
                r"cls_logits\[0\] .* num_classes 2 channels, got 5",
            ),
            ({"num_classes": 0}, ValueError, "num_classes must be"),
            ({"targets": torch.zeros(1, 6)}, TypeError, "targets must be an integer tensor, got torch.float32"),
            ({"targets": torch.zeros(1, 5).int()}, ValueError, r"targets must have shape \[1, 6\].* got \[1, 5\]"),
            ({"targets": torch.zeros(1, 6, device="meta").int()}, ValueError, "targets must be on cls_logits's device"),
        ],
    )
    def test_message_names_the_argument(self, change, error, message):
        arguments = {"cls_logits": [torch.zeros(1, 4, 3, 1)], "targets": torch.zeros(1, 6).int(), "num_classes": 2}
        with pytest.raises(error, match=f"dense_softmax_cross_entropy: {message}"):
            ops.dense_softmax_cross_entropy(**arguments | change)

    def test_direct_call_of_the_op(self, device):
        level, targets = torch.zeros(1, 4, 3, 1, device=device), torch.zeros(1, 6, dtype=torch.int32, device=device)
        grad, softmax = torch.zeros(1, 6, device=device), torch.zeros(1, 6, 2, device=device)
        forward, backward = (
            getattr(torch.ops.retinanet_ops, f"dense_softmax_cross_entropy{name}") for name in ("", "_backward")
        )
        for call, message in (
            (lambda: forward([level], targets[:, :2], 2), r"targets must have shape \[1, 6\], got \[1, 2\]"),
            (lambda: forward([level], targets.long(), 2), "targets must be Int"),
            (lambda: forward([level], targets, 0), "expected at least 1 class"),
            (lambda: forward([level], targets, 3), r"cls_logits \[1, 4, 3, 1\] do not fit 3 classes"),
            (lambda: backward(grad[:, 1:], [level], targets, softmax, 2), r"grad must have shape \[1, 6\]"),
            (lambda: backward(grad.double(), [level], targets, softmax, 2), "grad must be Float"),
            (lambda: backward(grad, [level], targets, softmax[:, 1:], 2), r"softmax must have shape \[1, 6, 2\]"),
            (lambda: backward(grad, [level], targets, softmax.double(), 2), "softmax must be Float"),
        ):
            with pytest.raises(RuntimeError, match=f"dense_softmax_cross_entropy.*: {message}"):
                call()


class TestCompile:
    def test_opcheck_and_one_graph(self, device):
        levels, targets = on(device, *heads(7, grids=((4, 8), (1, 1))))
        opcheck(torch.ops.retinanet_ops.dense_softmax_cross_entropy, (levels, targets, 7))
        compiled = torch.compile(ops.dense_softmax_cross_entropy, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(levels, targets, 7), ops.dense_softmax_cross_entropy(levels, targets, 7))


@pytest.mark.backends("emulated")
class TestLaunches:
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_reads_logits_once_and_writes_gradients_once(self, tracing, layout):
        levels, targets = heads(91, layout=layout, grids=((16, 20),), images=1)
        loss = ops.dense_softmax_cross_entropy(levels, targets.clamp(min=0), 91)
        counts = torch.arange(960) < 240  # hard negative mining counts few anchors
        (loss * counts.float()).sum().backward()
        forward, backward = tracing.take_launches()
        size = 4 * levels[0].numel()
        assert_moves_at_most([forward], read=size + 4 * 960, written=12 * 960)
        # A sector of 32 bytes of a plane holds logits of cells that count and of others, at most two per plane.
        assert_moves_at_most([backward], read=size // 4 + 16 * 960 + 91 * 3 * 2 * 32, written=size)

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_launches_do_not_depend_on_the_data(self, emulator, layout):
        logs = []
        levels, targets = heads(9, layout=layout)
        for values in (levels, [torch.full_like(level, math.nan) for level in levels]):
            ops.dense_softmax_cross_entropy(values, targets, 9)
            logs.append([repr(launch) for launch in emulator.take_launches()])
        assert len(logs[0]) == 1 and logs[0] == logs[1]
