"""`dense_box_loss` as a part of PyTorch: errors, `opcheck`, compilation and export."""

import pytest
import torch
from box_loss_cases import LAYOUTS, heads, small_grid, targets
from torch.library import opcheck

import retinanet_ops as ops
from retinanet_ops.reference._rows import rows_of

LEVEL = torch.zeros(2, 8, 2, 2)
ANCHORS, GT, MATCHES = torch.zeros(8, 4), torch.zeros(2, 3, 4), torch.zeros(2, 8, dtype=torch.int32)


class TestErrors:
    @pytest.mark.parametrize(
        ("levels", "anchors", "gt_boxes", "matches", "options", "error", "message"),
        [
            ([], ANCHORS, GT, MATCHES, {}, ValueError, "box_deltas must hold 1 to 16 levels, got 0"),
            ([LEVEL.int()], ANCHORS, GT, MATCHES, {}, TypeError, r"box_deltas\[0\] must be float16, .* torch.int32"),
            ([LEVEL[:, :6]], ANCHORS, GT, MATCHES, {}, ValueError, "4 channels for each anchor, got 6"),
            ([LEVEL], ANCHORS[:7], GT, MATCHES, {}, ValueError, "expected one row for each of the 7 anchors, got 8"),
            ([LEVEL], None, GT, MATCHES, {}, TypeError, "anchors must be a tensor or an AnchorGrid, got NoneType"),
            (
                [LEVEL],
                ANCHORS,
                GT[:1],
                MATCHES,
                {},
                ValueError,
                r"gt_boxes must have shape \[2, M, 4\], got \[1, 3, 4\]",
            ),
            ([LEVEL], ANCHORS, GT.int(), MATCHES, {}, TypeError, "gt_boxes must be float16, .* torch.int32"),
            ([LEVEL], ANCHORS, GT, MATCHES[:, :7], {}, ValueError, r"matches must have shape \[2, 8\], got \[2, 7\]"),
            (
                [LEVEL],
                ANCHORS,
                GT,
                MATCHES.float(),
                {},
                TypeError,
                "matches must be an integer tensor, .* torch.float32",
            ),
            ([LEVEL], ANCHORS, GT, MATCHES, {"kind": "l2"}, ValueError, "kind must be one of l1, .* got 'l2'"),
            ([LEVEL], ANCHORS, GT, MATCHES, {"beta": -1}, ValueError, "beta must be >= 0, got -1"),
            (
                [LEVEL],
                ANCHORS,
                GT,
                MATCHES,
                {"coder_weights": (1, 2)},
                ValueError,
                "coder_weights must hold 4 numbers, got 2",
            ),
        ],
    )
    def test_message_names_the_argument(self, levels, anchors, gt_boxes, matches, options, error, message):
        with pytest.raises(error, match=f"dense_box_loss: .*{message}"):
            ops.dense_box_loss(levels, anchors, gt_boxes, matches, **options)

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"levels": [LEVEL[:, :6]]}, "must have 4 channels per anchor"),
            ({"anchors": ANCHORS[:7]}, "box_deltas hold 8 anchors, expected 7"),
            (
                {"anchors": torch.zeros(0, 1, 8, 4)},
                r"anchors must have shape .*, got \[0, 1, 8, 4\]",
            ),
            ({"sizes": [-2, -2, 2], "steps": [8.0, 8, 0, 0]}, "grid_sizes must be 0 to 2.31 - 1, got -2"),
            (
                {"sizes": [2**31 - 1, 2**31 - 1, 2**31 - 1], "steps": [8.0, 8, 0, 0]},
                r"a level of a grid must have fewer than 2\^31 anchors, got more in level 0",
            ),
            (
                {"sizes": [0, 0, 2**31 - 1, 0, 0, 1], "steps": [8.0, 8, 0, 0] * 2},
                r"a grid must have fewer than 2\^31 base anchors, got 2147483648 up to level 1",
            ),
            ({"anchors": torch.zeros(3, 8, 4)}, r"anchors must have shape \[2, 8, 4\], got \[3, 8, 4\]"),
            ({"gt_boxes": GT[0]}, r"gt_boxes must have shape \[2, 0, 4\], got \[3, 4\]"),
            ({"gt_boxes": GT.double()}, "gt_boxes must be Float, got Double"),
            ({"matches": MATCHES[:, :7]}, r"matches must have shape \[2, 8\], got \[2, 7\]"),
            ({"matches": MATCHES.long()}, "matches must be Int, got Long"),
            ({"kind": "l2"}, "kind must be l1, smooth_l1, giou, diou or ciou, got l2"),
            ({"beta": -1.0}, "beta must be >= 0, got -1"),
            ({"coder_weights": [1.0]}, "coder_weights must hold 4 numbers, got 1"),
        ],
    )
    def test_direct_call_is_memory_safe(self, device, changed, message):
        arguments = {
            "levels": [LEVEL],
            "anchors": ANCHORS,
            "sizes": [],
            "steps": [],
            "gt_boxes": GT,
            "matches": MATCHES,
        }
        arguments |= {
            "kind": "l1",
            "beta": 0.1,
            "coder_weights": [1.0] * 4,
            "max_log_ratio": 4.0,
            "offset": 0.0,
        } | changed
        values = [
            [t.to(device) for t in v] if k == "levels" else v.to(device) if isinstance(v, torch.Tensor) else v
            for k, v in arguments.items()
        ]
        with pytest.raises(RuntimeError, match=message):
            torch.ops.retinanet_ops.dense_box_loss(*values)
        with pytest.raises(RuntimeError, match=message):
            torch.ops.retinanet_ops.dense_box_loss_backward(
                torch.ones(2, device=device),
                *values[:6],
                torch.zeros(2, 1, dtype=torch.int32, device=device),
                *values[6:],
            )

    @pytest.mark.parametrize(
        ("matched", "message"),
        [
            (torch.zeros(2, 2, dtype=torch.int32), r"matched must have shape \[2, 1\], got \[2, 2\]"),
            (torch.zeros(2, 1, dtype=torch.int64), "matched must be Int, got Long"),
        ],
    )
    def test_direct_call_checks_the_bits_of_matches(self, device, matched, message):
        inputs = [t.to(device) for t in (torch.ones(2), LEVEL, ANCHORS, GT, MATCHES, matched)]
        grad, level, anchors, *of_matches = inputs
        with pytest.raises(RuntimeError, match=message):
            torch.ops.retinanet_ops.dense_box_loss_backward(
                grad, [level], anchors, [], [], *of_matches, "l1", 0.1, [1.0] * 4, 4.0, 0.0
            )


