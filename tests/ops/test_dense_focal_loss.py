"""Values and gradients of `dense_focal_loss`."""

import math

import pytest
import torch
from cases import FLOATING, RTOL, assert_close
from focal_cases import GRIDS, LAYOUTS, class_labels, heads
from torch.library import opcheck

import retinanet_ops as ops
from retinanet_ops import reference
from retinanet_ops.reference._rows import rows_of


def loss_and_grads(function, levels, labels, num_classes, **options):
    loss = function(levels, labels, num_classes, **options)
    weight = torch.linspace(0.5, 1.5, len(loss), dtype=loss.dtype, device=loss.device)
    return loss.detach(), torch.autograd.grad(loss, levels, weight)


def oracle(levels, labels, num_classes, **options):
    wide = [level.detach().double().requires_grad_() for level in levels]
    return loss_and_grads(reference.dense_focal_loss, wide, labels, num_classes, **options)


class TestForwardAndGradient:
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("num_classes", (1, 5, 23))
    @pytest.mark.parametrize("dtype", FLOATING)
    def test_equals_reference(self, device, dtype, num_classes, layout):
        levels = heads(num_classes, dtype=dtype, device=device, layout=layout)
        labels = class_labels(num_classes, device=device)
        loss, grads = loss_and_grads(ops.dense_focal_loss, levels, labels, num_classes)
        expected, expected_grads = oracle(levels, labels, num_classes)
        assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert_close(loss, expected)
        for level, grad, expected_grad in zip(levels, grads, expected_grads, strict=True):
            assert grad.dtype == dtype and grad.stride() == level.stride()
            assert_close(grad, expected_grad)

    @pytest.mark.parametrize("gamma", (0.0, 0.5, 1.0, 1.7, 3.0))
    @pytest.mark.parametrize("alpha", (-1.0, 0.6))
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_parameters(self, device, layout, alpha, gamma):
        levels, labels = heads(4, device=device, layout=layout), class_labels(4, device=device)
        loss, grads = loss_and_grads(ops.dense_focal_loss, levels, labels, 4, alpha=alpha, gamma=gamma)
        expected, expected_grads = oracle(levels, labels, 4, alpha=alpha, gamma=gamma)
        assert_close(loss, expected)
        for grad, expected_grad in zip(grads, expected_grads, strict=True):
            assert_close(grad, expected_grad)

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16))
    def test_weight_and_label_smoothing(self, device, dtype, layout):
        levels, labels = heads(4, dtype=dtype, device=device, layout=layout), class_labels(4, device=device)
        options = {"anchor_weight": torch.rand(labels.shape).to(device), "label_smoothing": 0.1}
        loss, grads = loss_and_grads(ops.dense_focal_loss, levels, labels, 4, **options)
        expected, expected_grads = oracle(levels, labels, 4, **options)
        assert_close(loss, expected)
        for grad, expected_grad in zip(grads, expected_grads, strict=True):
            # The gradient of a soft target changes sign. Near its zero, the error is relative to its terms.
            torch.testing.assert_close(
                grad.double(), expected_grad, rtol=2 * RTOL[dtype], atol=2 * min(RTOL[dtype], RTOL[torch.float32])
            )

    @pytest.mark.parametrize("num_classes", (7, 9, 21))  # packs of 2, 4 and 8 logits reach into the next anchor
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16))
    def test_weights_of_class_ids(self, device, dtype, layout, num_classes):
        levels = heads(num_classes, dtype=dtype, device=device, layout=layout)
        labels = class_labels(num_classes, device=device)
        options = {"anchor_weight": torch.rand(labels.shape).to(device)}
        loss, grads = loss_and_grads(ops.dense_focal_loss, levels, labels, num_classes, **options)
        expected, expected_grads = oracle(levels, labels, num_classes, **options)
        assert_close(loss, expected, scale=2)
        for grad, expected_grad in zip(grads, expected_grads, strict=True):
            assert_close(grad, expected_grad, scale=2)

    @pytest.mark.parametrize("incoming", (math.inf, math.nan))
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("dtype", FLOATING)
    def test_incoming_gradients_that_are_not_finite(self, device, dtype, layout, incoming):
        # Ignored anchors have gradient 0 even so, and the other image is not affected.
        levels = [level.detach().clamp(-9, 9).requires_grad_() for level in heads(80, dtype=dtype, layout=layout)]
        labels = class_labels(80)
        weight = torch.tensor([incoming, 1], dtype=torch.float64)
        on_device = [level.detach().to(device).requires_grad_() for level in levels]
        loss = ops.dense_focal_loss(on_device, labels.to(device), 80)
        grads = torch.autograd.grad(loss, on_device, weight.to(loss))
        wide = [level.detach().double().requires_grad_() for level in levels]
        expected = torch.autograd.grad(reference.dense_focal_loss(wide, labels, 80), wide, weight)
        for grad, wanted in zip(grads, expected, strict=True):
            assert_close(grad[1], wanted[1])
            assert torch.equal(grad[0].cpu().double().nan_to_num(2, 1, -1), wanted[0].nan_to_num(2, 1, -1))

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_blocks_that_take_several_tiles(self, device, layout):
        # From 3,584 tiles on, a block of the CUDA kernel takes two. Here each level of each image is one tile.
        sizes = {"images": 512, "grids": ((2, 2), (1, 2), *[(1, 1)] * 5), "per_cell": 1}
        levels = heads(3, **sizes, device=device, layout=layout)
        labels = class_labels(3, **sizes, device=device)
        loss, grads = loss_and_grads(ops.dense_focal_loss, levels, labels, 3)
        expected, expected_grads = oracle(levels, labels, 3)
        assert_close(loss, expected)
        for grad, expected_grad in zip(grads, expected_grads, strict=True):
            assert_close(grad, expected_grad)

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_equals_sigmoid_focal_loss_of_the_rows(self, device, layout):
        levels, labels = heads(6, device=device, layout=layout), class_labels(6, device=device)
        rows = rows_of(levels, 6)
        each = ops.sigmoid_focal_loss(rows, labels)
        assert_close(ops.dense_focal_loss(levels, labels, 6), each.detach().double().sum((1, 2)))
        got = torch.autograd.grad(ops.dense_focal_loss(levels, labels, 6).sum(), levels)
        expected = torch.autograd.grad(each.sum(), levels)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))

    @pytest.mark.once
    @pytest.mark.parametrize("options", ({}, {"label_smoothing": 0.2}, {"gamma": 1.5}))
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_gradcheck(self, device, layout, options):
        grids = ((2, 2), (1, 1))
        levels = heads(2, images=2, grids=grids, per_cell=2, dtype=torch.float64, device=device, layout=layout)
        levels = [(level.detach() / 8).requires_grad_() for level in levels]
        labels = class_labels(2, grids=grids, per_cell=2, device=device)
        weight = torch.rand(labels.shape, dtype=torch.float64).to(device).requires_grad_()

        def loss(weight, *levels):
            return ops.dense_focal_loss(levels, labels, 2, anchor_weight=weight, **options)

        assert torch.autograd.gradcheck(loss, (weight, *levels))
        assert torch.autograd.gradgradcheck(loss, (weight, *levels))

    def test_gradient_of_some_levels_only(self, device):
        levels, labels = heads(3, device=device), class_labels(3, device=device)
        expected = torch.autograd.grad(ops.dense_focal_loss(levels, labels, 3).sum(), levels[1])[0]
        fixed = [level.detach() if i != 1 else level for i, level in enumerate(levels)]
        ops.dense_focal_loss(fixed, labels, 3).sum().backward()
        assert torch.equal(levels[1].grad, expected) and levels[0].grad is None

    def test_gradient_is_scaled_before_it_is_rounded(self, device):
        levels = [torch.full((1, 2, 3, 3), -7.0, dtype=torch.float16, device=device, requires_grad=True)]
        labels = torch.full((1, 9), -1, device=device)
        (ops.dense_focal_loss(levels, labels, 2) * 65536).sum().backward()
        wide = [levels[0].detach().double().requires_grad_()]
        (reference.dense_focal_loss(wide, labels, 2) * 65536).sum().backward()
        assert levels[0].grad.abs().min() > 0
        assert_close(levels[0].grad, wide[0].grad)

    def test_second_backward_and_retained_graph(self, device):
        levels, labels = heads(3, device=device), class_labels(3, device=device)
        loss = ops.dense_focal_loss(levels, labels, 3).sum()
        first = torch.autograd.grad(loss, levels, retain_graph=True)
        second = torch.autograd.grad(loss, levels)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


