"""Candidates before NMS, and detections whose boxes are clipped before or after NMS."""

import math

import pytest
import torch
from cases import FLOATING
from detect_cases import IMAGE_SIZES, assert_same, grid_anchors, heads

import retinanet_ops as ops
from retinanet_ops import reference

OPTIONS = {
    "score_threshold": 0.2,
    "coder_weights": (10.0, 10.0, 5.0, 5.0),
    "offset": 1.0,
    "max_log_ratio": 0.01,
    "min_log_ratio": -0.02,
}


def assert_same_candidates(actual, expected):
    """Compare decisions exactly, and boxes and scores within rounding (the exponential is not that of torch)."""
    for name in ("labels", "anchor_index", "truncated"):
        assert torch.equal(getattr(actual, name), getattr(expected, name)), name
    torch.testing.assert_close(actual.scores, expected.scores, rtol=1e-6, atol=0)
    torch.testing.assert_close(actual.boxes, expected.boxes, rtol=1e-6, atol=1e-3)


def clipped_after_nms(logits, deltas, anchors, sizes, max_detections, options):
    """Return the detections that other ops give: candidates, boxes decoded without clipping, NMS, and clipping."""
    candidates = ops.candidates(logits, deltas, anchors, sizes, **options)
    rows = torch.cat([level.unflatten(1, (-1, 4)).permute(0, 3, 4, 1, 2).flatten(1, 3) for level in deltas], dim=1)
    anchor = candidates.anchor_index.clamp(min=0)  # the anchor of an unused slot is -1
    coder = {name: value for name, value in options.items() if name not in ("score_threshold", "topk_per_level")}
    boxes = ops.decode_boxes(rows.gather(1, anchor[..., None].expand(-1, -1, 4)), anchors.boxes()[anchor], **coder)
    index, count = ops.batched_nms_padded(
        boxes, candidates.scores, candidates.labels, iou_threshold=0.5, max_detections=max_detections + 1
    )
    index, unused = index[:, :max_detections].clamp(min=0), index[:, :max_detections] < 0
    kept = ops.clip_boxes(boxes.gather(1, index[..., None].expand(-1, -1, 4)), sizes)
    return ops.Detections(
        boxes=kept.masked_fill(unused[..., None], 0),
        scores=candidates.scores.gather(1, index).masked_fill(unused, 0),
        labels=candidates.labels.gather(1, index).masked_fill(unused, -1),
        count=count.clamp(max=max_detections),
        anchor_index=candidates.anchor_index.gather(1, index).masked_fill(unused, -1),
        truncated=candidates.truncated | (count > max_detections),
    )


