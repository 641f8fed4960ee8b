"""Encoding, decoding and clipping of boxes."""

import math

import pytest
import torch
from cases import FLOATING, SIZES, assert_close, random_boxes, unaligned
from torch.library import opcheck

import retinanet_ops as ops
from retinanet_ops import AnchorGrid, reference

WEIGHTS = ((1.0, 1.0, 1.0, 1.0), (10.0, 10.0, 5.0, 5.0))


def small_grid(device):
    return AnchorGrid.torchvision(((5, 7), (3, 4)), (40, 56), sizes=((8, 10), (16, 20)), device=device)


def double_grid(grid):
    return grid.boxes().double()


class TestForward:
    @pytest.mark.parametrize("weights", WEIGHTS)
    @pytest.mark.parametrize("dtype", FLOATING)
    def test_encode(self, device, dtype, weights):
        boxes, anchors = random_boxes(3, 90).to(device, dtype), random_boxes(90).to(device, dtype)
        deltas = ops.encode_boxes(boxes, anchors, coder_weights=weights)
        assert deltas.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        expected = reference.encode_boxes(boxes.double(), anchors.double(), coder_weights=weights)
        # The absolute tolerance covers the rounding of centres of up to 140 px before they are subtracted.
        torch.testing.assert_close(deltas.double(), expected, rtol=1e-5, atol=2e-4)

    @pytest.mark.parametrize("weights", WEIGHTS)
    @pytest.mark.parametrize("dtype", FLOATING)
    @pytest.mark.parametrize("clip", (False, True))
    def test_decode(self, device, dtype, weights, clip):
        deltas, anchors = (
            torch.randn(3, 90, 4).mul(2).to(device, dtype),
            random_boxes(3, 90).to(device, dtype),
        )
        sizes = torch.tensor([[60, 80], [20, 100], [100, 30]], device=device) if clip else None
        boxes = ops.decode_boxes(deltas, anchors, coder_weights=weights, image_sizes=sizes)
        assert boxes.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        expected = reference.decode_boxes(deltas.double(), anchors.double(), coder_weights=weights, image_sizes=sizes)
        torch.testing.assert_close(boxes.double(), expected, rtol=4e-6, atol=1e-3)

    @pytest.mark.parametrize("n", SIZES)
    def test_sizes(self, device, n):
        anchors, deltas = random_boxes(n).to(device), torch.randn(n, 4).to(device)
        boxes = ops.decode_boxes(deltas, anchors)
        torch.testing.assert_close(boxes, reference.decode_boxes(deltas, anchors))
        torch.testing.assert_close(ops.encode_boxes(boxes, anchors), deltas, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
    def test_grid_equals_its_boxes(self, device, dtype):
        grid = small_grid(device)
        boxes = random_boxes(2, grid.num_anchors).to(device, dtype)
        deltas = torch.randn(2, grid.num_anchors, 4).to(device, dtype)
        assert torch.equal(ops.encode_boxes(boxes, grid), ops.encode_boxes(boxes, grid.boxes()))
        assert torch.equal(ops.decode_boxes(deltas, grid), ops.decode_boxes(deltas, grid.boxes()))

    def test_grid_with_different_steps_in_x_and_y(self, device):
        base = torch.tensor([[-4.0, -3, 4, 3], [-2, -2, 2, 2]], device=device)
        grid = AnchorGrid(base, (2,), ((3, 5),), ((8.0, 10.0),), ((1.5, 6.0),))
        boxes = ops.decode_boxes(torch.zeros(grid.num_anchors, 4, device=device), grid)
        assert torch.equal(boxes, grid.boxes())
        assert boxes[0].tolist() == [2.0, -1.5, 10.0, 4.5] and boxes[2].tolist() == [12.0, -1.5, 20.0, 4.5]

    def test_equals_torchvision(self, device):
        pytest.importorskip("torchvision")
        from torchvision.models.detection._utils import BoxCoder

        coder = BoxCoder((10.0, 10.0, 5.0, 5.0))
        boxes, anchors, deltas = (
            random_boxes(200).to(device),
            random_boxes(200).to(device),
            torch.randn(200, 4).to(device),
        )
        weights = WEIGHTS[1]
        torch.testing.assert_close(
            ops.encode_boxes(boxes, anchors, coder_weights=weights),
            coder.encode_single(boxes, anchors),
            rtol=1e-5,
            atol=1e-4,
        )
        torch.testing.assert_close(
            ops.decode_boxes(deltas, anchors, coder_weights=weights), coder.decode_single(deltas, anchors)
        )

    def test_published_values(self, device):
        anchor = torch.tensor([[0.0, 0, 32, 32]], device=device)
        box = torch.tensor([[8.0, 4, 40, 52]], device=device)
        deltas = ops.encode_boxes(box, anchor)
        torch.testing.assert_close(deltas.cpu(), torch.tensor([[0.25, 0.375, 0.0, 0.40546511]]))
        torch.testing.assert_close(ops.decode_boxes(deltas, anchor), box)
        legacy = ops.encode_boxes(box, anchor, offset=1)
        torch.testing.assert_close(legacy.cpu(), torch.tensor([[0.24242424, 0.36363636, 0.0, 0.39531274]]))
        torch.testing.assert_close(ops.decode_boxes(legacy, anchor, offset=1), box)
        one = torch.tensor([0.0, 0, 1, 1], device=device)
        torch.testing.assert_close(ops.box_iou(anchor, box).item(), 0.35593220, rtol=1e-7, atol=0)
        torch.testing.assert_close(ops.box_iou(anchor + one, box + one).item(), 0.36597678, rtol=2e-7, atol=0)

    def test_default_max_log_ratio(self, device):
        anchor = torch.tensor([[0.0, 0, 1, 1]], device=device)
        below, at, above = (
            ops.decode_boxes(torch.tensor([[0.0, 0, v, v]], device=device), anchor)
            for v in (4.1351, 4.13516656, 4.1353)
        )
        assert torch.equal(at, above) and (below[:, 2:] < at[:, 2:]).all()

    @pytest.mark.parametrize("dtype", FLOATING)
    def test_clip(self, device, dtype):
        boxes = (random_boxes(3, 50) - 30).to(device, dtype)
        sizes = torch.tensor([[20.0, 40], [60, 10], [0, 7]], device=device)
        clipped = ops.clip_boxes(boxes, sizes)
        assert clipped.dtype == dtype and torch.equal(clipped, reference.clip_boxes(boxes, sizes))
        assert (clipped[2, :, 1] == 0).all() and clipped.min() >= 0
        assert torch.equal(ops.clip_boxes(boxes[0], (20, 40)), clipped[0])
        assert torch.equal(ops.clip_boxes(boxes, (20, 40))[1], ops.clip_boxes(boxes[1], (20, 40)))

    def test_half_precision_deltas_do_not_round_boxes(self, device):
        # In bfloat16 the coordinates of this box of 36 px at x = 1200 would be off by up to 4 px.
        anchor, delta = (
            torch.tensor([[1183.0, 300, 1219, 336]], device=device),
            torch.zeros(1, 4, device=device),
        )
        assert torch.equal(ops.decode_boxes(delta.bfloat16(), anchor), anchor)


class TestGradient:
    @pytest.mark.once
    @pytest.mark.parametrize("weights", WEIGHTS)
    def test_gradcheck(self, device, weights):
        boxes = random_boxes(2, 6).to(device, torch.float64).requires_grad_()
        anchors = random_boxes(6).to(device, torch.float64).requires_grad_()
        deltas = (torch.randn(2, 6, 4, dtype=torch.float64) * 0.5).to(device).requires_grad_()
        sizes = torch.tensor([[61.0, 43.0], [33.0, 71.0]], dtype=torch.float64, device=device)
        for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
            assert check(lambda b, a: ops.encode_boxes(b, a, coder_weights=weights), (boxes, anchors))
            assert check(lambda d, a: ops.decode_boxes(d, a, coder_weights=weights), (deltas, anchors))
            assert check(lambda d: ops.decode_boxes(d, anchors.detach(), image_sizes=sizes), deltas)
            assert check(lambda b: ops.clip_boxes(b, sizes), boxes)

    @pytest.mark.parametrize("coder_weights", (*WEIGHTS, (1.0, 2.0, 3.0, 4.0)))
    @pytest.mark.parametrize("offset", (0.0, 1.0))
    @pytest.mark.parametrize("dtype", FLOATING)
    def test_equals_the_reference(self, device, dtype, offset, coder_weights):
        boxes, anchors = random_boxes(2, 40).to(device, dtype), random_boxes(40).to(device)
        deltas, sizes = torch.randn(2, 40, 4).to(device, dtype), torch.tensor([[60.0, 80.0], [41.0, 30.0]]).to(device)
        bounds = {"min_log_ratio": -1.0, "max_log_ratio": 0.5}
        coder = {"coder_weights": coder_weights, "offset": offset}

        def results(library, boxes, deltas, anchors):
            yield library.encode_boxes(boxes, anchors, **coder), boxes
            for options in ({}, bounds, {"image_sizes": sizes}, {**bounds, "image_sizes": sizes}):
                yield library.decode_boxes(deltas, anchors, **coder, **options), deltas
            yield library.clip_boxes(boxes, sizes), boxes

        inputs = [t.requires_grad_() for t in (boxes, deltas)]
        doubles = [t.detach().double().requires_grad_() for t in inputs]
        actual, expected = results(ops, *inputs, anchors), results(reference, *doubles, anchors.double())
        tolerance = {torch.float64: 1e-12, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}[dtype]
        for (result, of), (expected_result, expected_of) in zip(actual, expected, strict=True):
            weight = torch.linspace(-1, 1, result.numel(), dtype=torch.float64, device=device).reshape(result.shape)
            (grad,) = torch.autograd.grad((result * weight).sum(), of)
            (expected_grad,) = torch.autograd.grad((expected_result * weight).sum(), expected_of)
            assert grad.dtype == dtype
            torch.testing.assert_close(grad.double(), expected_grad, rtol=tolerance, atol=tolerance)

    def test_grid(self, device):
        grid = small_grid(device)
        deltas = torch.randn(2, grid.num_anchors, 4, dtype=torch.float64, device=device, requires_grad=True)
        (grad,) = torch.autograd.grad(ops.decode_boxes(deltas, grid).square().sum(), deltas)
        (expected,) = torch.autograd.grad(reference.decode_boxes(deltas, double_grid(grid)).square().sum(), deltas)
        assert_close(grad, expected)

    def test_no_gradient_beyond_the_bounds(self, device):
        deltas = torch.tensor([[0.0, 0.0, 9.0, -9.0]], device=device, requires_grad=True)
        boxes = ops.decode_boxes(deltas, torch.tensor([[0.0, 0, 8, 8]], device=device), min_log_ratio=-4.0)
        (grad,) = torch.autograd.grad(boxes[:, 2:].sum(), deltas)
        assert grad[0, 2:].tolist() == [0.0, 0.0] and (grad[0, :2] > 0).all()

    def test_clipping_passes_the_gradient_of_a_coordinate_on_the_border(self, device):
        boxes = torch.tensor([[0.0, 0, 40, 20], [-1, -1, 41, 21]], device=device, requires_grad=True)
        (grad,) = torch.autograd.grad(ops.clip_boxes(boxes, (20, 40)).sum(), boxes)
        assert grad.tolist() == [[1, 1, 1, 1], [0, 0, 0, 0]]

    def test_decoding_passes_the_gradient_of_a_log_ratio_on_a_bound(self, device):
        deltas = torch.tensor([[0.0, 0, 2, -1]], device=device, requires_grad=True)
        boxes = ops.decode_boxes(
            deltas, torch.tensor([[0.0, 0, 8, 8]], device=device), min_log_ratio=-1.0, max_log_ratio=2.0
        )
        (grad,) = torch.autograd.grad(boxes[:, 2:].sum(), deltas)
        expected = 4 * torch.tensor([2.0, -1.0], device=device).exp()  # half of the anchor's side, times the ratio
        torch.testing.assert_close(grad[0, 2:], expected)


class TestEdgeCases:
    def test_log_ratio_bounds(self, device):
        anchor = torch.tensor([[0.0, 0, 16, 16]], device=device)
        deltas = torch.tensor([[0.0, 0, math.inf, 80.0]], device=device)
        boxes = ops.decode_boxes(deltas, anchor)
        torch.testing.assert_close(boxes[:, 2:] - boxes[:, :2], torch.full((1, 2), 1000.0, device=device))
        small = ops.decode_boxes(-deltas, anchor, min_log_ratio=-math.log(16.0))
        torch.testing.assert_close(small[:, 2:] - small[:, :2], torch.ones(1, 2, device=device))
        assert torch.equal(ops.decode_boxes(-deltas, anchor)[:, 2:], ops.decode_boxes(-deltas, anchor)[:, :2])

    def test_nan_stays_in_its_row(self, device):
        anchors, deltas = random_boxes(4).to(device), torch.zeros(4, 4, device=device)
        deltas[1, 2] = math.nan
        boxes = ops.decode_boxes(deltas, anchors, image_sizes=torch.tensor([[50, 50]], device=device))
        assert boxes.isnan().any(1).tolist() == [False, True, False, False]
        assert boxes[1].isnan().tolist() == [True, False, True, False]
        assert ops.clip_boxes(boxes, (5, 5)).isnan().any(1).tolist() == [False, True, False, False]

    def test_degenerate_boxes_do_not_affect_other_rows(self, device):
        anchors = torch.tensor([[0.0, 0, 8, 8], [5, 5, 5, 5], [0, 0, 4, 4]], device=device)
        deltas = ops.encode_boxes(anchors, anchors)
        assert deltas[[0, 2]].eq(0).all() and not deltas[1].isfinite().all()

    def test_unaligned(self, device):
        boxes, anchors = random_boxes(2, 33).to(device), random_boxes(33).to(device)
        assert torch.equal(ops.encode_boxes(unaligned(boxes), unaligned(anchors)), ops.encode_boxes(boxes, anchors))
        assert torch.equal(ops.decode_boxes(unaligned(boxes), unaligned(anchors)), ops.decode_boxes(boxes, anchors))
        assert torch.equal(ops.clip_boxes(unaligned(boxes), (9, 9)), ops.clip_boxes(boxes, (9, 9)))

    def test_empty_batch(self, device):
        assert ops.decode_boxes(torch.empty(0, 5, 4, device=device), random_boxes(5).to(device)).shape == (
            0,
            5,
            4,
        )
        assert ops.clip_boxes(torch.empty(2, 0, 4, device=device), (4, 4)).shape == (2, 0, 4)


class TestErrors:
    @pytest.mark.parametrize(
        ("call", "error", "message"),
        [
            (
                lambda: ops.encode_boxes(torch.zeros(3, 4), torch.zeros(2, 4)),
                ValueError,
                "encode_boxes: expected one row for each of the 2 anchors, got 3",
            ),
            (
                lambda: ops.encode_boxes(torch.zeros(3, 5), torch.zeros(3, 4)),
                ValueError,
                r"encode_boxes: boxes must have shape .* got \[3, 5\]",
            ),
            (
                lambda: ops.encode_boxes(torch.zeros(3, 4), torch.zeros(1, 3, 4)),
                ValueError,
                r"encode_boxes: boxes must have shape \[N, A, 4\] for anchors \[1, 3, 4\], got \[3, 4\]",
            ),
            (
                lambda: ops.encode_boxes(torch.zeros(3, 4), torch.zeros(3, 4), coder_weights=(1, 1)),
                ValueError,
                "encode_boxes: coder_weights must hold 4 numbers, got 2",
            ),
            (
                lambda: ops.decode_boxes(torch.zeros(3, 4).bool(), torch.zeros(3, 4)),
                TypeError,
                "decode_boxes: deltas must be a floating or integer tensor, got torch.bool",
            ),
            (
                lambda: ops.decode_boxes(torch.zeros(2, 3, 4), torch.zeros(3, 4), image_sizes=torch.zeros(3, 2)),
                ValueError,
                r"decode_boxes: image_sizes must have shape \[2, 2\], got \[3, 2\]",
            ),
            (
                lambda: ops.clip_boxes(torch.zeros(3, 4), (1, 2, 3)),
                ValueError,
                r"clip_boxes: image_sizes must be .* got \(1, 2, 3\)",
            ),
        ],
    )
    def test_message_names_the_argument(self, call, error, message):
        with pytest.raises(error, match=message):
            call()


class TestCompile:
    def test_opcheck(self, device):
        grid = small_grid(device)
        deltas = torch.randn(2, grid.num_anchors, 4, device=device, requires_grad=True)
        sizes = torch.tensor([[40.0, 50.0], [30.0, 56.0]], device=device)
        weights = [1.0, 1.0, 1.0, 1.0]
        opcheck(
            torch.ops.retinanet_ops.encode_boxes,
            (random_boxes(2, grid.num_anchors).to(device), *grid.arguments(), weights, 1.0),
        )
        opcheck(torch.ops.retinanet_ops.decode_boxes, (deltas, *grid.arguments(), weights, None, 4.0, 1.0, sizes))
        opcheck(torch.ops.retinanet_ops.clip_boxes, (random_boxes(2, 7).to(device).requires_grad_(), sizes))

    def test_compiles_in_one_graph(self, device):
        anchors, sizes = random_boxes(20).to(device), torch.tensor([[50, 60]], device=device)

        def function(deltas):
            boxes = ops.decode_boxes(deltas, anchors, image_sizes=sizes)
            return ops.encode_boxes(ops.clip_boxes(boxes + 1, (40, 40)) * 0.5 + anchors, anchors).sum()

        deltas = torch.randn(1, 20, 4).to(device).requires_grad_()
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(
            torch.autograd.grad(compiled(deltas), deltas), torch.autograd.grad(function(deltas), deltas)
        )
