"""Values and gradients of `sigmoid_focal_loss`."""

import math

import pytest
import torch
from cases import FLOATING, RTOL, SIZES, assert_close, unaligned
from focal_cases import class_targets, logits

import retinanet_ops as ops
from retinanet_ops import reference

GAMMAS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0)
ALPHAS = (-1.0, 0.0, 0.25, 1.0)


def loss_and_grad(function, x, targets, **options):
    x = x.detach().clone().requires_grad_()
    loss = function(x, targets, **options)
    weight = torch.linspace(0.5, 1.5, loss.numel(), dtype=torch.float64).reshape(loss.shape).to(loss.device, loss.dtype)
    loss.backward(weight)
    return loss.detach(), x.grad


class TestForward:
    @pytest.mark.parametrize("gamma", GAMMAS)
    @pytest.mark.parametrize("alpha", ALPHAS)
    @pytest.mark.parametrize("dtype", FLOATING)
    def test_class_ids(self, device, dtype, alpha, gamma):
        x = logits(37, 5, dtype=dtype, device=device)
        targets = class_targets(37, num_classes=5, device=device)
        loss = ops.sigmoid_focal_loss(x, targets, alpha, gamma)
        assert loss.dtype == dtype
        assert_close(loss, reference.sigmoid_focal_loss(x.double(), targets, alpha, gamma))

    @pytest.mark.parametrize("gamma", GAMMAS)
    @pytest.mark.parametrize("dtype", FLOATING)
    def test_dense_and_soft(self, device, dtype, gamma):
        x = logits(3, 7, 11, dtype=dtype, device=device)
        targets = torch.rand(3, 7, 11).where(torch.rand(3, 7, 11) < 0.5, torch.randint(0, 2, (3, 7, 11)).float())
        targets = targets.to(device, dtype)
        loss = ops.sigmoid_focal_loss(x, targets, 0.25, gamma)
        assert_close(loss, reference.sigmoid_focal_loss(x.double(), targets.double(), 0.25, gamma), scale=4)

    @pytest.mark.parametrize("n", SIZES)
    @pytest.mark.parametrize("dtype", FLOATING)
    def test_sizes(self, device, dtype, n):
        x = logits(n, dtype=dtype, device=device)
        targets = (torch.rand(n) < 0.5).to(device, dtype)
        assert_close(ops.sigmoid_focal_loss(x, targets), reference.sigmoid_focal_loss(x.double(), targets.double()))

    @pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
    @pytest.mark.parametrize("target", (0.0, 1.0))
    def test_every_half_precision_logit(self, device, dtype, target):
        x = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).to(device)
        targets = torch.full_like(x, target)
        loss = ops.sigmoid_focal_loss(x, targets, alpha=-1)
        expected = reference.sigmoid_focal_loss(x.double(), targets.double(), alpha=-1)
        # Below the smallest normal number, the tolerance is half a step.
        torch.testing.assert_close(
            loss.double(),
            expected.to(dtype).double(),
            rtol=torch.finfo(dtype).eps,
            atol=torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps,
            equal_nan=True,
        )

    @pytest.mark.parametrize("num_classes", (1, 3, 80, 91))
    @pytest.mark.parametrize("label_dtype", (torch.int8, torch.int16, torch.int32, torch.int64))
    def test_label_dtypes_and_odd_class_counts(self, device, num_classes, label_dtype):
        x = logits(2, 65, num_classes, device=device)
        targets = class_targets(2, 65, num_classes=num_classes, device=device).to(label_dtype)
        assert_close(ops.sigmoid_focal_loss(x, targets), reference.sigmoid_focal_loss(x.double(), targets))

    @pytest.mark.parametrize("dtype", FLOATING)
    @pytest.mark.parametrize("reduction", ("sum", "mean"))
    @pytest.mark.parametrize("rows", (1, 700, 5000))
    def test_reductions(self, device, dtype, reduction, rows):
        x = logits(rows, 9, dtype=dtype, device=device)
        targets = class_targets(rows, num_classes=9, device=device)
        targets[-1], x[-1, -1] = 0, 2.0  # gives the last logit a large loss
        loss = ops.sigmoid_focal_loss(x, targets, reduction=reduction)
        assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert_close(loss, reference.sigmoid_focal_loss(x.double(), targets, reduction=reduction))

    @pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16))
    def test_rows_longer_than_a_tile(self, device, dtype):
        x = logits(3, 40_001, dtype=dtype, device=device).requires_grad_()
        targets = torch.tensor([40_000, -2, 16_384], device=device)
        loss = ops.sigmoid_focal_loss(x, targets, reduction="sum")
        wide = x.detach().double().requires_grad_()
        expected = reference.sigmoid_focal_loss(wide, targets, reduction="sum")
        assert_close(loss, expected)
        assert_close(torch.autograd.grad(loss, x)[0], torch.autograd.grad(expected, wide)[0])

    @pytest.mark.parametrize("incoming", (math.inf, math.nan))
    @pytest.mark.parametrize("dtype", FLOATING)
    def test_incoming_gradients_that_are_not_finite(self, device, dtype, incoming):
        x = logits(300, 21, dtype=dtype).clamp(-9, 9).requires_grad_()
        targets = class_targets(300, num_classes=21)
        on_device = x.detach().to(device).requires_grad_()
        loss = ops.sigmoid_focal_loss(on_device, targets.to(device), reduction="sum")
        grad = torch.autograd.grad(loss, on_device, torch.full_like(loss, incoming))[0].cpu()
        # Logits of ignored rows have gradient 0 even so.
        assert (grad[targets == -2] == 0).all()
        assert (grad[targets != -2].isnan() if math.isnan(incoming) else grad[targets != -2].isinf()).all()
        positive = torch.zeros_like(grad, dtype=torch.bool)
        positive[targets >= 0, targets[targets >= 0].long()] = True
        assert math.isnan(incoming) or torch.equal(grad < 0, positive)

    def test_more_rows_longer_than_a_tile_than_a_tile_has_rows(self, device):
        # The CUDA kernel takes 16,384 logits at a time, or up to 1,024 rows if they are shorter.
        x = torch.zeros(1030, 16_385, dtype=torch.float64, device=device)
        targets = torch.arange(1030, device=device) * 15 + 900
        loss = ops.sigmoid_focal_loss(x, targets, alpha=0.25, gamma=2.0, reduction="sum")
        of_each_row = (0.25 + 0.75 * 16_384) * 0.5**2 * math.log(2)
        assert loss.item() == pytest.approx(1030 * of_each_row, rel=1e-12)

    @pytest.mark.once
    def test_blocks_that_take_several_tiles(self, device):
        # The CUDA kernel takes 2 tiles of 1,024 rows at a time from 3,584 tiles on. The last block takes one.
        x = torch.randn(3584 * 1024 + 5, 2)
        targets = torch.randint(-2, 2, (len(x),), dtype=torch.int32)
        loss, grad = loss_and_grad(ops.sigmoid_focal_loss, x.to(device), targets.to(device), reduction="sum")
        expected, expected_grad = loss_and_grad(reference.sigmoid_focal_loss, x.double(), targets, reduction="sum")
        assert_close(loss, expected)
        assert_close(grad, expected_grad)

    @pytest.mark.parametrize("dtype", FLOATING)
    @pytest.mark.parametrize("target_dtype", (None, torch.float64))
    def test_sums_over_several_blocks(self, device, dtype, target_dtype):
        # A block of the CUDA kernel for elementwise targets takes 16,384 logits in float32, and twice as many in half
        # precision.
        x = logits(70_003, dtype=dtype, device=device)
        targets = torch.rand(70_003).round(decimals=1).to(device, target_dtype or dtype)
        loss, grad = loss_and_grad(ops.sigmoid_focal_loss, x, targets, reduction="sum")
        expected, expected_grad = loss_and_grad(
            reference.sigmoid_focal_loss, x.double(), targets.double(), reduction="sum"
        )
        assert_close(loss, expected)
        # The gradient of a soft target changes sign. Near its zero, the error is relative to its terms.
        rtol = 4 * RTOL[dtype]
        torch.testing.assert_close(grad.double(), expected_grad, rtol=rtol, atol=min(rtol, 4 * RTOL[torch.float32]))

    def test_class_ids_equal_dense_one_hot(self, device):
        x = logits(50, 6, device=device)
        targets = torch.randint(-1, 6, (50,)).to(device)
        one_hot = (targets[:, None] == torch.arange(6, device=device)).float()
        assert torch.equal(ops.sigmoid_focal_loss(x, targets), ops.sigmoid_focal_loss(x, one_hot))

    def test_dense_targets_of_any_dtype(self, device):
        x = logits(40, dtype=torch.bfloat16, device=device)
        targets = (torch.rand(40) < 0.5).to(device)
        expected = ops.sigmoid_focal_loss(x, targets.bfloat16())
        for dtype in (torch.bool, torch.int64, torch.float32, torch.float64):
            assert torch.equal(ops.sigmoid_focal_loss(x, targets.to(dtype)), expected)

    @pytest.mark.parametrize("reduction", ("none", "mean", "sum"))
    @pytest.mark.parametrize("alpha", (-1, 0.25))
    def test_equals_torchvision(self, device, alpha, reduction):
        torchvision = pytest.importorskip("torchvision")
        x, targets = (
            torch.randn(60, 4, dtype=torch.float64, device=device),
            torch.rand(60, 4, dtype=torch.float64, device=device),
        )
        expected = torchvision.ops.sigmoid_focal_loss(x, targets, alpha, 2, reduction)
        torch.testing.assert_close(ops.sigmoid_focal_loss(x, targets, alpha, 2, reduction), expected)

    def test_published_values(self, device):
        # These are the logits of p = 0.9 and 0.1. Alpha weights positives by 0.25 and negatives by 0.75.
        x = torch.tensor([[2.1972246], [2.1972246], [-2.1972246], [-2.1972246]], device=device)
        loss = ops.sigmoid_focal_loss(x, torch.tensor([0, -1, 0, -1], device=device))[:, 0]
        torch.testing.assert_close(loss.cpu(), torch.tensor([2.634013e-4, 1.39882044, 0.46627348, 7.902039e-4]))


