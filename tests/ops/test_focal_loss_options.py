"""The options of `sigmoid_focal_loss` that leave elements out or weigh them: `ignore_value` and `pos_weight`."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import FLOATING, RTOL, assert_close
from focal_cases import class_targets, logits

import retinanet_ops as ops
from retinanet_ops import reference

IGNORE = -100.0


def dense_targets(*shape, soft=False, ignored=False, dtype=torch.float32, device="cpu"):
    """Return targets of 0 and 1, and if requested some that are soft or ignored."""
    targets = torch.randint(0, 2, shape).float()
    if soft:
        targets = torch.where(torch.rand(shape) < 0.3, torch.rand(shape).round(decimals=2), targets)
    if ignored:
        targets = torch.where(torch.rand(shape) < 0.2, IGNORE, targets)
    return targets.to(device, dtype)


def loss_and_gradient(function, x, targets, **options):
    x = x.detach().clone().requires_grad_()
    loss = function(x, targets, **options)
    weight = torch.linspace(0.5, 1.5, loss.numel(), dtype=torch.float64).reshape(loss.shape).to(loss.device, loss.dtype)
    return loss.detach(), torch.autograd.grad(loss, x, weight)[0]


def check_reference(x, targets, **options):
    """Compare loss and gradient with the reference in float64."""
    loss, grad = loss_and_gradient(ops.sigmoid_focal_loss, x, targets, **options)
    wide = targets.double() if targets.is_floating_point() else targets
    expected, expected_grad = loss_and_gradient(reference.sigmoid_focal_loss, x.double(), wide, **options)
    assert_close(loss, expected, scale=4)
    # The gradient of a soft target changes sign. Near its zero, the error is relative to its terms.
    rtol = 4 * RTOL[x.dtype]
    largest = float(expected_grad.abs().max()) if x.numel() else 0.0
    torch.testing.assert_close(grad.double(), expected_grad, rtol=rtol, atol=rtol * min(largest, 1.0))


@pytest.mark.parametrize("reduction", ("none", "sum", "mean"))
@pytest.mark.parametrize("soft", (False, True))
@pytest.mark.parametrize("dtype", FLOATING)
class TestValues:
    def test_ignored_targets(self, device, dtype, soft, reduction):
        x = logits(91, 7, dtype=dtype, device=device)
        targets = dense_targets(91, 7, soft=soft, ignored=True, dtype=dtype, device=device)
        check_reference(x, targets, ignore_value=IGNORE, reduction=reduction)

    def test_factors_of_the_last_dimension(self, device, dtype, soft, reduction):
        x = logits(91, 7, dtype=dtype, device=device)
        targets = dense_targets(91, 7, soft=soft, ignored=soft, dtype=dtype, device=device)
        factors = torch.tensor([1.0, 0.5, 3.0, 0.0, 1.5, 20.0, 1.0], device=device)
        check_reference(x, targets, pos_weight=factors, ignore_value=IGNORE, reduction=reduction, gamma=1.5)

    # Planes of 9 logits end inside a pack, and several lie in a pack of half precision with planes of 2.
    @pytest.mark.parametrize("shape", ((5, 3, 6, 7), (2, 700, 3, 3), (3, 2, 1, 1), (2, 300, 2, 1), (1, 2, 40, 40)))
    def test_factors_of_maps(self, device, dtype, soft, reduction, shape):
        x = logits(*shape, dtype=dtype, device=device)
        targets = dense_targets(*shape, soft=soft, dtype=dtype, device=device)
        factors = 0.5 + torch.rand(shape[1], 1, 1, device=device)
        check_reference(x, targets, pos_weight=factors, reduction=reduction)


class TestFactorsOfClassIds:
    @pytest.mark.parametrize("num_classes", (1, 3, 80))
    @pytest.mark.parametrize("reduction", ("none", "sum"))
    @pytest.mark.parametrize("gamma", (2.0, 1.5))
    @pytest.mark.parametrize("dtype", FLOATING)
    def test_equal_the_reference(self, device, dtype, gamma, reduction, num_classes):
        x = logits(130, num_classes, dtype=dtype, device=device)
        targets = class_targets(130, num_classes=num_classes, device=device)
        factors = 0.5 + torch.rand(num_classes, device=device)
        check_reference(x, targets, pos_weight=factors, gamma=gamma, reduction=reduction)

    @pytest.mark.parametrize("dtype", FLOATING)
    def test_equal_those_of_one_hot_targets(self, device, dtype):
        x = logits(60, 5, dtype=dtype, device=device)
        targets = torch.randint(-1, 5, (60,)).to(device)
        one_hot = (targets[:, None] == torch.arange(5, device=device)).to(dtype)
        factors = torch.tensor([1.0, 2.0, 0.25, 8.0, 0.0], device=device)
        for options in ({}, {"alpha": -1.0, "gamma": 1.5}):
            ids, dense = (ops.sigmoid_focal_loss(x, t, pos_weight=factors, **options) for t in (targets, one_hot))
            assert torch.equal(ids, dense)

    def test_positives_that_follow_each_other_in_a_pack(self, device):
        x = logits(200, 2, dtype=torch.bfloat16, device=device)
        targets = torch.randint(0, 2, (200,)).to(device)
        check_reference(x, targets, pos_weight=torch.tensor([3.0, 0.5], device=device))


class TestMeaning:
    def test_ignored_elements_are_zero_whatever_their_logits(self, device):
        x = torch.tensor([math.nan, math.inf, -math.inf, 3.0, 3.0], device=device)
        targets = torch.tensor([IGNORE] * 4 + [1.0], device=device)
        loss, grad = loss_and_gradient(ops.sigmoid_focal_loss, x, targets, ignore_value=IGNORE)
        assert loss[:4].tolist() == grad[:4].tolist() == [0.0] * 4 and loss[4] > 0 > grad[4]

    def test_the_mean_counts_ignored_elements(self, device):
        x, targets = torch.zeros(4, device=device), torch.tensor([IGNORE, IGNORE, 1.0, 1.0], device=device)
        mean = ops.sigmoid_focal_loss(x, targets, ignore_value=IGNORE, reduction="mean")
        assert mean.item() == pytest.approx(0.5 * 0.25 * 0.25 * math.log(2), rel=1e-6)

    def test_without_an_ignored_value_no_target_is_ignored(self, device):
        x, targets = torch.zeros(1, device=device), torch.tensor([IGNORE], device=device)
        assert ops.sigmoid_focal_loss(x, targets) != 0

    @pytest.mark.parametrize(
        ("dtype", "value"), ((torch.uint8, 255), (torch.int64, -1), (torch.float16, -0.1), (torch.float64, 0.1))
    )
    def test_ignored_values_of_any_target_dtype(self, device, dtype, value):
        # -0.1 and 0.1 have other values in float16 and in float64 than as Python numbers in float32.
        targets = torch.tensor([0, 1, value, 1, value], dtype=dtype, device=device)
        x = torch.ones(5, dtype=dtype if dtype == torch.float16 else torch.float32, device=device)
        loss = ops.sigmoid_focal_loss(x, targets, ignore_value=value)
        assert (loss != 0).tolist() == [True, True, False, True, False]
        assert torch.equal(reference.sigmoid_focal_loss(x, targets, ignore_value=value) != 0, loss != 0)

    @pytest.mark.parametrize(
        ("target_dtype", "dtype"),
        (
            (torch.float16, torch.float32),
            (torch.bfloat16, torch.float16),
            (torch.bfloat16, torch.float64),
            (torch.float64, torch.float32),
            (torch.float32, torch.float64),
        ),
    )
    def test_ignored_values_beside_logits_of_another_dtype(self, device, target_dtype, dtype):
        targets = torch.tensor([0.0, -0.1, 1.0], dtype=target_dtype, device=device)
        x = torch.ones(3, dtype=dtype, device=device)
        for library in (ops, reference):
            loss = library.sigmoid_focal_loss(x, targets, ignore_value=-0.1)
            assert (loss != 0).tolist() == [True, False, True]

    def test_integer_targets_are_compared_as_numbers(self, device):
        x, targets = torch.ones(2, device=device), torch.tensor([156, 1], dtype=torch.uint8, device=device)
        # -100 has the bits of 156 in eight bits.
        assert (ops.sigmoid_focal_loss(x, targets, ignore_value=-100) != 0).all()

    def test_zero_as_the_ignored_value_leaves_the_positives(self, device):
        x, targets = torch.ones(3, device=device), torch.tensor([0.0, 1.0, 0.5], device=device)
        assert (ops.sigmoid_focal_loss(x, targets, ignore_value=0) != 0).tolist() == [False, True, True]

    def test_without_modulation_it_is_the_pos_weight_of_pytorch(self, device):
        x, targets = torch.randn(6, 4, 5, device=device), dense_targets(6, 4, 5, device=device)
        factors = torch.tensor([0.5, 1.0, 2.0, 4.0], device=device)[:, None]
        loss = ops.sigmoid_focal_loss(x, targets, alpha=-1, gamma=0, pos_weight=factors)
        expected = F.binary_cross_entropy_with_logits(x, targets, pos_weight=factors, reduction="none")
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-7)

    def test_one_factor_is_for_all_classes(self, device):
        x, targets = torch.randn(6, 4, device=device), dense_targets(6, 4, device=device)
        expected = ops.sigmoid_focal_loss(x, targets, pos_weight=torch.full((4,), 2.5, device=device))
        ids = torch.randint(-1, 4, (6,), device=device)
        of_ids = ops.sigmoid_focal_loss(x, ids, pos_weight=torch.full((4,), 2.5, device=device))
        for factor in (2.5, torch.tensor(2.5), torch.tensor([2.5]), torch.tensor([[2.5]])):
            factor = factor.to(device) if isinstance(factor, torch.Tensor) else factor
            assert torch.equal(ops.sigmoid_focal_loss(x, targets, pos_weight=factor), expected)
            assert torch.equal(ops.sigmoid_focal_loss(x, ids, pos_weight=factor), of_ids)

    @pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
    def test_a_factor_of_zero_gives_zero_whatever_the_logit(self, device, dtype):
        x = torch.tensor([[math.nan, -math.inf], [1.0, 2.0]], dtype=dtype, device=device).t().contiguous()
        factors = torch.tensor([0.0, 1.0], device=device)
        for targets in (torch.ones(2, 2, device=device), torch.zeros(2, dtype=torch.int64, device=device)):
            loss, grad = loss_and_gradient(ops.sigmoid_focal_loss, x, targets, pos_weight=factors)
            assert loss[:, 0].tolist() == grad[:, 0].tolist() == [0.0, 0.0] and (loss[:, 1] > 0).all()

    def test_a_scalar_logit(self, device):
        x, target = torch.tensor(0.5, device=device), torch.tensor(1.0, device=device)
        once = ops.sigmoid_focal_loss(x, target)
        assert torch.equal(ops.sigmoid_focal_loss(x, target, pos_weight=2.0), 2 * once)
        assert ops.sigmoid_focal_loss(x, target, ignore_value=1) == 0

    def test_no_elements(self, device):
        x = torch.empty(0, 3, device=device)
        assert ops.sigmoid_focal_loss(x, x, pos_weight=torch.ones(3, device=device), ignore_value=0).shape == (0, 3)
        x = torch.empty(3, 0, device=device)
        assert ops.sigmoid_focal_loss(x, x, pos_weight=torch.ones(0, device=device)).shape == (3, 0)


class TestGradients:
    @pytest.mark.once
    @pytest.mark.parametrize("reduction", ("none", "sum"))
    def test_gradcheck(self, device, reduction):
        options = {"dtype": torch.float64, "device": device}
        x = torch.randn(4, 3, **options, requires_grad=True)
        soft = (torch.rand(4, 3, **options) * 0.8 + 0.1).requires_grad_()
        factors = torch.tensor([0.5, 2.0, 1.5], **options, requires_grad=True)
        ids = torch.tensor([0, 2, -1, -2], device=device)

        def of_ids(x, factors):
            return ops.sigmoid_focal_loss(x, ids, reduction=reduction, pos_weight=factors)

        def of_dense(x, t, factors):
            return ops.sigmoid_focal_loss(x, t, reduction=reduction, pos_weight=factors)

        for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
            assert check(of_ids, (x, factors))
            assert check(of_dense, (x, soft, factors))

    def test_ignored_targets_have_no_gradient(self, device):
        x = torch.randn(5, device=device, requires_grad=True)
        targets = torch.tensor([0.2, IGNORE, 0.7, IGNORE, 1.0], device=device, requires_grad=True)
        loss = ops.sigmoid_focal_loss(x, targets, ignore_value=IGNORE, reduction="sum")
        for grad in torch.autograd.grad(loss, (x, targets)):
            assert (grad != 0).tolist() == [True, False, True, False, True]

    def test_a_factor_of_zero_has_a_gradient(self, device):
        x = torch.ones(3, 3, device=device)
        factors = torch.tensor([0.0, 1.0, 2.0], device=device, requires_grad=True)
        for targets in (torch.ones(3, 3, device=device), torch.arange(3, device=device)):
            loss = ops.sigmoid_focal_loss(x, targets, reduction="sum", pos_weight=factors)
            (grad,) = torch.autograd.grad(loss, factors)
            torch.testing.assert_close(grad, grad[1].expand(3))
            assert grad[0] > 0

    def test_factors_of_maps_have_gradients_of_their_shape(self, device):
        x, targets = torch.randn(2, 3, 4, 5, device=device), dense_targets(2, 3, 4, 5, soft=True, device=device)
        factors = torch.tensor([0.5, 1.0, 2.0], device=device)[:, None, None].requires_grad_()
        loss = ops.sigmoid_focal_loss(x, targets, reduction="sum", pos_weight=factors)
        (grad,) = torch.autograd.grad(loss, factors)
        each = ops.sigmoid_focal_loss(x, targets, pos_weight=2.0) - ops.sigmoid_focal_loss(x, targets, pos_weight=1.0)
        torch.testing.assert_close(grad, each.sum((0, 2, 3))[:, None, None], rtol=1e-4, atol=1e-6)


class TestArguments:
    @pytest.mark.parametrize(
        ("targets", "options", "error", "message"),
        [
            (torch.zeros(2, 3), {"pos_weight": torch.ones(2)}, ValueError, r"pos_weight must .* \[3\], .* got \[2\]"),
            (torch.zeros(2, 3), {"pos_weight": torch.ones(2, 3)}, ValueError, r"pos_weight must .* got \[2, 3\]"),
            (torch.zeros(2, 3), {"pos_weight": torch.ones(1, 1, 3)}, ValueError, r"pos_weight must .* got \[1, 1, 3\]"),
            (torch.zeros(2).long(), {"pos_weight": torch.ones(1, 3)}, ValueError, r"pos_weight must .* \[3\], got"),
            (torch.zeros(2, 3), {"pos_weight": math.inf}, ValueError, "pos_weight must be finite, got inf"),
            (torch.zeros(2, 3), {"pos_weight": "2"}, TypeError, "pos_weight must be a number, got '2'"),
            (torch.zeros(2, 3), {"pos_weight": torch.ones(3, device="meta")}, ValueError, "pos_weight must be on"),
            (
                torch.zeros(2, 3),
                {"pos_weight": [1.0, 2.0, 3.0]},
                TypeError,
                "pos_weight must be a tensor, got list; conv",
            ),
            (
                torch.zeros(2, 3),
                {"pos_weight": np.ones(3)},
                TypeError,
                "pos_weight must be a tensor, got ndarray; conv",
            ),
            (torch.zeros(2, 3), {"pos_weight": torch.ones(3) + 1j}, TypeError, "pos_weight must be a floating or int"),
            (torch.zeros(2, 3), {"ignore_value": math.nan}, ValueError, "ignore_value must be a number, got nan"),
            (torch.zeros(2, 3), {"ignore_value": "a"}, TypeError, "ignore_value must be a number, got 'a'"),
            (torch.zeros(2).long(), {"ignore_value": -100}, ValueError, "ignore_value is for dense targets; .* is -2"),
        ],
    )
    def test_message_names_the_argument(self, targets, options, error, message):
        with pytest.raises(error, match=f"sigmoid_focal_loss: {message}"):
            ops.sigmoid_focal_loss(torch.zeros(2, 3), targets, **options)

    def test_direct_call_is_memory_safe(self, device):
        x, dense = torch.zeros(2, 3, 4, device=device), torch.zeros(2, 3, 4, device=device)
        ids = torch.zeros(2, 3, dtype=torch.int64, device=device)
        call = torch.ops.retinanet_ops.sigmoid_focal_loss
        for targets, shape in ((dense, (3,)), (dense, (2, 1)), (dense, (2, 2)), (dense, (9, 1, 1, 1)), (ids, (3, 1))):
            with pytest.raises(RuntimeError, match="pos_weight .*"):
                call(x, targets, torch.ones(shape, device=device), 0.25, 2.0, None, False)
        with pytest.raises(RuntimeError, match="pos_weight must be Float, got Double"):
            call(x, dense, torch.ones(4, dtype=torch.float64, device=device), 0.25, 2.0, None, False)

    def test_compiles_in_one_graph(self, device):
        targets, factors = dense_targets(16, 4, ignored=True, device=device), torch.rand(4, device=device)

        def function(x):
            return ops.sigmoid_focal_loss(x * 2, targets, reduction="sum", pos_weight=factors, ignore_value=IGNORE)

        x = logits(16, 4, device=device).requires_grad_()
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        assert torch.equal(torch.autograd.grad(compiled(x), x)[0], torch.autograd.grad(function(x), x)[0])
