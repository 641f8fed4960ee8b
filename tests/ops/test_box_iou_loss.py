"""GIoU, DIoU and CIoU losses of pairs of boxes."""

import math

import pytest
import torch
from cases import DEGENERATE_BOXES, FLOATING, random_boxes, unaligned
from launches import assert_moves_at_most
from torch._dynamo import config
from torch.library import opcheck

import retinanet_ops as ops
from retinanet_ops import reference

KINDS = {
    "giou": ("generalized_box_iou_loss", "generalized_box_iou"),
    "diou": ("distance_box_iou_loss", "distance_box_iou"),
    "ciou": ("complete_box_iou_loss", "complete_box_iou"),
}
LOSSES = tuple(name for name, _ in KINDS.values())


def pairs(count, device, dtype=torch.float32, lattice=False):
    """Return predictions and ground truth; on a lattice, many pairs share edges or are equal."""
    gt = random_boxes(count, size=100.0, max_side=40.0)
    boxes = gt + torch.randn(count, 4) * 4
    boxes[::5] = random_boxes(len(boxes[::5]), size=100.0, max_side=40.0)
    if lattice:
        boxes, gt = (boxes / 8).round() * 8, (gt / 8).round() * 8
    return boxes.to(device, dtype), gt.to(device, dtype)


class TestForward:
    @pytest.mark.parametrize("name", LOSSES)
    @pytest.mark.parametrize("dtype", FLOATING)
    def test_equals_the_reference(self, device, dtype, name):
        a, b = pairs(300, device, dtype)
        actual, expected = getattr(ops, name)(a, b), getattr(reference, name)(a.double(), b.double())
        assert actual.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        tolerance = 1e-13 if dtype == torch.float64 else 2e-6
        torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)
        assert actual.min() < 0.3 and actual.max() > 1.2

    @pytest.mark.parametrize(("loss", "measure"), KINDS.values(), ids=LOSSES)
    def test_is_one_minus_the_diagonal_of_the_matrix(self, device, loss, measure):
        a, b = pairs(60, device, lattice=True)
        expected = 1 - getattr(ops, measure)(a, b).diagonal()
        torch.testing.assert_close(getattr(ops, loss)(a, b), expected, rtol=0, atol=2e-6)

    @pytest.mark.parametrize("name", LOSSES)
    @pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
    @pytest.mark.parametrize("count", (0, 1, 31, 127, 128, 129, 257, 5000))
    def test_sizes(self, device, count, dtype, name):
        a, b = pairs(count, device, dtype)
        losses = getattr(ops, name)(a, b)
        assert losses.shape == (count,)
        torch.testing.assert_close(losses, getattr(reference, name)(a, b))

    def test_values_worked_out_by_hand(self, device):
        # Boxes of 32 x 32 and 32 x 48 whose enclosing box has 40 x 52: IoU 672 / 1888, uncovered 192 of 2080.
        a = torch.tensor([[0.0, 0, 32, 32]], device=device)
        b = torch.tensor([[8.0, 4, 40, 52]], device=device)
        assert ops.generalized_box_iou_loss(a, b).item() == pytest.approx(1 - 672 / 1888 + 192 / 2080)
        # The centres are 8 and 12 pixels apart, and the diagonal has a length of sqrt(40^2 + 52^2).
        assert ops.distance_box_iou_loss(a, b).item() == pytest.approx(1 - 672 / 1888 + 208 / 4304)
        # The diagonals have angles of atan(1) and atan(32 / 48).
        v = 4 / math.pi**2 * (math.pi / 4 - math.atan(2 / 3)) ** 2
        expected = 1 - 672 / 1888 + 208 / 4304 + v**2 / (1 - 672 / 1888 + v)
        assert ops.complete_box_iou_loss(a, b).item() == pytest.approx(expected)