class TestGradient:
    @pytest.mark.parametrize("gamma", GAMMAS)
    @pytest.mark.parametrize("dtype", FLOATING)
    @pytest.mark.parametrize("reduction", ("none", "sum", "mean"))
    def test_class_ids(self, device, dtype, gamma, reduction):
        x = logits(70, 5, dtype=dtype, device=device)
        targets = class_targets(70, num_classes=5, device=device)
        _, grad = loss_and_grad(ops.sigmoid_focal_loss, x, targets, gamma=gamma, reduction=reduction)
        _, expected = loss_and_grad(reference.sigmoid_focal_loss, x.double(), targets, gamma=gamma, reduction=reduction)
        assert grad.dtype == dtype
        # With "none", the incoming gradient is rounded to the dtype of the loss, which `scale` allows for.
        assert_close(grad, expected, scale=2)

    @pytest.mark.parametrize("gamma", GAMMAS)
    def test_dense(self, device, gamma):
        x, targets = logits(300, device=device), torch.rand(300).round(decimals=1).to(device)
        _, grad = loss_and_grad(ops.sigmoid_focal_loss, x, targets, gamma=gamma)
        _, expected = loss_and_grad(reference.sigmoid_focal_loss, x.double(), targets.double(), gamma=gamma)
        # The gradient of a soft target changes sign. Near its zero, the error is relative to its terms.
        torch.testing.assert_close(grad.double(), expected, rtol=1e-5, atol=2e-6)

    @pytest.mark.once
    @pytest.mark.parametrize("gamma", (0.0, 1.0, 1.5, 2.0))
    @pytest.mark.parametrize("reduction", ("none", "sum"))
    def test_gradcheck(self, device, gamma, reduction):
        x = torch.randn(6, 3, dtype=torch.float64, device=device, requires_grad=True)
        ids = torch.tensor([0, 2, -1, -2, 1, -1], device=device)
        assert torch.autograd.gradcheck(lambda x: ops.sigmoid_focal_loss(x, ids, 0.25, gamma, reduction), x)
        assert torch.autograd.gradgradcheck(lambda x: ops.sigmoid_focal_loss(x, ids, 0.25, gamma, reduction), x)
        soft = torch.rand(6, 3, dtype=torch.float64, device=device) * 0.8 + 0.1
        soft.requires_grad_()
        assert torch.autograd.gradcheck(lambda x, t: ops.sigmoid_focal_loss(x, t, 0.25, gamma, reduction), (x, soft))
        assert torch.autograd.gradgradcheck(
            lambda x, t: ops.sigmoid_focal_loss(x, t, 0.25, gamma, reduction), (x, soft)
        )

    def test_bfloat16_gradient_at_the_usual_initialisation(self, device):
        # A prior of 0.01 starts all logits at -4.595. Computing `1 - p` would make this gradient 54 % wrong.
        x = torch.full((8, 80), -math.log(99.0), dtype=torch.bfloat16, device=device)
        targets = torch.full((8,), -1, device=device)
        _, grad = loss_and_grad(ops.sigmoid_focal_loss, x, targets, reduction="sum")
        _, expected = loss_and_grad(reference.sigmoid_focal_loss, x.double(), targets, reduction="sum")
        assert_close(grad, expected)

    def test_gradient_is_scaled_before_it_is_rounded(self, device):
        # Without the scale, this float16 gradient (about 2e-9) would round to 0.
        x = torch.full((4, 2), -7.0, dtype=torch.float16, device=device, requires_grad=True)
        targets = torch.full((4,), -1, device=device)
        (ops.sigmoid_focal_loss(x, targets, reduction="sum") * 65536).backward()
        y = x.detach().double().requires_grad_()
        (reference.sigmoid_focal_loss(y, targets, reduction="sum") * 65536).backward()
        assert x.grad.abs().min() > 0
        assert_close(x.grad, y.grad)

    def test_second_backward_and_retained_graph(self, device):
        x = torch.randn(9, 3, device=device, requires_grad=True)
        loss = ops.sigmoid_focal_loss(x, torch.zeros(9, dtype=torch.int64, device=device), reduction="sum")
        (first,) = torch.autograd.grad(loss, x, retain_graph=True)
        (second,) = torch.autograd.grad(loss, x)
        assert torch.equal(first, second)


