"""IoU, GIoU, DIoU and CIoU of every pair of boxes."""

import pytest
import torch
from cases import DEGENERATE_BOXES, FLOATING, random_boxes, unaligned
from torch.library import opcheck

import retinanet_ops as ops
from retinanet_ops import reference

VARIANTS = ("generalized_box_iou", "distance_box_iou", "complete_box_iou")
ALL = ("box_iou", *VARIANTS)


class TestForward:
    @pytest.mark.parametrize("dtype", FLOATING)
    def test_equals_reference(self, device, dtype):
        a, b = random_boxes(37).to(device, dtype), random_boxes(130).to(device, dtype)
        iou = ops.box_iou(a, b)
        assert iou.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert torch.equal(iou, reference.box_iou(a, b))
        torch.testing.assert_close(iou.double(), reference.box_iou(a.double(), b.double()), rtol=1e-5, atol=1e-6)
        assert (iou > 0).any() and (iou == 0).any()

    @pytest.mark.parametrize(
        ("m", "n"), ((0, 5), (5, 0), (1, 1), (31, 127), (63, 128), (64, 129), (65, 257), (129, 30))
    )
    def test_sizes(self, device, m, n):
        a, b = random_boxes(m).to(device), random_boxes(n).to(device)
        assert torch.equal(ops.box_iou(a, b), reference.box_iou(a, b))

    @pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
    @pytest.mark.parametrize("n", (2, 3, 4, 255, 256, 258, 510, 511, 512, 513, 514, 516, 1025, 1028))
    def test_columns_beside_a_tile(self, device, n, dtype):
        # A CUDA block takes 512 columns in float32 and 256 in float64. Whole packs fit in a row if n is a multiple of 4
        # or 2.
        a, b = random_boxes(3).to(device, dtype), random_boxes(n).to(device, dtype)
        assert torch.equal(ops.box_iou(a, b), reference.box_iou(a, b))

    def test_blocks_that_take_several_tiles(self, device):
        rows = torch.arange(2 * 32 * 1024 + 5, dtype=torch.float32, device=device)[:, None]
        boxes1 = torch.cat((rows, rows, rows + 3, rows + 3), dim=1)
        boxes2 = boxes1[[7, 32 * 1024 + 7, len(rows) - 1]]
        assert torch.equal(ops.box_iou(boxes1, boxes2), reference.box_iou(boxes1, boxes2))

    @pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
    def test_bits_equal_torchvision(self, device, dtype):
        torchvision = pytest.importorskip("torchvision")
        a, b = random_boxes(200).to(device, dtype), random_boxes(300).to(device, dtype)
        assert torch.equal(ops.box_iou(a, b), torchvision.ops.box_iou(a, b))

    @pytest.mark.parametrize("name", VARIANTS)
    @pytest.mark.parametrize("dtype", FLOATING)
    def test_variants_equal_the_reference(self, device, dtype, name):
        a, b = random_boxes(37).to(device, dtype), random_boxes(130).to(device, dtype)
        actual, expected = getattr(ops, name)(a, b), getattr(reference, name)(a.double(), b.double())
        assert actual.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        tolerance = 1e-13 if dtype == torch.float64 else 2e-6
        torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)
        assert actual.min() < -0.2 and actual.max() > 0.3

    @pytest.mark.parametrize("name", VARIANTS)
    def test_variants_equal_torchvision(self, device, name):
        torchvision = pytest.importorskip("torchvision")
        a, b = random_boxes(200).to(device), random_boxes(300).to(device)
        expected = getattr(torchvision.ops, name)(a, b)
        torch.testing.assert_close(getattr(ops, name)(a, b), expected, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("name", VARIANTS)
    @pytest.mark.parametrize(("m", "n"), ((0, 5), (5, 0), (33, 129)))
    def test_sizes_of_variants(self, device, m, n, name):
        a, b = random_boxes(m).to(device), random_boxes(n).to(device)
        torch.testing.assert_close(getattr(ops, name)(a, b), getattr(reference, name)(a, b))

    def test_published_value(self, device):
        iou = ops.box_iou(
            torch.tensor([[0.0, 0, 32, 32]], device=device), torch.tensor([[8.0, 4, 40, 52]], device=device)
        )
        torch.testing.assert_close(iou.cpu(), torch.tensor([[0.35593220]]))


class TestGradient:
    @pytest.mark.once
    @pytest.mark.parametrize("name", ("box_iou", "generalized_box_iou", "distance_box_iou"))
    def test_gradcheck(self, device, name):
        a = random_boxes(4).to(device, torch.float64).requires_grad_()
        b = random_boxes(5).to(device, torch.float64).requires_grad_()
        assert torch.autograd.gradcheck(getattr(ops, name), (a, b))
        assert torch.autograd.gradgradcheck(getattr(ops, name), (a, b))

    @pytest.mark.parametrize("name", ALL)
    @pytest.mark.parametrize("dtype", FLOATING)
    @pytest.mark.parametrize(("m", "n"), ((0, 5), (5, 0), (1, 1), (5, 33), (33, 129), (3, 1100)))
    def test_equals_the_reference(self, device, name, dtype, m, n):
        # Corners on a lattice, so that many pairs share an edge or are equal.
        a, b = (random_boxes(k, size=20.0, max_side=9.0).round().to(device, dtype).requires_grad_() for k in (m, n))
        weight = torch.randn(m, n, device=device, dtype=torch.float64)
        actual = torch.autograd.grad((getattr(ops, name)(a, b) * weight).sum(), (a, b))
        a, b = (t.detach().double().requires_grad_() for t in (a, b))
        expected = torch.autograd.grad((getattr(reference, name)(a, b) * weight).sum(), (a, b))
        # Gradients of many pairs cancel.
        tolerance = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 2e-2, torch.bfloat16: 2e-1}[dtype]
        for grad, expected_grad in zip(actual, expected, strict=True):
            assert grad.dtype == dtype
            torch.testing.assert_close(grad.double(), expected_grad, rtol=tolerance, atol=tolerance)

    @pytest.mark.parametrize("name", ALL)
    def test_strides_of_the_incoming_gradient_do_not_matter(self, device, name):
        a, b = random_boxes(7).to(device).requires_grad_(), random_boxes(9).to(device).requires_grad_()
        values = getattr(ops, name)(a, b)
        for grad in (torch.ones((), device=device).expand(7, 9), torch.rand(9, 7, device=device).t()):
            actual = torch.autograd.grad(values, (a, b), grad, retain_graph=True)
            expected = torch.autograd.grad(values, (a, b), grad.contiguous(), retain_graph=True)
            torch.testing.assert_close(actual, expected, rtol=0, atol=0)

    @pytest.mark.parametrize("index", (0, 1))
    def test_one_argument_alone(self, device, index):
        boxes = [random_boxes(4).to(device), random_boxes(5).to(device)]
        boxes[index].requires_grad_()
        expected = [b.detach().requires_grad_() for b in boxes]
        ops.box_iou(*boxes).sum().backward()
        ops.box_iou(*expected).sum().backward()
        assert torch.equal(boxes[index].grad, expected[index].grad) and boxes[1 - index].grad is None

    def test_gradient_of_ciou_treats_alpha_as_a_constant(self, device):
        torchvision = pytest.importorskip("torchvision")
        a, b = (random_boxes(n).to(device, torch.float64).requires_grad_() for n in (4, 5))
        grads = torch.autograd.grad(ops.complete_box_iou(a, b).sum(), (a, b))
        expected = torch.autograd.grad(torchvision.ops.complete_box_iou(a, b).sum(), (a, b))
        for grad, expected_grad in zip(grads, expected, strict=True):
            torch.testing.assert_close(grad, expected_grad, rtol=1e-5, atol=1e-8)