class TestReduction:
    @pytest.mark.parametrize("name", LOSSES)
    @pytest.mark.parametrize("count", (0, 1, 130))
    def test_sum_and_mean(self, device, name, count):
        loss, (a, b) = getattr(ops, name), pairs(count, device)
        losses = loss(a, b)
        torch.testing.assert_close(loss(a, b, "sum"), losses.sum())
        torch.testing.assert_close(loss(a, b, reduction="mean"), losses.sum() / max(count, 1))
        a.requires_grad_()
        for reduction, scale in (("sum", 1.0), ("mean", 1 / max(count, 1))):
            (actual,) = torch.autograd.grad(loss(a, b, reduction), a)
            (expected,) = torch.autograd.grad((loss(a, b) * scale).sum(), a)
            torch.testing.assert_close(actual, expected)

    def test_no_pairs_in_a_graph(self, device):
        def mean_of(a, b, mask):
            return ops.distance_box_iou_loss(a[mask], b[mask], "mean")

        a, b = pairs(9, device)
        compiled = torch.compile(mean_of, fullgraph=True, backend="aot_eager", dynamic=True)
        some, none = torch.arange(9, device=device) % 2 == 0, torch.zeros(9, dtype=torch.bool, device=device)
        with config.patch(capture_dynamic_output_shape_ops=True):
            for mask in (some, none):
                torch.testing.assert_close(compiled(a, b, mask), mean_of(a, b, mask))

    def test_no_pairs_in_an_exported_program(self, device):
        class Loss(torch.nn.Module):
            def forward(self, a, b):
                return ops.generalized_box_iou_loss(a, b, "mean")

        a, b = pairs(9, device)
        dim = torch.export.Dim("n", min=0)
        program = torch.export.export(Loss(), (a, b), dynamic_shapes=({0: dim}, {0: dim})).module()
        for count in (9, 3, 0):
            torch.testing.assert_close(program(a[:count], b[:count]), Loss()(a[:count], b[:count]))

    def test_unknown_reductions_of_the_reference(self):
        for loss in (reference.generalized_box_iou_loss, reference.sigmoid_focal_loss):
            with pytest.raises(ValueError, match="loss: reduction must be none, sum or mean, got 'max'"):
                loss(torch.zeros(1, 4), torch.zeros(1, 4), reduction="max")


class TestGradient:
    @pytest.mark.once
    @pytest.mark.parametrize("name", LOSSES[:2])
    def test_gradcheck(self, device, name):
        a, b = (boxes.requires_grad_() for boxes in pairs(6, device, torch.float64))
        assert torch.autograd.gradcheck(getattr(ops, name), (a, b))
        assert torch.autograd.gradgradcheck(getattr(ops, name), (a, b))

    @pytest.mark.parametrize("name", LOSSES)
    @pytest.mark.parametrize("dtype", FLOATING)
    @pytest.mark.parametrize("lattice", (False, True))
    def test_equals_the_reference(self, device, name, dtype, lattice):
        a, b = (boxes.requires_grad_() for boxes in pairs(300, device, dtype, lattice))
        weight = torch.randn(300, device=device, dtype=torch.float64)
        actual = torch.autograd.grad((getattr(ops, name)(a, b) * weight).sum(), (a, b))
        a, b = (t.detach().double().requires_grad_() for t in (a, b))
        expected = torch.autograd.grad((getattr(reference, name)(a, b) * weight).sum(), (a, b))
        tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
        for grad, expected_grad in zip(actual, expected, strict=True):
            assert grad.dtype == dtype
            torch.testing.assert_close(grad.double(), expected_grad, rtol=tolerance, atol=tolerance)

    @pytest.mark.parametrize("index", (0, 1))
    @pytest.mark.parametrize("name", LOSSES)
    def test_one_argument_alone(self, device, name, index):
        boxes = list(pairs(4, device))
        boxes[index].requires_grad_()
        expected = [b.detach().requires_grad_() for b in boxes]
        getattr(ops, name)(*boxes).sum().backward()
        getattr(ops, name)(*expected).sum().backward()
        assert torch.equal(boxes[index].grad, expected[index].grad) and boxes[1 - index].grad is None

    @pytest.mark.parametrize("name", LOSSES)
    def test_strides_of_the_incoming_gradient_do_not_matter(self, device, name):
        a, b = (boxes.requires_grad_() for boxes in pairs(300, device))
        losses = getattr(ops, name)(a, b)
        for grad in (torch.full((), 3.0, device=device).expand(300), torch.rand(300, 3, device=device)[:, 1]):
            actual = torch.autograd.grad(losses, (a, b), grad, retain_graph=True)
            expected = torch.autograd.grad(losses, (a, b), grad.contiguous(), retain_graph=True)
            torch.testing.assert_close(actual, expected, rtol=0, atol=0)