class TestCandidates:
    @pytest.mark.parametrize("dtype", FLOATING)
    @pytest.mark.parametrize("clip", (False, True))
    @pytest.mark.parametrize("topk", (7, 100_000))
    def test_equals_reference(self, device, dtype, clip, topk):
        logits, deltas = heads(device, dtype)
        sizes = IMAGE_SIZES.to(device) if clip else None
        candidates = ops.candidates(logits, deltas, grid_anchors(device), sizes, topk_per_level=topk)
        assert candidates.boxes.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert_same_candidates(
            candidates, reference.candidates(logits, deltas, grid_anchors(device), sizes, topk_per_level=topk)
        )
        assert clip == bool((candidates.boxes >= 0).all())

    @pytest.mark.parametrize("topk", (1, 64, 500, 512, 2000))
    def test_equal_logits_are_taken_by_index(self, device, topk):
        logits, deltas = heads(device)
        logits = [torch.full_like(level, -1.0) for level in logits]
        candidates = ops.candidates(logits, deltas, grid_anchors(device), topk_per_level=topk)
        assert_same_candidates(
            candidates, reference.candidates(logits, deltas, grid_anchors(device), topk_per_level=topk)
        )

    @pytest.mark.parametrize("batched", (False, True))
    def test_options_and_explicit_anchors(self, device, batched):
        logits, deltas = heads(device)
        anchors = grid_anchors(device).boxes()
        anchors = torch.stack((anchors, anchors + 3)) if batched else anchors
        actual = ops.candidates(logits, deltas, anchors, **OPTIONS)
        assert_same_candidates(actual, reference.candidates(logits, deltas, anchors, **OPTIONS))
        double = ops.candidates(logits, deltas, anchors.double(), **OPTIONS)
        assert double.boxes.dtype == torch.float64
        assert_same_candidates(double, reference.candidates(logits, deltas, anchors.double(), **OPTIONS))

    def test_unused_slots(self, device):
        logits, deltas = heads(device)
        logits[0][1] = -math.inf
        candidates = ops.candidates(logits, deltas, grid_anchors(device), topk_per_level=5000, score_threshold=0.3)
        unused = candidates.labels < 0
        assert unused.any(1).all() and (~unused).any(1).all()
        assert (candidates.scores[unused] == -math.inf).all() and (candidates.scores[~unused] > 0.3).all()
        assert (candidates.boxes[unused] == 0).all() and (candidates.anchor_index[unused] == -1).all()
        assert torch.equal(unused, unused.sort(dim=1).values)

    def test_truncated_reports_a_level(self, device):
        logits, deltas = heads(device)
        logits[2][0] = 5.0  # 72 anchors of five classes pass in the last level of the first image
        logits[:2] = [level - 100 for level in logits[:2]]
        for topk, truncated in ((359, True), (360, False)):
            result = ops.candidates(logits, deltas, grid_anchors(device), topk_per_level=topk)
            assert result.truncated.tolist() == [truncated, False]

    def test_no_images_and_no_cells(self, device):
        logits, deltas = heads(device, images=0)
        assert ops.candidates(logits, deltas, grid_anchors(device)).boxes.shape[::2] == (0, 4)
        logits, deltas = heads(device, grid_sizes=((0, 4),))
        candidates = ops.candidates(logits, deltas, torch.zeros(0, 4, device=device))
        assert candidates.boxes.shape == (2, 0, 4) and candidates.truncated.tolist() == [False, False]

    def test_nms_of_candidates_is_detect(self, device):
        logits, deltas = heads(device, spread=6.0)
        logits[0][0, 0] = 20.0  # scores that round to 1 keep the order of their logits
        logits[0][0, 5] = 21.0
        anchors, sizes = grid_anchors(device), IMAGE_SIZES.to(device)
        detections = ops.detect(logits, deltas, anchors, sizes, topk_per_level=100)
        candidates = ops.candidates(logits, deltas, anchors, sizes, topk_per_level=100)
        index, count = ops.batched_nms_padded(
            candidates.boxes, candidates.scores, candidates.labels, iou_threshold=0.5, max_detections=100
        )
        assert torch.equal(count, detections.count) and count.min() > 5
        for n, kept in enumerate(count.tolist()):
            for name in ("boxes", "scores", "labels", "anchor_index"):
                values = getattr(candidates, name)[n, index[n, :kept]]
                assert torch.equal(values, getattr(detections, name)[n, :kept]), name

    def test_message_names_the_op(self, device):
        logits, deltas = heads(device)
        anchors = grid_anchors(device)
        with pytest.raises(ValueError, match=r"candidates: image_sizes must have shape \[2, 2\], got \[1, 2\]"):
            ops.candidates(logits, deltas, anchors, IMAGE_SIZES[:1].to(device))
        with pytest.raises(
            TypeError, match=r"candidates: image_sizes must be a tensor or \(height, width\) pairs, got"
        ):
            ops.candidates(logits, deltas, anchors, 96)
        with pytest.raises(ValueError, match="candidates: topk_per_level must be at least 1, got 0"):
            ops.candidates(logits, deltas, anchors, topk_per_level=0)