class TestEdgeCases:
    @pytest.mark.parametrize("gamma", GAMMAS)
    @pytest.mark.parametrize("dtype", FLOATING)
    def test_saturated_logits_are_finite(self, device, dtype, gamma):
        x = torch.tensor([[-1e4, -100.0, -50.0, 50.0, 100.0, 1e4]], dtype=dtype, device=device).t().contiguous()
        for label in (0, -1):
            loss, grad = loss_and_grad(ops.sigmoid_focal_loss, x, torch.full((6,), label, device=device), gamma=gamma)
            assert loss.isfinite().all() and grad.isfinite().all()

    @pytest.mark.parametrize("gamma", GAMMAS)
    def test_infinite_logits_take_their_limits(self, device, gamma):
        x = torch.tensor([[math.inf], [-math.inf]], device=device)
        positive, grad = loss_and_grad(
            ops.sigmoid_focal_loss, x, torch.zeros(2, dtype=torch.int64, device=device), gamma=gamma
        )
        assert positive[0] == 0 and positive[1] == math.inf and grad.isfinite().all() and grad[0] == 0
        negative, grad = loss_and_grad(
            ops.sigmoid_focal_loss,
            x,
            torch.full((2,), -1, device=device),
            gamma=gamma,
            alpha=-1.0,
            reduction="none",
        )
        assert negative[0] == math.inf and negative[1] == 0 and grad[1] == 0
        torch.testing.assert_close(
            grad[0].cpu(), torch.tensor([0.5])
        )  # the limit 1 times the weight 0.5 of loss_and_grad

    @pytest.mark.parametrize("gamma", (1.5, 1.7, 2.0))
    @pytest.mark.parametrize(("alpha", "label"), ((0.0, 0), (1.0, -1)))
    def test_infinite_logits_of_alpha_weight_zero(self, device, alpha, label, gamma):
        x = torch.tensor([[math.inf], [-math.inf]], device=device)
        targets = torch.full((2,), label, device=device)
        loss, grad = loss_and_grad(ops.sigmoid_focal_loss, x, targets, alpha=alpha, gamma=gamma)
        assert (loss == 0).all() and (grad == 0).all()
        assert (reference.sigmoid_focal_loss(x, targets, alpha, gamma) == 0).all()
        # The result is the same if other targets of the call are soft.
        x, targets = torch.cat([x, x.new_zeros(1, 1)]), torch.tensor([[label + 1.0]] * 2 + [[0.5]], device=device)
        targets = targets.clamp(max=1)
        loss, grad = loss_and_grad(ops.sigmoid_focal_loss, x, targets, alpha=alpha, gamma=gamma)
        assert (loss[:2] == 0).all() and (grad[:2] == 0).all() and loss[2] > 0
        assert (reference.sigmoid_focal_loss(x, targets, alpha, gamma)[:2] == 0).all()

    def test_nan_logit_affects_only_itself(self, device):
        x = torch.zeros(4, 3, device=device)
        x[1, 2] = math.nan
        loss, grad = loss_and_grad(ops.sigmoid_focal_loss, x, torch.tensor([0, 1, -1, 2], device=device))
        expected = torch.zeros(4, 3, dtype=torch.bool)
        expected[1, 2] = True
        assert torch.equal(loss.isnan().cpu(), expected) and torch.equal(grad.isnan().cpu(), expected)

    def test_ignored_rows_are_zero_whatever_their_logits(self, device):
        x = torch.tensor([[math.nan, math.inf, 3.0]], device=device)
        loss, grad = loss_and_grad(ops.sigmoid_focal_loss, x, torch.tensor([-2], device=device))
        assert (loss == 0).all() and (grad == 0).all()

    @pytest.mark.parametrize("label", (-3, 3, 2**31 - 1, -(2**31), 2**32))
    def test_label_out_of_range_gives_nan_in_its_row(self, device, label):
        dtype = torch.int64 if label >= 2**31 else torch.int32
        targets = torch.tensor([0, label, 2], dtype=dtype, device=device)
        loss, grad = loss_and_grad(ops.sigmoid_focal_loss, torch.zeros(3, 3, device=device), targets)
        assert loss.isnan().any(1).tolist() == [False, True, False] and loss[1].isnan().all()
        assert grad.isnan().any(1).tolist() == [False, True, False] and grad[1].isnan().all()

    def test_empty(self, device):
        for shape in ((0, 4), (3, 0)):
            x = torch.empty(shape, device=device, requires_grad=True)
            targets = torch.empty(shape[0], dtype=torch.int64, device=device).fill_(-1)
            assert ops.sigmoid_focal_loss(x, targets).shape == shape
            assert ops.sigmoid_focal_loss(x, targets, reduction="sum") == 0
            assert ops.sigmoid_focal_loss(x, targets, reduction="mean").isnan()
            ops.sigmoid_focal_loss(x, targets, reduction="sum").backward()
            assert x.grad.shape == shape

    def test_scalar_logit(self, device):
        x = torch.tensor(0.5, device=device, requires_grad=True)
        loss = ops.sigmoid_focal_loss(x, torch.tensor(1.0, device=device))
        loss.backward()
        y = torch.tensor(0.5, dtype=torch.float64, device=device, requires_grad=True)
        expected = reference.sigmoid_focal_loss(y, torch.tensor(1.0, device=device))
        expected.backward()
        assert_close(loss.detach(), expected.detach())
        assert_close(x.grad, y.grad)

    @pytest.mark.parametrize("dtype", FLOATING)
    def test_layouts_do_not_change_bits(self, device, dtype):
        x = logits(12, 10, dtype=dtype, device=device)
        targets = class_targets(12, num_classes=10, device=device)
        loss, grad = loss_and_grad(ops.sigmoid_focal_loss, x, targets)
        for other in (x.t().contiguous().t(), unaligned(x), torch.stack((x, x), dim=-1)[..., 1]):
            y = other.detach().requires_grad_()
            other_loss = ops.sigmoid_focal_loss(y, targets)
            assert torch.equal(other_loss, loss)
            weight = torch.linspace(0.5, 1.5, loss.numel(), dtype=torch.float64).reshape(loss.shape).to(device, dtype)
            assert torch.equal(torch.autograd.grad(other_loss, y, weight)[0], grad)

    @pytest.mark.backends("cpu", "cuda")  # too slow on the emulator
    def test_sum_of_258_million_terms(self, device):
        rows, times = 25_200, 128
        one = torch.randn(rows, 80).sub_(4).to(torch.bfloat16)
        logits, labels = one.repeat(times, 1).to(device), torch.full((rows * times,), -1, device=device)
        exact = times * reference.sigmoid_focal_loss(one.double(), labels[:rows].cpu(), reduction="sum").item()
        assert logits.numel() >= 258_000_000
        assert ops.sigmoid_focal_loss(logits, labels, reduction="sum").item() == pytest.approx(exact, rel=1e-6, abs=0)
        levels = [logits.view(1, 3200, 1008, 80).permute(0, 3, 1, 2)]
        loss = ops.dense_focal_loss(levels, labels.view(1, -1), 80)
        assert loss.item() == pytest.approx(exact, rel=1e-6, abs=0)

    def test_sum_is_repeatable_and_independent_of_threads(self, device):
        x, targets = logits(30_000, 3, device=device), class_targets(30_000, num_classes=3, device=device)
        threads = torch.get_num_threads()
        sums = set()
        for count in (1, 2, 3, 1):
            torch.set_num_threads(count)
            sums.add(ops.sigmoid_focal_loss(x, targets, reduction="sum").item())
        torch.set_num_threads(threads)
        assert len(sums) == 1

    def test_half_logits_under_autocast(self, device):
        x = logits(20, 4, dtype=torch.bfloat16, device=device)
        targets = class_targets(20, num_classes=4, device=device)
        expected = ops.sigmoid_focal_loss(x, targets, reduction="sum")
        with torch.autocast(device.type, dtype=torch.bfloat16):
            assert torch.equal(ops.sigmoid_focal_loss(x, targets, reduction="sum"), expected)
