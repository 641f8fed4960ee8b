"""Soft-NMS of padded batches."""

import math

import pytest
import torch
from cases import DEGENERATE_BOXES, FLOATING, SIZES, random_boxes, unaligned
from torch.library import opcheck

import retinanet_ops as ops
from retinanet_ops import reference

METHODS = ("gaussian", "linear")


def candidates(*shape, num_classes=3):
    """Return boxes, scores that differ by more than rounding errors, and classes."""
    count = shape[-1]
    scores = torch.stack([torch.randperm(count) for _ in range(math.prod(shape[:-1]))]).view(shape)
    return random_boxes(*shape), (scores + 1) / (count + 1), torch.randint(0, num_classes, shape)


def assert_equal_results(actual, expected):
    (index, score, count), (expected_index, expected_score, expected_count) = actual, expected
    assert torch.equal(index.cpu(), expected_index) and torch.equal(count.cpu(), expected_count)
    rtol = 1e-12 if score.dtype == torch.float64 else 1e-5
    torch.testing.assert_close(score.cpu(), expected_score.to(score.dtype), rtol=rtol, atol=1e-7)


class TestForward:
    @pytest.mark.parametrize("n", SIZES)
    @pytest.mark.parametrize("method", METHODS)
    def test_sizes(self, device, method, n):
        arguments = candidates(2, n)
        options = {"method": method, "max_detections": 20}
        assert_equal_results(
            ops.soft_nms(*(t.to(device) for t in arguments), **options),
            reference.soft_nms(arguments[0].double(), *arguments[1:], **options),
        )

    @pytest.mark.parametrize("dtype", FLOATING)
    @pytest.mark.parametrize("method", METHODS)
    def test_dtypes(self, device, method, dtype):
        boxes, scores, labels = candidates(1, 120)
        boxes, scores = boxes.to(dtype), scores.to(dtype)
        options = {"method": method, "max_detections": 60, "sigma": 0.3, "iou_threshold": 0.2, "min_score": 0.05}
        actual = ops.soft_nms(boxes.to(device), scores.to(device), labels.to(device), **options)
        assert actual[1].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert_equal_results(actual, reference.soft_nms(boxes, scores, labels, **options))

    def test_example_computed_by_hand(self, device):
        # The second box is one half of the first: IoU 1/2.
        boxes = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 10, 5], [50, 50, 60, 60]]], device=device)
        scores = torch.tensor([[0.9, 0.8, 0.3]], device=device)
        index, score, count = ops.soft_nms(boxes, scores, method="linear", max_detections=4)
        assert index.tolist() == [[0, 1, 2, -1]] and count.tolist() == [3]
        torch.testing.assert_close(score.cpu(), torch.tensor([[0.9, 0.4, 0.3, 0.0]]))
        index, score, _ = ops.soft_nms(boxes, scores, method="gaussian", sigma=0.25, max_detections=3)
        assert index.tolist() == [[0, 2, 1]]
        torch.testing.assert_close(score.cpu(), torch.tensor([[0.9, 0.3, 0.8 * math.exp(-1)]]))

    def test_iou_at_the_threshold_keeps_its_score(self, device):
        boxes = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 10, 5]]], device=device)
        scores = torch.tensor([[0.9, 0.8]], device=device)
        kept = ops.soft_nms(boxes, scores, method="linear", iou_threshold=0.5, max_detections=2)[1]
        assert torch.equal(kept, scores)
        lowered = ops.soft_nms(boxes, scores, method="linear", iou_threshold=0.499, max_detections=2)[1]
        torch.testing.assert_close(lowered.cpu(), torch.tensor([[0.9, 0.4]]))

    def test_counts_and_classes(self, device):
        boxes, scores, labels = candidates(5, 300)
        scores[4, 299] = 2  # the best score, but beyond the count
        counts = torch.tensor([300, 400, 17, -4, 299])
        options = {"max_detections": 30, "method": "linear"}
        for classes in (labels, labels * 2**40, None):
            on_device = (None if t is None else t.to(device) for t in (boxes, scores, classes))
            actual = ops.soft_nms(*on_device, counts=counts.to(device), **options)
            assert_equal_results(actual, reference.soft_nms(boxes, scores, classes, counts=counts, **options))