class TestEdgeCases:
    def test_degenerate_pairs_are_zero(self, device):
        valid, degenerate = random_boxes(20).to(device), DEGENERATE_BOXES.to(device)
        assert (ops.box_iou(degenerate, valid) == 0).all() and (ops.box_iou(valid, degenerate) == 0).all()
        assert (ops.box_iou(degenerate, degenerate) == 0).all()
        assert torch.equal(ops.box_iou(degenerate, valid), reference.box_iou(degenerate, valid))

    def test_degenerate_pairs_have_finite_gradients(self, device):
        a, b = DEGENERATE_BOXES[:4].to(device).requires_grad_(), random_boxes(20).to(device).requires_grad_()
        for grad in torch.autograd.grad(ops.box_iou(a, b).sum(), (a, b)):
            assert grad.isfinite().all()
        a, b = DEGENERATE_BOXES.to(device).requires_grad_(), random_boxes(20).to(device).requires_grad_()
        for grad in torch.autograd.grad(ops.box_iou(a, b).sum(), (a, b)):
            assert (grad == 0).all()

    @pytest.mark.parametrize("name", VARIANTS)
    def test_variants_of_boxes_without_area_are_finite(self, device, name):
        flat = torch.tensor([[5.0, 5, 5, 9], [5, 5, 9, 5], [5, 5, 5, 5], [7, 7, 7, 7]], device=device)
        # Each of these boxes differs from the first or the second flat box in one coordinate.
        others = torch.tensor([[5.0, 3, 5, 9], [5, 5, 5, 8], [3, 5, 9, 5], [5, 5, 8, 5]], device=device)
        boxes = torch.cat([flat, others, random_boxes(20).to(device)]).requires_grad_()
        values = getattr(ops, name)(boxes, boxes)
        torch.testing.assert_close(values.diagonal(), torch.ones_like(values[0]))
        assert values.isfinite().all() and values[2, 3] < 0
        assert torch.autograd.grad(values.sum(), boxes)[0].isfinite().all()
        torch.testing.assert_close(values, getattr(reference, name)(boxes, boxes))

    @pytest.mark.parametrize("name", VARIANTS)
    def test_nan_stays_in_its_pairs(self, device, name):
        a, b = random_boxes(3).to(device), random_boxes(4).to(device)
        a[1, 2] = torch.nan
        nan = getattr(ops, name)(a, b).isnan()
        assert nan[1].all() and nan.sum() == 4

    def test_negative_coordinates_and_identical_boxes(self, device):
        a = random_boxes(30).to(device) - 200
        assert (ops.box_iou(a, a).diagonal() == 1).all()

    def test_unaligned(self, device):
        a, b = random_boxes(9).to(device), random_boxes(7).to(device)
        assert torch.equal(ops.box_iou(unaligned(a), b[:, [0, 1, 2, 3]].t().contiguous().t()), ops.box_iou(a, b))