class TestClip:
    @pytest.mark.parametrize("dtype", FLOATING)
    @pytest.mark.parametrize("clip", ("before_nms", "after_nms"))
    def test_equals_reference(self, device, dtype, clip):
        logits, deltas = heads(device, dtype)
        arguments = logits, [d * 3 for d in deltas], grid_anchors(device), IMAGE_SIZES.to(device)
        options = {"clip": clip, "max_per_class": 15, "score_threshold": 0.1}
        assert_same(ops.detect(*arguments, **options), reference.detect(*arguments, **options), atol=2e-3)

    @pytest.mark.parametrize("dtype", FLOATING)
    @pytest.mark.parametrize("max_detections", (1, 30, 1000))
    @pytest.mark.parametrize("options", ({}, {"topk_per_level": 40, **OPTIONS}), ids=("defaults", "options"))
    def test_after_nms_equals_other_ops_bit_for_bit(self, device, dtype, max_detections, options):
        logits, deltas = heads(device, dtype)
        arguments = logits, [d * 3 for d in deltas], grid_anchors(device), IMAGE_SIZES.to(device)
        actual = ops.detect(*arguments, max_detections=max_detections, clip="after_nms", **options)
        expected = clipped_after_nms(*arguments, max_detections, options)
        for name, value, other in zip(actual._fields, actual, expected, strict=True):
            assert torch.equal(value, other), name

    def test_order_matters_at_the_border(self, device):
        """The IoU of the two boxes is 0.2, but their clipped parts are the same box."""
        anchors = torch.tensor([[-32.0, 0, 8, 8], [0, 0, 8, 8]], device=device)
        logits = [torch.tensor([2.0, 1.0], device=device).view(1, 1, 1, 2)]
        deltas = [torch.zeros(1, 4, 1, 2, device=device)]
        sizes = torch.tensor([[8, 8]], device=device)
        before = ops.detect(logits, deltas, anchors, sizes, max_detections=3)
        after = ops.detect(logits, deltas, anchors, sizes, max_detections=3, clip="after_nms")
        assert before.count.tolist() == [1] and after.count.tolist() == [2]
        assert after.boxes.tolist() == [[[0, 0, 8, 8], [0, 0, 8, 8], [0, 0, 0, 0]]]

    def test_message(self, device):
        logits, deltas = heads(device)
        with pytest.raises(ValueError, match="detect: clip must be 'before_nms' or 'after_nms', got 'never'"):
            ops.detect(logits, deltas, grid_anchors(device), IMAGE_SIZES.to(device), clip="never")


class TestCompile:
    @pytest.mark.parametrize("clip", ("before_nms", "after_nms"))
    def test_exports_without_a_subgraph(self, device, clip):
        anchors, sizes = grid_anchors(device), IMAGE_SIZES.to(device)

        class Module(torch.nn.Module):
            def forward(self, logits, deltas):
                candidates = ops.candidates(logits, deltas, anchors, topk_per_level=50)
                return *candidates, *ops.detect(logits, deltas, anchors, sizes, topk_per_level=50, clip=clip)

        logits, deltas = heads(device)
        program = torch.export.export(Module(), (logits, deltas))
        targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
        assert "retinanet_ops.select_candidates.default" in targets
        assert not any("wrap_with_set_grad_enabled" in target for target in targets)
        assert [name for name, _ in program.graph_module.named_modules() if name] == []
        arguments = heads(device)
        results = zip(program.module()(*arguments), Module()(*arguments), strict=True)
        assert all(torch.equal(a, b) for a, b in results)

    @pytest.mark.parametrize("clip", ("before_nms", "after_nms"))
    def test_compiles_in_one_graph(self, device, clip):
        logits, deltas = heads(device)
        anchors, sizes = grid_anchors(device), IMAGE_SIZES.to(device)

        def function(logits, deltas):
            candidates = ops.candidates(logits, deltas, anchors, topk_per_level=50)
            return *candidates, *ops.detect(logits, deltas, anchors, sizes, topk_per_level=50, clip=clip)

        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        for a, b in zip(compiled(logits, deltas), function(logits, deltas), strict=True):
            assert torch.equal(a, b)

    def test_no_gradient_reaches_the_arguments(self, device):
        logits, deltas = heads(device)
        anchors, sizes = grid_anchors(device).boxes().requires_grad_(), IMAGE_SIZES.to(device).float().requires_grad_()
        for level in (*logits, *deltas):
            level.requires_grad_()
        results = (
            *ops.candidates(logits, deltas, anchors, sizes),
            *ops.detect(logits, deltas, anchors, sizes),
            *ops.detect(logits, deltas, anchors, sizes, clip="after_nms"),
        )
        assert not any(result.requires_grad for result in results)
