"""Values and gradients of `dense_box_loss`."""

import math

import pytest
import torch
from box_loss_cases import GRID_SIZES, LAYOUTS, PER_CELL, heads, small_grid, targets
from cases import FLOATING, random_boxes

import retinanet_ops as ops
from retinanet_ops import reference
from retinanet_ops.constants import BOX_LOSS_KINDS
from retinanet_ops.reference._rows import rows_of

RTOL = {torch.float64: 1e-11, torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def loss_and_grads(function, levels, *arguments, **options):
    """Return the losses, and the gradients of their weighted sum."""
    loss = function(levels, *arguments, **options)
    weight = torch.linspace(0.5, 1.5, len(loss), dtype=loss.dtype, device=loss.device)
    return loss.detach(), torch.autograd.grad(loss, levels, weight)


def oracle(levels, *arguments, **options):
    """Return the losses and gradients of the reference in float64."""
    wide = [level.detach().double().requires_grad_() for level in levels]
    return loss_and_grads(reference.dense_box_loss, wide, *arguments, **options)


class TestForwardAndGradient:
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("dtype", FLOATING)
    @pytest.mark.parametrize("kind", BOX_LOSS_KINDS)
    def test_equals_reference(self, device, kind, dtype, layout):
        levels = heads(dtype=dtype, device=device, layout=layout)
        grid, gt_boxes, matches = targets(device)
        loss, grads = loss_and_grads(ops.dense_box_loss, levels, grid, gt_boxes, matches, kind=kind)
        expected, expected_grads = oracle(levels, grid, gt_boxes, matches, kind=kind)
        assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(loss.double(), expected, rtol=min(RTOL[dtype], 1e-5), atol=0)
        for level, grad, wanted in zip(levels, grads, expected_grads, strict=True):
            assert grad.dtype == dtype and grad.stride() == level.stride()
            torch.testing.assert_close(grad.double(), wanted, rtol=RTOL[dtype], atol=RTOL[dtype] * 0.05)
        positive = (matches >= 0)[..., None].expand(-1, -1, 4)
        rows = rows_of(grads, 4)
        assert (rows[~positive] == 0).all() and (rows[positive] != 0).float().mean() > 0.9

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("count", (4095, 4096, 4097))
    def test_as_many_anchors_as_a_tile_or_one_fewer_or_more(self, device, count, layout):
        # Every anchor of the second level has a match, and a tile of the first must not reach for it. With 4,096 in the
        # first level, the bits of an image fill their last word.
        sizes = ((count, 1), (32, 1))
        levels = [torch.randn(2, 4, h, w).to(device).contiguous(memory_format=layout) for h, w in sizes]
        levels = [(level * 0.3).requires_grad_() for level in levels]
        anchors = random_boxes(count + 32, size=90.0, max_side=70.0).to(device)
        gt_boxes = random_boxes(2, 7, size=90.0, max_side=70.0).to(device)
        matches = torch.randint(-6, 7, (2, count + 32)).clamp(min=-2).to(device, torch.int32)
        matches[:, count:] = 3
        loss, grads = loss_and_grads(ops.dense_box_loss, levels, anchors, gt_boxes, matches)
        expected, expected_grads = oracle(levels, anchors, gt_boxes, matches)
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
        for grad, wanted in zip(grads, expected_grads, strict=True):
            torch.testing.assert_close(grad.double(), wanted, rtol=1e-4, atol=5e-6)
        assert (rows_of(grads, 4)[matches < 0] == 0).all()

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_a_tile_that_begins_and_ends_within_a_word_of_bits(self, device, layout):
        sizes = ((1, 1), (4097, 1))
        levels = [torch.randn(2, 4, h, w).to(device).contiguous(memory_format=layout) for h, w in sizes]
        levels = [(level * 0.3).requires_grad_() for level in levels]
        anchors = random_boxes(4098, size=90.0, max_side=70.0).to(device)
        gt_boxes = random_boxes(2, 7, size=90.0, max_side=70.0).to(device)
        matches = torch.randint(0, 7, (2, 4098), dtype=torch.int32).to(device)
        _, grads = loss_and_grads(ops.dense_box_loss, levels, anchors, gt_boxes, matches)
        _, expected = oracle(levels, anchors, gt_boxes, matches)
        for grad, wanted in zip(grads, expected, strict=True):
            torch.testing.assert_close(grad.double(), wanted, rtol=1e-4, atol=5e-6)

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("cells", (1, 2))
    def test_more_anchors_in_a_cell_than_in_a_tile(self, device, cells, layout):
        # The CUDA kernel takes 4,096 anchors at a time: a part of a cell, or the end of one and the start of the next.
        count = 4100 * cells
        level = (torch.randn(2, 4 * 4100, cells, 1) * 0.3).to(device).contiguous(memory_format=layout).requires_grad_()
        anchors = random_boxes(count, size=90.0, max_side=70.0).to(device)
        gt_boxes = random_boxes(2, 7, size=90.0, max_side=70.0).to(device)
        matches = torch.randint(-6, 7, (2, count)).clamp(min=-2).to(device, torch.int32)
        loss, grads = loss_and_grads(ops.dense_box_loss, [level], anchors, gt_boxes, matches)
        expected, expected_grads = oracle([level], anchors, gt_boxes, matches)
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
        torch.testing.assert_close(grads[0].double(), expected_grads[0], rtol=1e-4, atol=5e-6)
        assert (rows_of(grads, 4)[matches < 0] == 0).all()

    @pytest.mark.parametrize("kind", BOX_LOSS_KINDS)
    def test_options(self, device, kind):
        levels = heads(device=device, scale=3.0)  # some log ratios exceed the bound
        options = {
            "kind": kind,
            "coder_weights": (10.0, 5.0, 2.0, 1.0),
            "beta": 0.7,
            "max_log_ratio": 1.5,
            "offset": 1.0,
        }
        grid, gt_boxes, matches = targets(device)
        loss, grads = loss_and_grads(ops.dense_box_loss, levels, grid, gt_boxes, matches, **options)
        expected, expected_grads = oracle(levels, grid, gt_boxes, matches, **options)
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
        for grad, wanted in zip(grads, expected_grads, strict=True):
            torch.testing.assert_close(grad.double(), wanted, rtol=1e-3, atol=1e-5)
        assert any((level.detach()[:, 3::4] > 1.5).any() for level in levels)

    @pytest.mark.parametrize("kind", BOX_LOSS_KINDS)
    @pytest.mark.parametrize("batched", (False, True))
    def test_explicit_anchors(self, device, kind, batched):
        levels = heads(device=device)
        grid, gt_boxes, matches = targets(device)
        anchors = random_boxes(2, grid.num_anchors).to(device) if batched else grid.boxes()
        loss = ops.dense_box_loss(levels, anchors, gt_boxes, matches, kind=kind)
        torch.testing.assert_close(loss, reference.dense_box_loss(levels, anchors, gt_boxes, matches, kind=kind))
        if not batched:
            assert torch.equal(loss, ops.dense_box_loss(levels, grid, gt_boxes, matches, kind=kind))

    @pytest.mark.parametrize("kind", ("giou", "diou", "ciou"))
    def test_equals_torchvision(self, device, kind):
        torchvision = pytest.importorskip("torchvision")
        name = {"giou": "generalized", "diou": "distance", "ciou": "complete"}[kind]
        function = getattr(torchvision.ops, f"{name}_box_iou_loss")
        levels = heads(device=device)
        grid, gt_boxes, matches = targets(device)
        deltas = rows_of(levels, 4)
        predicted = ops.decode_boxes(deltas, grid)
        wanted = torch.stack(
            [
                function(p[m >= 0], g[m[m >= 0].long()]).sum()
                for p, g, m in zip(predicted, gt_boxes, matches, strict=True)
            ]
        )
        loss = ops.dense_box_loss(levels, grid, gt_boxes, matches, kind=kind)
        torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=0)
        grads = torch.autograd.grad(loss.sum(), levels)
        for grad, expected in zip(grads, torch.autograd.grad(wanted.sum(), levels), strict=True):
            torch.testing.assert_close(grad, expected, rtol=1e-3, atol=1e-5)

    @pytest.mark.parametrize("kind", ("l1", "smooth_l1"))
    def test_l1_equals_pytorch(self, device, kind):
        levels = heads(device=device)
        grid, gt_boxes, matches = targets(device)
        deltas = rows_of(levels, 4)
        for beta in (0.0, 0.3):
            loss = ops.dense_box_loss(levels, grid, gt_boxes, matches, kind=kind, beta=beta)
            for n in range(2):
                positive = matches[n] >= 0
                code = ops.encode_boxes(gt_boxes[n][matches[n][positive].long()], grid.boxes()[positive])
                function = torch.nn.functional.smooth_l1_loss if kind == "smooth_l1" else None
                wanted = (
                    function(deltas[n][positive], code, beta=beta, reduction="sum")
                    if function
                    else (deltas[n][positive] - code).abs().sum()
                )
                torch.testing.assert_close(loss[n], wanted, rtol=1e-5, atol=0)

    @pytest.mark.once
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("kind", ("l1", "smooth_l1", "giou", "diou"))
    def test_gradcheck(self, device, kind, layout):
        sizes = ((2, 3), (1, 2))
        levels = heads(images=1, sizes=sizes, dtype=torch.float64, device=device, layout=layout)
        arguments = targets(device, images=1, grid=small_grid(device, sizes))

        def function(*levels):
            return ops.dense_box_loss(levels, *arguments, kind=kind)

        assert torch.autograd.gradcheck(function, levels)
        assert torch.autograd.gradgradcheck(function, levels)

    def test_second_derivative_of_ciou_treats_alpha_as_a_constant(self, device):
        levels = heads(images=1, dtype=torch.float64, device=device)
        arguments = targets(device, images=1)

        def second(function):
            grads = torch.autograd.grad(function(levels, *arguments, kind="ciou").sum(), levels, create_graph=True)
            return torch.autograd.grad(sum((g**2).sum() for g in grads), levels)

        for actual, wanted in zip(second(ops.dense_box_loss), second(reference.dense_box_loss), strict=True):
            torch.testing.assert_close(actual, wanted)


