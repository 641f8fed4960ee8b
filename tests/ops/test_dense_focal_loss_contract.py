"""`dense_focal_loss` as a part of PyTorch: errors, `opcheck`, compilation, export and transforms."""

import pytest
import torch
from focal_cases import LAYOUTS, class_labels, heads
from torch.library import opcheck

import retinanet_ops as ops

LEVEL = torch.zeros(2, 6, 2, 2)
LABELS = torch.zeros(2, 8, dtype=torch.int32)


class TestErrors:
    @pytest.mark.parametrize(
        ("levels", "labels", "options", "error", "message"),
        [
            ([], LABELS, {}, ValueError, "cls_logits must hold 1 to 16 levels, got 0"),
            ([LEVEL] * 17, LABELS, {}, ValueError, "cls_logits must hold 1 to 16 levels, got 17"),
            ([LEVEL.int()], LABELS, {}, TypeError, r"cls_logits\[0\] must be float16, .* got torch.int32"),
            ([LEVEL, LEVEL[0]], LABELS, {}, ValueError, r"cls_logits\[1\] must have shape \[2, A\*K, H, W\]"),
            ([LEVEL, LEVEL[:1]], LABELS, {}, ValueError, r"cls_logits\[1\] must have shape \[2, A\*K, H, W\]"),
            (
                [LEVEL, LEVEL.half()],
                LABELS,
                {},
                TypeError,
                r"cls_logits\[1\] must have .* dtype torch.float32, got torch.float16",
            ),
            ([LEVEL], LABELS.float(), {}, TypeError, "labels must be an integer tensor, got torch.float32"),
            ([LEVEL], LABELS[:1], {}, ValueError, r"labels must have shape \[2, 8\], .*, got \[1, 8\]"),
            ([LEVEL], LABELS[:, :7], {}, ValueError, "one entry for each anchor, got \\[2, 7\\]"),
            ([LEVEL], LABELS[:, :0], {}, ValueError, "one entry for each anchor, got \\[2, 0\\]"),
            (
                [LEVEL, torch.zeros(2, 4, 3, 1)],
                torch.zeros(2, 9, dtype=torch.int32),
                {},
                ValueError,
                r"cls_logits\[1\] must have a multiple of num_classes 3 channels, got 4",
            ),
            ([LEVEL], LABELS, {"num_classes": 0}, ValueError, "num_classes must be at least 1, got 0"),
            (
                [LEVEL],
                LABELS,
                {"num_classes": 2**23 + 1},
                ValueError,
                "num_classes must be at most 8388608, got 8388609",
            ),
            ([LEVEL], LABELS, {"num_classes": 3.0}, TypeError, "num_classes must be an integer, got 3.0"),
            # With 6 classes, this many labels would be right.
            ([LEVEL], LABELS[:, ::2], {}, ValueError, r"labels must have shape \[2, 8\], .*, got \[2, 4\]"),
            ([LEVEL], LABELS, {"gamma": -1}, ValueError, "gamma must be >= 0, got -1"),
            ([LEVEL], LABELS, {"gamma": float("nan")}, ValueError, "gamma must be >= 0, got nan"),
            ([LEVEL], LABELS, {"alpha": 2}, ValueError, "alpha must be in 0..1, .* got 2"),
            ([LEVEL], LABELS, {"label_smoothing": 1.5}, ValueError, "label_smoothing must be in 0..1, got 1.5"),
            (
                [LEVEL],
                LABELS,
                {"anchor_weight": LABELS},
                TypeError,
                "anchor_weight must be float16, .* got torch.int32",
            ),
            (
                [LEVEL],
                LABELS,
                {"anchor_weight": torch.ones(2, 7)},
                ValueError,
                r"anchor_weight must have shape \[2, 8\], got \[2, 7\]",
            ),
        ],
    )
    def test_message_names_the_argument(self, levels, labels, options, error, message):
        with pytest.raises(error, match=f"dense_focal_loss: .*{message}"):
            ops.dense_focal_loss(levels, labels, **({"num_classes": 3} | options))

    @pytest.mark.parametrize(
        ("labels", "weight", "num_classes", "message"),
        [
            (LABELS[:, :7], None, 3, r"labels must have shape \[2, 8\], got \[2, 7\]"),
            (LABELS.long(), None, 3, "labels must be Int, got Long"),
            (LABELS, torch.ones(2, 7), 3, r"weight must have shape \[2, 8\], got \[2, 7\]"),
            (LABELS, torch.ones(2, 8).double(), 3, "weight must be Float, got Double"),
            (LABELS, None, 4, r"cls_logits \[2, 6, 2, 2\] do not fit 4 classes"),
            (LABELS, None, 0, "expected 1 to 8388608 classes, got 0"),
            (LABELS, None, 2**23 + 1, "expected 1 to 8388608 classes, got 8388609"),
        ],
    )
    def test_direct_call_is_memory_safe(self, device, labels, weight, num_classes, message):
        arguments = (
            [LEVEL.to(device)],
            labels.to(device),
            None if weight is None else weight.to(device),
            num_classes,
            0.25,
            2.0,
            0.0,
        )
        with pytest.raises(RuntimeError, match=message):
            torch.ops.retinanet_ops.dense_focal_loss(*arguments)
        with pytest.raises(RuntimeError, match=message):
            torch.ops.retinanet_ops.dense_focal_loss_backward(torch.ones(2, device=device), *arguments)


class TestCompile:
    @pytest.mark.parametrize(("weighted", "layout"), zip((False, True), LAYOUTS, strict=True))
    def test_opcheck(self, device, weighted, layout):
        grids = ((3, 4), (1, 2))
        levels = heads(3, grids=grids, device=device, layout=layout)
        labels = class_labels(3, grids=grids, device=device)
        weight = torch.rand(labels.shape).to(device) if weighted else None
        arguments = (levels, labels, weight, 3, 0.25, 2.0, 0.0)
        opcheck(torch.ops.retinanet_ops.dense_focal_loss, arguments)
        opcheck(torch.ops.retinanet_ops.dense_focal_loss_backward, (torch.ones(2, device=device), *arguments))

    @pytest.mark.parametrize("dynamic", (False, True))
    def test_compiles_in_one_graph(self, device, dynamic):
        labels = class_labels(3, device=device)

        def function(levels):
            return (ops.dense_focal_loss([x * 2 for x in levels], labels, 3) / labels.ge(0).sum(1).clamp(min=1)).mean()

        levels = heads(3, device=device)
        compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        got = torch.autograd.grad(compiled(levels), levels)
        expected = torch.autograd.grad(function(levels), levels)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))

    def test_exports(self, device):
        class Loss(torch.nn.Module):
            def forward(self, levels, labels):
                return ops.dense_focal_loss(levels, labels, 3)

        levels = [level.detach() for level in heads(3, device=device)]
        labels = class_labels(3, device=device)
        program = torch.export.export(Loss(), (levels, labels))
        assert torch.equal(program.module()(levels, labels), ops.dense_focal_loss(levels, labels, 3))

    def test_functional_gradients_raise(self, device):
        levels, labels = [level.detach() for level in heads(3, device=device)], class_labels(3, device=device)
        function = torch.func.grad(lambda *levels: ops.dense_focal_loss(levels, labels, 3).sum())
        with pytest.raises(RuntimeError, match="functorch transforms"):
            function(*levels)