class TestManyCandidates:
    """More candidates than the CUDA kernel keeps up to date at first, or than it holds in registers."""

    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
    @pytest.mark.parametrize("size", (60.0, 600.0))
    def test_crowded_and_sparse(self, device, method, dtype, size):
        boxes, scores, labels = candidates(1, 2100, num_classes=2)
        boxes, scores = (boxes * (size / 100)).to(dtype), scores.to(dtype)
        options = {"method": method, "max_detections": 140, "min_score": 0.01}
        actual = ops.soft_nms(boxes.to(device), scores.to(device), labels.to(device), **options)
        expected = reference.soft_nms(boxes.double(), scores.double(), labels, **options)
        assert torch.equal(actual[2].cpu(), expected[2])
        # Rounding to float32 may swap candidates whose lowered scores are almost equal.
        rtol = 1e-12 if dtype == torch.float64 else 1e-5
        torch.testing.assert_close(actual[1].cpu(), expected[1].to(dtype), rtol=rtol, atol=1e-7)
        if dtype == torch.float64:
            assert torch.equal(actual[0].cpu(), expected[0])

    def test_equal_boxes_lower_every_score(self, device):
        boxes = torch.tensor([0.0, 0, 8, 8]).repeat(1, 1500, 1)
        scores = torch.ones(1, 1500)
        boxes[:, 700:] = torch.tensor([0.0, 0, 8, 4])
        options = {"method": "linear", "max_detections": 70, "min_score": 0.0}
        actual = ops.soft_nms(boxes.to(device), scores.to(device), **options)
        expected = reference.soft_nms(boxes, scores, **options)
        assert all(torch.equal(a.cpu(), e) for a, e in zip(actual, expected, strict=True))

    def test_scores_that_differ_in_float64_only(self, device):
        boxes = torch.arange(900, device=device)[:, None] * 20 + torch.tensor([0.0, 0, 9, 9], device=device)
        scores = 0.5 + torch.arange(900, dtype=torch.float64, device=device) * 1e-13
        index, _, count = ops.soft_nms(boxes.double()[None], scores[None], max_detections=1000)
        assert index[0].tolist() == [*range(899, -1, -1), *[-1] * 100] and count.item() == 900

    @pytest.mark.parametrize(
        "options", ({"sigma": 10.0}, {"method": "linear", "min_score": 0.48}), ids=("gaussian", "minimum")
    )
    @pytest.mark.parametrize("leaders", (1, 63, 64, 65))
    def test_candidates_that_become_the_best_late(self, device, leaders, options):
        # Each follower overlaps one leader by half. A leader lowers its followers of the first tier below those of the
        # others, which the CUDA kernel then has to lower by all leaders, of which it takes 64 at a time.
        followers = torch.arange(1400 - leaders) % leaders
        x = torch.cat((torch.arange(leaders), followers))[:, None] * 40
        boxes = x * torch.tensor([1.0, 0, 1, 0]) + torch.tensor([0.0, 0, 10, 5])
        boxes[:leaders, 3] = 10
        tiers = torch.tensor([0.97, 0.956, 0.9515]).repeat_interleave(torch.tensor([400 - leaders, 420, 580]))
        scores = torch.cat((2 - torch.arange(leaders) / 1024, tiers + torch.rand(1400 - leaders) * 0.003)).double()
        order = torch.randperm(1400)
        arguments = boxes[order].double()[None], scores[order][None]
        actual = ops.soft_nms(*(t.to(device) for t in arguments), max_detections=1400, **options)
        assert_equal_results(actual, reference.soft_nms(*arguments, max_detections=1400, **options))

    def test_lowered_score_ties_with_one_that_is_not_yet_up_to_date(self, device):
        # The CUDA kernel starts with the 512 highest scores, which are all but the first one.
        tied = 0.25 - 2.0**-26  # the float32 number below 0.25
        boxes = torch.arange(513)[:, None] * 20 + torch.tensor([0.0, 0, 10, 10])
        boxes[1] = boxes[2] - torch.tensor([0.0, 0, 0, 5])  # one half of the third box
        scores = torch.full((513,), 0.25)
        scores[:3] = torch.tensor([tied, 2 * tied, 1.0])
        index, score, _ = ops.soft_nms(
            boxes[None].to(device), scores[None].to(device), method="linear", min_score=0.0, max_detections=513
        )
        assert index[0].tolist() == [2, *range(3, 513), 0, 1] and score[0, -2:].tolist() == [tied, tied]

    @pytest.mark.parametrize("steps", range(4))
    def test_the_first_candidate_becomes_the_best_late(self, device, steps):
        # A CUDA block looks first at the 256 candidates with the highest scores. The best of them lowers all others to
        # 0, so their warps have no candidate when the block takes `steps` boxes and then box 0, which is activated
        # later. Box 0 has a copy of lower score, which must not be taken.
        same = torch.tensor([[0.0, 0, 10, 10]]).expand(300, 4)
        apart = torch.tensor([[0.0, 0, 10, 10]]) + 20 * torch.arange(1, 2 + steps)[:, None]
        boxes = torch.cat((apart[-1:], same, apart[:-1], apart[-1:]))[None]
        scores = torch.cat(
            (torch.tensor([0.2]), torch.linspace(1, 0.6, 300), torch.linspace(0.4, 0.3, steps), torch.tensor([0.1]))
        )[None]
        options = {"method": "linear", "max_detections": 10}
        index, _, count = ops.soft_nms(boxes.to(device), scores.to(device), **options)
        assert count.tolist() == [2 + steps]
        assert index[0, : 2 + steps].tolist() == [1, *range(301, 301 + steps), 0]