class TestShapes:
    @pytest.mark.parametrize("name", LOSSES)
    @pytest.mark.parametrize(
        ("shape1", "shape2"),
        (((4,), (4,)), ((2, 3, 4), (2, 3, 4)), ((4,), (5, 4)), ((3, 1, 4), (2, 4)), ((0, 4), (4,))),
    )
    def test_leading_dimensions_broadcast(self, device, name, shape1, shape2):
        a, b = (random_boxes(*shape[:-1]).to(device).requires_grad_() for shape in (shape1, shape2))
        actual, expected = getattr(ops, name)(a, b), getattr(reference, name)(a, b)
        torch.testing.assert_close(actual, expected)
        weight = torch.randn_like(expected)
        grads = [torch.autograd.grad((losses * weight).sum(), (a, b)) for losses in (actual, expected)]
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)

    def test_strided_and_unaligned(self, device):
        a, b = pairs(9, device)
        expected = ops.complete_box_iou_loss(a, b)
        assert torch.equal(ops.complete_box_iou_loss(unaligned(a), b.t().contiguous().t()), expected)

    @pytest.mark.parametrize("name", LOSSES)
    def test_integers_are_computed_exactly(self, device, name):
        a, b = (boxes.round() for boxes in pairs(20, device))
        expected = getattr(ops, name)(a.double(), b.double()).float()
        for first, second in ((a.int(), b.long()), (a, b.int()), (a.int(), b)):
            assert torch.equal(getattr(ops, name)(first, second), expected)


class TestEdgeCases:
    @pytest.mark.parametrize("name", LOSSES)
    def test_boxes_without_area_are_finite(self, device, name):
        flat = torch.tensor([[5.0, 5, 5, 9], [5, 5, 9, 5], [5, 5, 5, 5], [7, 7, 7, 7]], device=device)
        a, b = torch.cat((flat, flat)).requires_grad_(), torch.cat((flat, flat.roll(1, 0)))
        losses = getattr(ops, name)(a, b)
        assert (losses[:4] == 0).all() and losses.isfinite().all() and (losses[4:] > 0.9).all()
        torch.testing.assert_close(losses, getattr(reference, name)(a, b))
        assert torch.autograd.grad(losses.sum(), a)[0].isfinite().all()

    @pytest.mark.parametrize("name", LOSSES)
    def test_odd_boxes_equal_the_reference(self, device, name):
        odd = DEGENERATE_BOXES.to(device)
        for first, second in ((odd, random_boxes(len(odd)).to(device)), (odd, odd.flip(0))):
            losses = getattr(ops, name)(first, second)
            torch.testing.assert_close(losses, getattr(reference, name)(first, second), equal_nan=True)

    @pytest.mark.parametrize("name", LOSSES)
    def test_nan_stays_in_its_pair(self, device, name):
        a, b = pairs(300, device)
        a[130, 2] = torch.nan
        a.requires_grad_()
        losses = getattr(ops, name)(a, b)
        assert losses.isnan().nonzero().tolist() == [[130]]
        (grad,) = torch.autograd.grad(losses[torch.arange(300, device=device) != 130].sum(), a)
        assert grad[:130].isfinite().all() and grad[131:].isfinite().all()