class TestEdgeCases:
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("dtype", FLOATING)
    def test_layouts_do_not_change_gradients(self, device, dtype, layout):
        grids = ((7, 9), (4, 8))
        levels = heads(5, grids=grids, dtype=dtype, device=device)
        labels = class_labels(5, grids=grids, device=device)
        loss, grads = loss_and_grads(ops.dense_focal_loss, levels, labels, 5)

        def shifted(level):  # the same values, one element after an aligned address
            buffer = level.new_empty(level.numel() + 1)
            n, c, h, w = level.shape
            view = (
                buffer[1:].view(n, h, w, c).permute(0, 3, 1, 2)
                if layout == LAYOUTS[1]
                else buffer[1:].view(level.shape)
            )
            return view.copy_(level)

        others = (
            [level.detach().contiguous(memory_format=layout) for level in levels],
            [shifted(level.detach()) for level in levels],
            [level.detach().repeat_interleave(2, dim=3)[..., ::2] for level in levels],
            # Levels may have different layouts.
            [level.detach().contiguous(memory_format=LAYOUTS[i]) for i, level in enumerate(levels)],
        )
        for other in others:
            other = [level.requires_grad_() for level in other]
            other_loss, other_grads = loss_and_grads(ops.dense_focal_loss, other, labels, 5)
            assert all(torch.equal(a, b) for a, b in zip(other_grads, grads, strict=True))
            assert_close(other_loss, loss.double())

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_ignored_and_weightless_anchors_are_zero_whatever_their_logits(self, device, layout):
        levels = [torch.full((1, 4, 2, 2), torch.nan, device=device).contiguous(memory_format=layout).requires_grad_()]
        ignored = torch.full((1, 4), -2, device=device)
        loss, grads = loss_and_grads(ops.dense_focal_loss, levels, ignored, 4)
        assert loss == 0 and (grads[0] == 0).all()
        positive = torch.zeros((1, 4), dtype=torch.int64, device=device)
        loss, grads = loss_and_grads(
            ops.dense_focal_loss, levels, positive, 4, anchor_weight=torch.zeros(1, 4, device=device)
        )
        assert loss == 0 and (grads[0] == 0).all()
        assert ops.dense_focal_loss(levels, positive, 4).isnan().all()
        invalid = torch.full((1, 4), 99, device=device)
        loss, grads = loss_and_grads(
            ops.dense_focal_loss, levels, invalid, 4, anchor_weight=torch.zeros(1, 4, device=device)
        )
        assert loss == 0 and (grads[0] == 0).all()

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("label", (-3, 4, 2**31 - 1, 2**31, 2**32, -(2**33)))
    def test_label_out_of_range_gives_nan_in_its_image_and_anchor(self, device, label, layout):
        levels = [torch.zeros(2, 4, 3, 3, device=device).contiguous(memory_format=layout).requires_grad_()]
        labels = torch.full((2, 9), -1, device=device)
        labels[1, 5] = label
        loss, grads = loss_and_grads(ops.dense_focal_loss, levels, labels, 4)
        assert loss.isnan().tolist() == [False, True]
        expected = torch.zeros(2, 4, 3, 3, dtype=torch.bool)
        expected[1, :, 1, 2] = True
        assert torch.equal(grads[0].isnan().cpu(), expected)

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_nan_and_infinite_logits_affect_only_themselves(self, device, layout):
        x = torch.zeros(2, 4, 3, 3)
        x[0, 2, 1, 1], x[1, 0, 0, 0], x[1, 3, 2, 2] = torch.nan, torch.inf, -torch.inf
        levels = [x.to(device).contiguous(memory_format=layout).requires_grad_()]
        labels = torch.full((2, 9), -1, device=device)
        loss, grads = loss_and_grads(ops.dense_focal_loss, levels, labels, 4)
        assert loss[0].isnan() and loss[1] == torch.inf
        assert torch.equal(grads[0].isnan().cpu(), x.isnan())
        assert grads[0].cpu()[1, 3, 2, 2] == 0 and grads[0].cpu()[1, 0, 0, 0] == 0.75 * 1.5

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("gamma", (1.5, 2.0))
    @pytest.mark.parametrize(("alpha", "label"), ((0.0, 0), (1.0, -1)))
    def test_infinite_logits_of_alpha_weight_zero(self, device, alpha, label, gamma, layout):
        x = torch.full((1, 2, 1, 2), torch.inf, device=device).contiguous(memory_format=layout).requires_grad_()
        x.data[0, :, 0, 1] = -torch.inf
        labels = torch.full((1, 4), label, device=device)
        loss, grads = loss_and_grads(ops.dense_focal_loss, [x], labels, 1, alpha=alpha, gamma=gamma)
        assert loss == 0 and (grads[0] == 0).all()
        assert reference.dense_focal_loss([x], labels, 1, alpha=alpha, gamma=gamma) == 0

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_empty(self, device, layout):
        for images, grids in ((0, GRIDS), (2, ((0, 5),)), (2, ((2, 3), (0, 0)))):
            levels = heads(3, images=images, grids=grids, device=device, layout=layout)
            labels = class_labels(3, images=images, grids=grids, device=device)
            loss = ops.dense_focal_loss(levels, labels, 3)
            assert loss.shape == (images,)
            grads = torch.autograd.grad(loss.sum(), levels)
            assert [g.shape for g in grads] == [level.shape for level in levels]
            if grids == ((0, 5),):
                assert (loss == 0).all()
            weight = torch.rand(labels.shape).to(device).requires_grad_()
            loss = ops.dense_focal_loss(levels, labels, 3, anchor_weight=weight)
            torch.testing.assert_close(loss, reference.dense_focal_loss(levels, labels, 3, anchor_weight=weight))
            grads = torch.autograd.grad(loss.sum(), (*levels, weight), create_graph=True)
            assert [g.shape for g in grads] == [*(level.shape for level in levels), weight.shape]
            torch.autograd.grad(sum(g.sum() for g in grads), levels)

    def test_second_derivative_of_the_operator_itself(self, device):
        levels, labels = heads(3, dtype=torch.float64, device=device), class_labels(3, device=device)

        def second(function):
            grads = torch.autograd.grad(function(levels, labels).sum(), levels, create_graph=True)
            return torch.autograd.grad(sum((g**2).sum() for g in grads), levels)

        actual = second(
            lambda levels, labels: torch.ops.retinanet_ops.dense_focal_loss(levels, labels, None, 3, 0.25, 2.0, 0.0)
        )
        for grad, wanted in zip(actual, second(lambda *args: ops.dense_focal_loss(*args, 3)), strict=True):
            torch.testing.assert_close(grad, wanted)

    def test_gradient_of_weights_at_zero(self, device):
        levels, labels = heads(3, dtype=torch.float64, device=device), class_labels(3, device=device)
        weights = [torch.full(labels.shape, w, dtype=torch.float64, device=device, requires_grad=True) for w in (0, 1)]
        at_zero, at_one = (
            torch.autograd.grad(ops.dense_focal_loss(levels, labels, 3, anchor_weight=w).sum(), w)[0] for w in weights
        )
        torch.testing.assert_close(at_zero, at_one, rtol=1e-12, atol=0)

    def test_weights_of_ignored_anchors_are_not_used(self, device):
        levels, labels = heads(3, device=device), class_labels(3, device=device)
        weight = torch.rand(labels.shape).to(device)
        expected, expected_grads = loss_and_grads(ops.dense_focal_loss, levels, labels, 3, anchor_weight=weight)
        for value in (float("nan"), float("inf")):
            odd = torch.where(labels == -2, value, weight)
            loss, grads = loss_and_grads(ops.dense_focal_loss, levels, labels, 3, anchor_weight=odd)
            assert torch.equal(loss, expected)
            assert all(map(torch.equal, grads, expected_grads))
            torch.testing.assert_close(reference.dense_focal_loss(levels, labels, 3, anchor_weight=odd), loss)

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_sums_are_repeatable_and_independent_of_threads(self, device, layout):
        levels = heads(20, grids=((60, 40), (9, 9)), device=device, layout=layout)
        labels = class_labels(20, grids=((60, 40), (9, 9)))
        threads, sums = torch.get_num_threads(), set()
        for count in (1, 2, 3, 1):
            torch.set_num_threads(count)
            sums.add(tuple(ops.dense_focal_loss(levels, labels.to(device), 20).tolist()))
        torch.set_num_threads(threads)
        assert len(sums) == 1

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_sum_of_equal_terms_does_not_drift(self, device, layout):
        # Equal terms are all rounded in the same direction, so a plain float32 sum would be off by far more.
        levels = [torch.full((1, 90, 64, 64), -4.6, device=device).contiguous(memory_format=layout)]
        labels = torch.full((1, 64 * 64), -1, device=device)
        term = reference.sigmoid_focal_loss(levels[0][:1, :1, 0, 0].double(), torch.zeros(1, 1, device=device))
        torch.testing.assert_close(
            ops.dense_focal_loss(levels, labels, 90).double(), term[0] * levels[0].numel(), rtol=1e-6, atol=0
        )

    def test_fake_gradients_have_the_layout_of_real_ones(self, device):
        whole = torch.randn(4, 6, 3, 5, device=device).contiguous(memory_format=torch.channels_last)
        levels = [whole[::2][:1], whole[:1], whole[:1, :, :, :1], whole.contiguous()[:1]]
        labels = torch.zeros(1, sum(2 * x.shape[2] * x.shape[3] for x in levels), dtype=torch.int32, device=device)
        arguments = (torch.ones(1, device=device), levels, labels, None, 3, 0.25, 2.0, 0.0)
        opcheck(torch.ops.retinanet_ops.dense_focal_loss_backward.default, arguments, test_utils="test_faketensor")

    def test_half_logits_under_autocast(self, device):
        levels, labels = heads(3, dtype=torch.bfloat16, device=device), class_labels(3, device=device)
        expected = ops.dense_focal_loss(levels, labels, 3)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            assert torch.equal(ops.dense_focal_loss(levels, labels, 3), expected)

    @pytest.mark.parametrize("dtype", (torch.int8, torch.int16, torch.int64))
    def test_labels_of_any_integer_dtype(self, device, dtype):
        levels, labels = heads(3, device=device), class_labels(3, device=device)
        assert torch.equal(ops.dense_focal_loss(levels, labels.to(dtype), 3), ops.dense_focal_loss(levels, labels, 3))
