"""`sigmoid_focal_loss` as a part of PyTorch: transforms, errors, `opcheck` and compilation."""

import warnings

import pytest
import torch
from focal_cases import class_targets, logits
from torch.autograd import forward_ad
from torch.library import opcheck

import retinanet_ops as ops


class TestTransforms:
    def test_forward_mode_raises(self, device):
        x, targets = torch.randn(4, 3, device=device), torch.zeros(4, dtype=torch.int64, device=device)
        with pytest.raises(NotImplementedError, match="sigmoid_focal_loss: forward-mode differentiation"):
            torch.func.jvp(lambda x: ops.sigmoid_focal_loss(x, targets), (x,), (x,))
        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode differentiation"):
            ops.dense_focal_loss([forward_ad.make_dual(x.reshape(1, 3, 2, 2), x.reshape(1, 3, 2, 2))], targets[None], 3)
        weight = torch.ones(1, 4, device=device)
        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode differentiation"):
            weight = forward_ad.make_dual(weight, weight)
            ops.dense_focal_loss([x.reshape(1, 3, 2, 2)], targets[None], 3, anchor_weight=weight)

    def test_functional_gradients_raise(self, device):
        x, targets = torch.randn(4, 3, device=device), torch.zeros(4, dtype=torch.int64, device=device)

        def loss(x):
            return ops.sigmoid_focal_loss(x, targets, reduction="sum")

        for transform in (torch.func.grad(loss), torch.func.jacrev(loss)):
            with pytest.raises(RuntimeError, match="functorch transforms"):
                transform(x)

    def test_vmap_equals_a_loop(self, device):
        x, targets = torch.randn(2, 4, 3, device=device), torch.zeros(4, dtype=torch.int64, device=device)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns that it runs a loop
            losses = torch.vmap(lambda x: ops.sigmoid_focal_loss(x, targets))(x)
        assert torch.equal(losses, torch.stack([ops.sigmoid_focal_loss(slice, targets) for slice in x]))


class TestErrors:
    @pytest.mark.parametrize(
        ("inputs", "targets", "options", "error", "message"),
        [
            (
                torch.zeros(3, 2, dtype=torch.int64),
                torch.zeros(3),
                {},
                TypeError,
                "inputs must be float16, .* got torch.int64",
            ),
            ([1.0], torch.zeros(1), {}, TypeError, "inputs must be a tensor, got list"),
            (
                torch.zeros(3, 2),
                torch.zeros(3),
                {},
                TypeError,
                "class ids must be an integer tensor, got torch.float32",
            ),
            (
                torch.zeros(3, 2),
                torch.zeros(2).long(),
                {},
                ValueError,
                r"class ids of shape \[3\], got \[2\]",
            ),
            (torch.zeros(3, 2), torch.zeros(2, 3), {}, ValueError, r"inputs' shape \[3, 2\].* got \[2, 3\]"),
            (torch.zeros(3, 2), torch.zeros(3, 2), {"gamma": -1}, ValueError, "gamma must be >= 0, got -1"),
            (
                torch.zeros(3, 2),
                torch.zeros(3, 2),
                {"alpha": 2},
                ValueError,
                "alpha must be in 0..1, .* got 2",
            ),
            (
                torch.zeros(3, 2),
                torch.zeros(3, 2),
                {"reduction": "avg"},
                ValueError,
                "reduction must be .* got 'avg'",
            ),
        ],
    )
    def test_message_names_the_argument(self, inputs, targets, options, error, message):
        with pytest.raises(error, match=f"sigmoid_focal_loss: .*{message}"):
            ops.sigmoid_focal_loss(inputs, targets, **options)

    def test_direct_call_is_memory_safe(self, device):
        with pytest.raises(RuntimeError, match=r"targets \[2\] do not fit inputs \[3, 2\]"):
            torch.ops.retinanet_ops.sigmoid_focal_loss(
                torch.zeros(3, 2, device=device),
                torch.zeros(2, dtype=torch.int64, device=device),
                None,
                0.25,
                2.0,
                None,
                False,
            )


class TestCompile:
    @pytest.mark.parametrize("reduce", (False, True))
    def test_opcheck(self, device, reduce):
        x = torch.randn(5, 3, device=device, requires_grad=True)
        ids = torch.tensor([0, -1, 2, -2, 1], device=device)
        factors = torch.rand(3, device=device)
        for targets, ignored in ((ids, None), (torch.rand(5, 3, device=device), -100.0)):
            for pos_weight in (None, factors):
                arguments = (x, targets, pos_weight, 0.25, 2.0, ignored)
                opcheck(torch.ops.retinanet_ops.sigmoid_focal_loss, (*arguments, reduce))
                grad = torch.randn((), device=device) if reduce else torch.randn(5, 3, device=device)
                opcheck(torch.ops.retinanet_ops.sigmoid_focal_loss_backward, (grad, *arguments))

    @pytest.mark.parametrize("dynamic", (False, True))
    def test_compiles_in_one_graph(self, device, dynamic):
        targets = class_targets(16, num_classes=4, device=device)

        def function(x):
            return ops.sigmoid_focal_loss(x * 2, targets, reduction="sum") / targets.ge(0).sum().clamp(min=1)

        x = logits(16, 4, device=device).requires_grad_()
        compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        assert torch.equal(torch.autograd.grad(compiled(x), x)[0], torch.autograd.grad(function(x), x)[0])