class TestErrors:
    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            (
                (torch.zeros(2, 5), torch.zeros(2, 4)),
                ValueError,
                r"distance_box_iou_loss: boxes1 must have shape \[..., 4\], got \[2, 5\]",
            ),
            ((torch.zeros(2, 4), torch.zeros(())), ValueError, r"boxes2 must have shape \[..., 4\], got \[\]"),
            (
                (torch.zeros(2, 4), torch.zeros(3, 4)),
                ValueError,
                r"the leading dimensions of boxes1 and boxes2 must broadcast, got shapes \[2, 4\] and \[3, 4\]",
            ),
            ((torch.zeros(2, 4).bool(), torch.zeros(2, 4)), TypeError, "boxes1 must be a floating or integer tensor"),
            ((torch.zeros(2, 4), [[0, 0, 1, 1]]), TypeError, "boxes2 must be a tensor, got list"),
            (
                (torch.zeros(2, 4), torch.zeros(2, 4), "max"),
                ValueError,
                "reduction must be none, sum or mean, got 'max'",
            ),
            ((torch.zeros(2, 4), torch.zeros(2, 4), "sum", -1), ValueError, "eps must not be negative, got -1.0"),
        ],
    )
    def test_message_names_the_argument(self, arguments, error, message):
        with pytest.raises(error, match=message):
            ops.distance_box_iou_loss(*arguments)

    def test_direct_call_of_the_op(self, device):
        boxes, op = torch.zeros(3, 4, device=device), torch.ops.retinanet_ops.box_iou_loss
        for arguments, message in (
            ((boxes, boxes, "iou"), "box_iou_loss: kind must be giou, diou or ciou, got iou"),
            ((boxes[:2], boxes, "giou"), r"box_iou_loss: boxes2 must have shape \[2, 4\], got \[3, 4\]"),
            ((boxes[0], boxes, "giou"), r"box_iou_loss: boxes1 must have shape \[N, 4\], got \[4\]"),
            ((boxes, boxes.double(), "giou"), "box_iou_loss: boxes2 must be Float, got Double"),
        ):
            with pytest.raises(RuntimeError, match=message):
                op(*arguments)
        backward = torch.ops.retinanet_ops.box_iou_loss_backward
        for grad, message in (
            (torch.zeros(2, device=device), r"box_iou_loss_backward: grad must have shape \[3\], got \[2\]"),
            (torch.zeros(3, device=device).double(), "box_iou_loss_backward: grad must be Float, got Double"),
        ):
            with pytest.raises(RuntimeError, match=message):
                backward(grad, boxes, boxes, "giou")


class TestCompile:
    @pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, (name, _) in KINDS.items()])
    def test_opcheck_and_one_graph(self, device, kind, name):
        a, b = pairs(6, device)
        a.requires_grad_()
        opcheck(torch.ops.retinanet_ops.box_iou_loss, (a, b, kind))
        grad = torch.randn(len(a), device=device, requires_grad=True)
        opcheck(torch.ops.retinanet_ops.box_iou_loss_backward, (grad, a, b, kind))

        def function(a):
            return getattr(ops, name)(a + 1, b, "mean")

        compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
        torch.testing.assert_close(torch.autograd.grad(compiled(a), a), torch.autograd.grad(function(a), a))


@pytest.mark.backends("emulated")
class TestLaunches:
    @pytest.mark.parametrize("name", LOSSES)
    def test_reads_each_box_once(self, tracing, name):
        a, b = pairs(20_000, "cpu")
        getattr(ops, name)(a.requires_grad_(), b, "sum").backward()
        forward, backward = tracing.take_launches()
        assert_moves_at_most([forward], read=32 * len(a), written=4 * len(a))
        assert_moves_at_most([backward], read=32 * len(a) + 4, written=16 * len(a))

    def test_launches_do_not_depend_on_the_data(self, emulator):
        logs = []
        for a in (random_boxes(700), torch.zeros(700, 4), torch.full((700, 4), torch.nan)):
            ops.generalized_box_iou_loss(a.requires_grad_(), a.flip(0).detach()).sum().backward()
            logs.append([repr(launch) for launch in emulator.take_launches()])
        assert len(logs[0]) == 2 and logs[0] == logs[1] == logs[2]