class TestEdgeCases:
    def test_equal_scores_take_the_lower_index(self, device):
        boxes = torch.arange(600, device=device)[:, None] * 20 + torch.tensor([0.0, 0, 9, 9], device=device)
        scores = torch.full((1, 600), 0.5, device=device)
        index, _, count = ops.soft_nms(boxes[None], scores, max_detections=700)
        assert index[0, :600].tolist() == list(range(600)) and count.tolist() == [600]

    def test_a_score_at_the_minimum_is_not_taken(self, device):
        boxes = random_boxes(1, 3).to(device)
        scores = torch.tensor([[0.25, 0.5, 0.25]], device=device)
        assert ops.soft_nms(boxes, scores, min_score=0.25, max_detections=3)[0].tolist() == [[1, -1, -1]]

    @pytest.mark.parametrize("others", (0, 1000))  # the CUDA kernel holds 512 candidates in registers
    def test_a_score_lowered_to_the_minimum_is_not_taken(self, device, others):
        # The last box is one half of the first: IoU 1/2.
        boxes = torch.arange(2 + others)[:, None] * 20 + torch.tensor([0.0, 0, 10, 10])
        boxes[-1] = torch.tensor([0.0, 0, 10, 5])
        scores = torch.full((2 + others,), 0.75)
        scores[[0, -1]] = torch.tensor([1.0, 0.5])
        options = {"method": "linear", "min_score": 0.25, "max_detections": 2 + others}
        index, _, count = ops.soft_nms(boxes[None].to(device), scores[None].to(device), **options)
        assert index[0].tolist() == [*range(1 + others), -1] and count.item() == 1 + others

    def test_nan_and_infinite_scores(self, device):
        boxes = torch.tensor([[0.0, 0, 10, 10]], device=device).expand(1, 5, 4)
        scores = torch.tensor([[math.nan, 0.5, math.inf, -math.inf, math.nan]], device=device)
        index, score, count = ops.soft_nms(boxes, scores, method="gaussian", max_detections=3)
        assert index.tolist() == [[2, 1, -1]] and score[0, 0] == math.inf and count.tolist() == [2]

    def test_degenerate_boxes_lower_no_score(self, device):
        boxes = DEGENERATE_BOXES.to(device)[None]
        scores = torch.linspace(1, 0.1, boxes.shape[1], device=device)[None]
        for method in METHODS:
            index, score, _ = ops.soft_nms(boxes, scores, method=method, max_detections=boxes.shape[1])
            assert index.tolist() == [list(range(boxes.shape[1]))] and torch.equal(score, scores)

    def test_arguments_are_not_modified(self, device):
        boxes, scores, _ = (t.to(device) for t in candidates(1, 50))
        before = scores.clone()
        ops.soft_nms(boxes, scores, max_detections=50)
        assert torch.equal(scores, before)

    def test_strided_and_unaligned(self, device):
        boxes, scores, labels = (t.to(device) for t in candidates(2, 70))
        expected = ops.soft_nms(boxes, scores, labels, max_detections=70)
        wide = torch.stack((boxes, boxes), dim=-1)[..., 0]
        for arguments in ((wide, scores, labels), (unaligned(boxes), unaligned(scores), unaligned(labels))):
            actual = ops.soft_nms(*arguments, max_detections=70)
            assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))

    def test_empty_batch(self, device):
        boxes, scores = torch.empty(0, 5, 4, device=device), torch.empty(0, 5, device=device)
        assert [t.shape for t in ops.soft_nms(boxes, scores, max_detections=3)] == [(0, 3), (0, 3), (0,)]