def loss_of_one_anchor(device, delta, kind, gt, anchor=(0.0, 0.0, 8.0, 8.0)):
    level = torch.tensor(delta, device=device).reshape(1, 4, 1, 1).requires_grad_()
    loss = ops.dense_box_loss(
        [level],
        torch.tensor([anchor], device=device),
        torch.tensor([[gt]], device=device),
        torch.zeros(1, 1, dtype=torch.int32, device=device),
        kind=kind,
    )
    return loss.item(), torch.autograd.grad(loss.sum(), level)[0].flatten()


class TestEdgeCases:
    @pytest.mark.parametrize("kind", BOX_LOSS_KINDS)
    def test_identical_boxes_have_no_loss(self, device, kind):
        loss, grad = loss_of_one_anchor(device, [0.0, 0.0, 0.0, 0.0], kind, (0.0, 0.0, 8.0, 8.0))
        assert loss == 0 and grad.isfinite().all()
        assert (grad == 0).all() or kind not in ("l1", "smooth_l1")

    @pytest.mark.parametrize("beta", (0.0, 1.0))
    def test_smooth_l1_without_difference(self, device, beta):
        box = torch.tensor([[[0.0, 0.0, 8.0, 8.0]]], device=device)
        level = torch.zeros(1, 4, 1, 1, device=device, requires_grad=True)
        matches = torch.zeros(1, 1, dtype=torch.int32, device=device)
        loss, grads = loss_and_grads(ops.dense_box_loss, [level], box[0], box, matches, kind="smooth_l1", beta=beta)
        assert loss == 0 and (grads[0] == 0).all()

    @pytest.mark.parametrize("kind", ("giou", "diou", "ciou"))
    def test_sizes_beyond_the_bound_have_no_gradient(self, device, kind):
        deltas = torch.tensor([[0.1, 0.2, 1.0001, 0.9999], [0.1, 0.2, 0.9999, 1.0001]])
        level = deltas.t().reshape(1, 4, 2, 1).to(device).requires_grad_()
        anchors, gt = torch.tensor([[0.0, 0.0, 8.0, 8.0]] * 2), torch.tensor([[[1.0, 2.0, 20.0, 17.0]]])
        arguments = [t.to(device) for t in (anchors, gt, torch.zeros(1, 2, dtype=torch.int32))]
        _, grads = loss_and_grads(ops.dense_box_loss, [level], *arguments, kind=kind, max_log_ratio=1.0)
        _, expected = oracle([level], *arguments, kind=kind, max_log_ratio=1.0)
        torch.testing.assert_close(grads[0].double(), expected[0], rtol=1e-4, atol=1e-7)
        assert (grads[0][0, 2:, :, 0] != 0).tolist() == [[False, True], [True, False]]

    @pytest.mark.parametrize("kind", ("giou", "diou", "ciou"))
    @pytest.mark.parametrize(
        "gt", ((3.0, 3.0, 3.0, 3.0), (3.0, 3.0, 3.0, 9.0), (3.0, 3.0, 9.0, 3.0), (20.0, 3.0, 20.0, 3.0))
    )
    @pytest.mark.parametrize("anchor", ((0.0, 0.0, 8.0, 8.0), (3.0, 3.0, 3.0, 3.0), (0.0, 3.0, 8.0, 3.0)))
    def test_boxes_without_area_have_finite_losses_and_gradients(self, device, kind, gt, anchor):
        loss, grad = loss_of_one_anchor(device, [0.1, 0.0, 0.2, 0.0], kind, gt, anchor)
        assert 0 <= loss < 5 and grad.isfinite().all()
        level = torch.tensor([0.1, 0.0, 0.2, 0.0], dtype=torch.float64).reshape(1, 4, 1, 1)
        expected = reference.dense_box_loss(
            [level], torch.tensor([anchor]), torch.tensor([[gt]]), torch.zeros(1, 1, dtype=torch.int32), kind=kind
        )
        assert math.isclose(loss, expected.item(), rel_tol=1e-5, abs_tol=1e-6)

    @pytest.mark.parametrize("kind", ("giou", "diou", "ciou"))
    def test_identical_points_have_no_loss(self, device, kind):
        point = (3.0, 3.0, 3.0, 3.0)
        assert loss_of_one_anchor(device, [0.0] * 4, kind, point, point)[0] == 0
        assert loss_of_one_anchor(device, [0.0] * 4, kind, (4.0, 3.0, 4.0, 3.0), point)[0] >= 1

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("kind", BOX_LOSS_KINDS)
    def test_nan_stays_in_its_place(self, device, kind, layout):
        levels = heads(device=device, layout=layout)
        grid, gt_boxes, matches = targets(device)
        matches.clamp_(max=-1)
        matches[1, 5] = matches[1, 60] = 2
        clean, _ = loss_and_grads(ops.dense_box_loss, levels, grid, gt_boxes, matches, kind=kind)
        assert clean.isfinite().all() and clean[1] > 0
        with torch.no_grad():
            levels[0][0] = torch.nan  # deltas of unmatched anchors do not count
            a, cell = 5 % PER_CELL, 5 // PER_CELL
            levels[0][1, 4 * a + 1, cell // 23, cell % 23] = torch.nan
        loss, grads = loss_and_grads(ops.dense_box_loss, levels, grid, gt_boxes, matches, kind=kind)
        assert loss[0] == 0 and loss[1].isnan()
        nan = rows_of(grads, 4).isnan().any(-1)
        assert nan.nonzero().tolist() == [[1, 5]]

    @pytest.mark.parametrize("kind", BOX_LOSS_KINDS)
    @pytest.mark.parametrize("match", (7, 2**31, 2**32))
    def test_match_without_ground_truth_gives_nan(self, device, kind, match):
        levels = heads(device=device)
        grid, gt_boxes, matches = targets(device)
        matches = matches.long()
        matches[0, 3] = match
        loss, grads = loss_and_grads(ops.dense_box_loss, levels, grid, gt_boxes, matches, kind=kind)
        assert loss.isnan().tolist() == [True, False]
        nan = rows_of(grads, 4).isnan().any(-1)
        assert nan.nonzero().tolist() == [[0, 3]]

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("kind", BOX_LOSS_KINDS)
    def test_empty(self, device, kind, layout):
        for images, sizes, max_gt in ((0, GRID_SIZES, 3), (2, ((0, 5),), 3), (2, GRID_SIZES, 0)):
            levels = heads(images=images, sizes=sizes, device=device, layout=layout)
            anchors = random_boxes(sum(PER_CELL * h * w for h, w in sizes)).to(device)
            matches = torch.full((images, len(anchors)), -1, dtype=torch.int32, device=device)
            gt_boxes = torch.zeros(images, max_gt, 4, device=device)
            loss, grads = loss_and_grads(ops.dense_box_loss, levels, anchors, gt_boxes, matches, kind=kind)
            assert loss.shape == (images,) and (loss == 0).all()
            assert all((g == 0).all() and g.shape == x.shape for g, x in zip(grads, levels, strict=True))

    def test_sums_are_repeatable_and_independent_of_threads(self, device):
        sizes = ((80, 60),)
        levels = heads(sizes=sizes, device=device)
        grid, gt_boxes, matches = targets(device, grid=small_grid(device, sizes))
        threads, sums = torch.get_num_threads(), set()
        for count in (1, 2, 3, 1):
            torch.set_num_threads(count)
            sums.add(tuple(ops.dense_box_loss(levels, grid, gt_boxes, matches).tolist()))
        torch.set_num_threads(threads)
        assert len(sums) == 1

    def test_undefined_gradient_of_the_loss(self, device):
        class NoGradient(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x.clone()

            @staticmethod
            def backward(ctx, grad):
                return None

        levels = heads(device=device)
        grid, gt_boxes, matches = targets(device)
        options = ("l1", 0.1, [1.0] * 4, 4.0, 0.0)
        losses = (
            ops.dense_box_loss(levels, grid, gt_boxes, matches),
            torch.ops.retinanet_ops.dense_box_loss(levels, *grid.arguments(), gt_boxes, matches, *options)[0],
        )
        for loss in losses:
            grads = torch.autograd.grad(NoGradient.apply(loss).sum(), levels, allow_unused=True)
            assert grads == (None,) * len(levels)

    def test_retained_graph_and_functional_gradients(self, device):
        levels = heads(device=device)
        arguments = targets(device)
        loss = ops.dense_box_loss(levels, *arguments).sum()
        first = torch.autograd.grad(loss, levels, retain_graph=True)
        assert all(map(torch.equal, first, torch.autograd.grad(loss, levels)))
        with pytest.raises(RuntimeError, match="functorch transforms"):
            torch.func.grad(lambda *levels: ops.dense_box_loss(levels, *arguments).sum())(*levels)

    @pytest.mark.parametrize("dtype", (torch.int8, torch.int64))
    def test_matches_of_any_integer_dtype(self, device, dtype):
        levels = heads(device=device)
        grid, gt_boxes, matches = targets(device)
        expected = ops.dense_box_loss(levels, grid, gt_boxes, matches)
        assert torch.equal(ops.dense_box_loss(levels, grid, gt_boxes, matches.to(dtype)), expected)