class TestMatched:
    """The bits that the forward pass saves, one per anchor, to say whether the anchor has a match."""

    def test_bits_of_other_matches_are_memory_safe(self, device):
        sizes = ((7, 5), (3, 4))
        levels = [level.detach() for level in heads(sizes=sizes, device=device)]
        grid, gt_boxes, matches = targets(device, grid=small_grid(device, sizes))
        options = ("l1", 0.1, [1.0] * 4, 4.0, 0.0)
        arguments = (levels, *grid.arguments(), gt_boxes, matches)
        _, matched = torch.ops.retinanet_ops.dense_box_loss(*arguments, *options)

        def gradients(matched):
            grad = torch.ones(2, device=device)
            return torch.ops.retinanet_ops.dense_box_loss_backward(grad, *arguments, matched, *options)

        right, all_set = rows_of(gradients(matched), 4), rows_of(gradients(torch.full_like(matched, -1)), 4)
        assert torch.equal(all_set[matches >= 0], right[matches >= 0]) and all_set[matches < 0].isnan().all()
        assert not any(grad.any() for grad in gradients(torch.zeros_like(matched)))

    def test_bits_say_which_anchors_have_a_match(self, device):
        sizes = ((7, 5), (3, 4))  # the last word is not full
        levels = [level.detach() for level in heads(sizes=sizes, device=device)]
        grid, gt_boxes, matches = targets(device, grid=small_grid(device, sizes))
        options = ("l1", 0.1, [1.0] * 4, 4.0, 0.0)
        _, matched = torch.ops.retinanet_ops.dense_box_loss(levels, *grid.arguments(), gt_boxes, matches, *options)
        assert matched.shape == (2, -(-grid.num_anchors // 32)) and grid.num_anchors % 32 != 0
        bits = (matched[..., None] >> torch.arange(32, device=device) & 1).flatten(1)
        assert (
            torch.equal(bits[:, : grid.num_anchors].bool(), matches >= 0) and (bits[:, grid.num_anchors :] == 0).all()
        )


class TestCompile:
    @pytest.mark.parametrize(("with_grid", "layout"), zip((False, True), LAYOUTS, strict=True))
    def test_opcheck(self, device, with_grid, layout):
        sizes = ((3, 4), (1, 2))
        levels = heads(sizes=sizes, device=device, layout=layout)
        grid, gt_boxes, matches = targets(device, grid=small_grid(device, sizes))
        anchors = grid.arguments() if with_grid else (grid.boxes(), [], [])
        arguments = (levels, *anchors, gt_boxes, matches, "giou", 0.1, [1.0] * 4, 4.0, 0.0)
        opcheck(torch.ops.retinanet_ops.dense_box_loss, arguments)
        _, matched = torch.ops.retinanet_ops.dense_box_loss(*arguments)
        backward_arguments = (torch.ones(2, device=device), *arguments[:6], matched, *arguments[6:])
        opcheck(torch.ops.retinanet_ops.dense_box_loss_backward, backward_arguments)

    @pytest.mark.parametrize("dynamic", (False, True))
    def test_compiles_in_one_graph(self, device, dynamic):
        arguments = targets(device)

        def function(levels):
            return ops.dense_box_loss([x * 2 for x in levels], *arguments, kind="diou").mean()

        levels = heads(device=device)
        compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        got = torch.autograd.grad(compiled(levels), levels)
        assert all(map(torch.equal, got, torch.autograd.grad(function(levels), levels)))

    def test_exports(self, device):
        grid = small_grid(device)

        class Loss(torch.nn.Module):
            def forward(self, levels, gt_boxes, matches):
                return ops.dense_box_loss(levels, grid, gt_boxes, matches)

        levels, (_, gt_boxes, matches) = [level.detach() for level in heads(device=device)], targets(device)
        program = torch.export.export(Loss(), (levels, gt_boxes, matches))
        assert torch.equal(program.module()(levels, gt_boxes, matches), Loss()(levels, gt_boxes, matches))