def reference_grad(boxes1, boxes2):
    """Return the gradient of the second boxes, from the reference in float64."""
    boxes2 = boxes2.detach().double().requires_grad_()
    return torch.autograd.grad(reference.generalized_box_iou(boxes1.double(), boxes2).sum(), boxes2)[0].float()


class TestIntegers:
    @pytest.mark.parametrize("name", ALL)
    @pytest.mark.parametrize("dtype", (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64))
    def test_equal_those_of_floats(self, device, name, dtype):
        a, b = (random_boxes(n, size=100.0).round().to(device) for n in (17, 12))
        op, expected = getattr(ops, name), getattr(ops, name)(a.double(), b.double()).float()
        for first, second in ((a.to(dtype), b.to(dtype)), (a.to(dtype), b), (a, b.to(dtype))):
            result = op(first, second)
            assert result.dtype == torch.float32 and torch.equal(result, expected)
            assert torch.equal(result, getattr(reference, name)(first, second))
        assert op(a.to(dtype), b.double()).dtype == torch.float64

    def test_areas_beyond_int32(self, device):
        """In int32 arithmetic, these areas overflow; in float32, the sides are rounded."""
        side = 2**24 + 1
        boxes = torch.tensor([[0, 0, side, side], [1, 0, side, side]], dtype=torch.int32, device=device)
        expected = torch.tensor((side - 1) / side, dtype=torch.float64).float().item()
        assert ops.box_iou(boxes, boxes).tolist() == [[1, expected], [expected, 1]] and expected < 1

    def test_gradient_of_the_floating_boxes(self, device):
        a, b = (random_boxes(n, size=100.0).round().to(device) for n in (5, 4))
        a.requires_grad_()
        for first in (b.int(), b):
            (grad,) = torch.autograd.grad(ops.generalized_box_iou(first, a).sum(), a)
            assert grad.dtype == torch.float32 and grad.abs().sum() > 0
            torch.testing.assert_close(grad, reference_grad(first, a))

    def test_one_graph(self, device):
        a = random_boxes(5, size=100.0).round().int().to(device)
        compiled = torch.compile(ops.box_iou, fullgraph=True, backend="aot_eager", dynamic=True)
        assert torch.equal(compiled(a, a), ops.box_iou(a, a))


class TestErrors:
    def test_messages(self):
        with pytest.raises(ValueError, match=r"box_iou: boxes2 must have shape \[..., N, 4\], got \[2, 3, 5\]"):
            ops.box_iou(torch.zeros(2, 4), torch.zeros(2, 3, 5))
        with pytest.raises(ValueError, match=r"box_iou: the leading dimensions of .* \[2, 3, 4\] and \[3, 5, 4\]"):
            ops.box_iou(torch.zeros(2, 3, 4), torch.zeros(3, 5, 4))
        with pytest.raises(TypeError, match="box_iou: boxes1 must be a floating or integer tensor, got torch.bool"):
            ops.box_iou(torch.zeros(2, 4).bool(), torch.zeros(2, 4))
        with pytest.raises(ValueError, match=r"generalized_box_iou: boxes1 must have shape \[..., M, 4\], got \[4\]"):
            ops.generalized_box_iou(torch.zeros(4), torch.zeros(2, 4))
        with pytest.raises(RuntimeError, match="kind must be iou, giou, diou or ciou, got x"):
            torch.ops.retinanet_ops.box_iou(torch.zeros(2, 4), torch.zeros(2, 4), "x")


class TestCompile:
    @pytest.mark.parametrize(("name", "kind"), list(zip(ALL, ("iou", "giou", "diou", "ciou"), strict=True)))
    def test_opcheck_and_one_graph(self, device, name, kind):
        a, b = random_boxes(4).to(device).requires_grad_(), random_boxes(6).to(device)
        opcheck(torch.ops.retinanet_ops.box_iou, (a, b, kind))
        grad = torch.randn(len(a), len(b), device=device, requires_grad=True)
        opcheck(torch.ops.retinanet_ops.box_iou_backward, (grad, a, b, kind))

        def function(a):
            return (getattr(ops, name)(a + 1, b) * 2).sum()

        compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
        torch.testing.assert_close(torch.autograd.grad(compiled(a), a), torch.autograd.grad(function(a), a))