class TestErrors:
    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"boxes": torch.zeros(3, 4)}, ValueError, r"soft_nms: boxes must have shape \[N, C, 4\], got \[3, 4\]"),
            ({"scores": torch.zeros(1, 2)}, ValueError, r"soft_nms: scores must have shape \[1, 3\], got \[1, 2\]"),
            ({"labels": torch.zeros(1, 3)}, TypeError, "soft_nms: labels must be an integer tensor"),
            ({"counts": torch.zeros(2).int()}, ValueError, r"soft_nms: counts must have shape \[1\], got \[2\]"),
            ({"method": "naive"}, ValueError, "soft_nms: method must be 'gaussian' or 'linear', got 'naive'"),
            ({"sigma": 0.0}, ValueError, "soft_nms: sigma must be positive in torch.float32, got 0.0"),
            ({"sigma": 1e-60}, ValueError, "soft_nms: sigma must be positive in torch.float32, got 1e-60"),
            ({"labels": torch.zeros(1, 3, device="meta").int()}, ValueError, "labels must be on boxes's device cpu"),
            ({"counts": torch.zeros(1, device="meta").int()}, ValueError, "counts must be on boxes's device cpu"),
            ({"min_score": math.nan}, ValueError, "soft_nms: min_score must be a number, got nan"),
            ({"sigma": None}, TypeError, "soft_nms: sigma must be a number, got None"),
            ({"iou_threshold": math.nan}, ValueError, "soft_nms: iou_threshold must be a number, got nan"),
            ({"max_detections": 2.0}, TypeError, "soft_nms: max_detections must be an integer, got 2.0"),
            ({"max_detections": -1}, ValueError, "soft_nms: max_detections must not be negative, got -1"),
        ],
    )
    def test_message_names_the_argument(self, change, error, message):
        arguments = {"boxes": torch.zeros(1, 3, 4), "scores": torch.zeros(1, 3), "max_detections": 2} | change
        with pytest.raises(error, match=message):
            ops.soft_nms(**arguments)

    def test_direct_call_of_the_op(self, device):
        boxes, scores = torch.zeros(1, 3, 4, device=device), torch.zeros(1, 3, device=device)

        def call(
            boxes=boxes, scores=scores, labels=None, counts=None, method="linear", sigma=0.5, min_score=0.0, slots=2
        ):
            torch.ops.retinanet_ops.soft_nms(boxes, scores, labels, counts, method, 0.3, sigma, min_score, slots)

        call()
        for change, message in (
            ({"boxes": boxes[0]}, "boxes must have shape"),
            ({"scores": scores[:, :2]}, "scores must have shape"),
            ({"scores": scores.double()}, "scores must be Float, got Double"),
            ({"labels": torch.zeros(1, 2, device=device).long()}, "labels must have shape"),
            ({"labels": torch.zeros(1, 3, device=device).int()}, "labels must be Long"),
            ({"counts": torch.zeros(2, device=device).long()}, "counts must have shape"),
            ({"counts": torch.zeros(1, device=device).int()}, "counts must be Long"),
            ({"method": "naive"}, "method must be"),
            ({"sigma": 1e-60}, "sigma must be positive"),
            ({"min_score": -1.0}, "min_score must not be negative"),
            ({"slots": -1}, "max_detections must not be negative"),
        ):
            with pytest.raises(RuntimeError, match=message):
                call(**change)


class TestCompile:
    def test_opcheck(self, device):
        boxes, scores, labels = (t.to(device) for t in candidates(2, 30))
        counts = torch.tensor([30, 4], device=device)
        opcheck(torch.ops.retinanet_ops.soft_nms, (boxes, scores, labels, counts, "linear", 0.3, 0.5, 0.001, 9))
        opcheck(torch.ops.retinanet_ops.soft_nms, (boxes, scores, None, None, "gaussian", 0.3, 0.5, 0.001, 9))

    def test_compiles_in_one_graph(self, device):
        arguments = [t.to(device) for t in candidates(2, 40)]

        def function(boxes, scores, labels):
            return ops.soft_nms(boxes * 2, scores, labels, max_detections=10)

        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        assert all(torch.equal(a, b) for a, b in zip(compiled(*arguments), function(*arguments), strict=True))
