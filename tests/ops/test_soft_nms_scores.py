"""The scores that one pass of Soft-NMS leaves."""

import math
from functools import partial

import pytest
import torch
from cases import DEGENERATE_BOXES, FLOATING, SIZES, random_boxes, unaligned
from hypothesis import given
from hypothesis import strategies as st
from launches import assert_moves_at_most
from properties import Cases, many_cases
from torch.library import opcheck

import retinanet_ops as ops
from retinanet_ops import reference

METHODS = ("gaussian", "linear")
# A score is a product of up to a few hundred factors, each off by a few units in the last place of float32. Scores that
# have fallen below 1e-30 do not matter.
CLOSE = {"rtol": 1e-4, "atol": 1e-30}


def candidates(*shape, num_classes=3, levels=20):
    """Return boxes, scores that tie often, and classes."""
    scores = torch.randint(1, levels + 1, shape) / levels
    return random_boxes(*shape), scores, torch.randint(0, num_classes, shape)


def gpu_check_cases(small):
    """Yield (name, run, tolerance) for `python -m tools.gpu_check`; tolerance 0 demands the same bits."""

    def run(method, device):
        torch.manual_seed(0)
        arguments = (t.to(device) for t in candidates(2, 300 if small else 5000))
        return {"scores": ops.soft_nms_scores(*arguments, method=method)}

    for method in METHODS:
        yield f"soft_nms_scores {method}", partial(run, method), 0.0


class TestForward:
    @pytest.mark.parametrize("n", SIZES)
    @pytest.mark.parametrize("method", METHODS)
    def test_sizes(self, device, method, n):
        boxes, scores, labels = candidates(2, n)
        # In the dtype of the op, because an IoU may be near the threshold of the linear method.
        expected = reference.soft_nms_scores(boxes, scores, labels, method=method)
        actual = ops.soft_nms_scores(boxes.to(device), scores.to(device), labels.to(device), method=method)
        torch.testing.assert_close(actual.cpu(), expected, **CLOSE)
        assert n < 63 or not torch.equal(actual.cpu(), scores)

    @pytest.mark.parametrize("dtype", FLOATING)
    @pytest.mark.parametrize("method", METHODS)
    def test_dtypes(self, device, method, dtype):
        boxes, scores, labels = candidates(1, 120)
        boxes, scores = boxes.to(dtype), scores.to(dtype)
        options = {"method": method, "sigma": 0.3, "iou_threshold": 0.2}
        actual = ops.soft_nms_scores(boxes.to(device), scores.to(device), labels.to(device), **options)
        assert actual.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        expected = reference.soft_nms_scores(boxes, scores, labels, **options)
        close = {"rtol": 1e-12, "atol": 0} if dtype == torch.float64 else CLOSE
        torch.testing.assert_close(actual.cpu(), expected, **close)

    def test_example_computed_by_hand(self, device):
        # The first box is one half of the second, and the third is one half of the first: IoU 1/2, 1/2 and 1/4.
        boxes = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 10, 20], [0, 0, 10, 5]]], device=device)
        scores = torch.tensor([[0.8, 0.9, 0.4]], device=device)
        linear = ops.soft_nms_scores(boxes, scores, method="linear", iou_threshold=0.3)
        torch.testing.assert_close(linear.cpu(), torch.tensor([[0.4, 0.9, 0.2]]))
        gaussian = ops.soft_nms_scores(boxes, scores, sigma=0.25)
        expected = torch.tensor([[0.8 * math.exp(-1), 0.9, 0.4 * math.exp(-1) * math.exp(-0.25)]])
        torch.testing.assert_close(gaussian.cpu(), expected)

    def test_iou_at_the_threshold_keeps_its_score(self, device):
        boxes = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 10, 5]]], device=device)
        scores = torch.tensor([[0.9, 0.8]], device=device)
        kept = ops.soft_nms_scores(boxes, scores, method="linear", iou_threshold=0.5)
        assert torch.equal(kept, scores)
        lowered = ops.soft_nms_scores(boxes, scores, method="linear", iou_threshold=0.499)
        torch.testing.assert_close(lowered.cpu(), torch.tensor([[0.9, 0.4]]))

    def test_the_lower_index_ranks_first_among_equal_scores(self, device):
        boxes = torch.tensor([0.0, 0, 10, 10], device=device).repeat(1, 4, 1)
        boxes[:, 3, 3] = 5
        scores = torch.full((1, 4), 0.5, device=device)
        lowered = ops.soft_nms_scores(boxes, scores, method="linear")
        assert lowered.tolist() == [[0.5, 0.0, 0.0, 0.0625]]

    def test_counts_and_classes(self, device):
        boxes, scores, labels = candidates(5, 300)
        scores[4, 299] = 2  # the best score, but beyond the count
        counts = torch.tensor([300, 400, 17, -4, 299])
        for classes in (labels, labels * 2**40, None):
            on_device = (None if t is None else t.to(device) for t in (boxes, scores, classes))
            actual = ops.soft_nms_scores(*on_device, method="linear", counts=counts.to(device)).cpu()
            expected = reference.soft_nms_scores(boxes, scores, classes, method="linear", counts=counts)
            torch.testing.assert_close(actual, expected, **CLOSE)
            assert torch.equal(actual[2, 17:], scores[2, 17:]) and torch.equal(actual[3], scores[3])

    def test_candidates_that_are_not_valid_keep_their_scores_and_lower_none(self, device):
        boxes = torch.tensor([0.0, 0, 10, 10], device=device).repeat(1, 4, 1)
        scores = torch.tensor([[math.nan, 0.25, -math.inf, 0.5]], device=device)
        lowered = ops.soft_nms_scores(boxes, scores, method="linear").cpu()
        expected = torch.tensor([[math.nan, 0.0, -math.inf, 0.5]])
        torch.testing.assert_close(lowered, expected, rtol=0, atol=0, equal_nan=True)

    def test_degenerate_boxes_neither_lower_nor_are_lowered(self, device):
        boxes = torch.cat((DEGENERATE_BOXES, torch.tensor([[4.0, 4, 10, 10], [4, 4, 10, 10]])))[None].to(device)
        scores = torch.linspace(1, 0.5, boxes.shape[1], device=device)[None]
        for method in METHODS:
            lowered = ops.soft_nms_scores(boxes, scores, method=method, iou_threshold=0.0)
            assert torch.equal(lowered[:, :-1], scores[:, :-1]) and lowered[0, -1] < scores[0, -1]

    def test_the_best_candidates_are_those_of_soft_nms(self, device):
        # Where no order changes, both give the same scores: of pairs of boxes, only the worse one is lowered.
        boxes = (torch.arange(40) * 100.0)[:, None] + torch.tensor([0.0, 0, 10, 10])
        boxes = torch.cat((boxes, boxes + torch.tensor([0.0, 0, 0, 5])))[None].to(device)
        scores = torch.cat((torch.linspace(1, 0.9, 40), torch.linspace(0.5, 0.4, 40)))[None].to(device)
        index, taken, count = ops.soft_nms(boxes, scores, max_detections=80, min_score=0.0)
        lowered = ops.soft_nms_scores(boxes, scores)
        assert count.tolist() == [80] and (lowered[0, 40:] < scores[0, 40:]).all()
        assert torch.equal(lowered.gather(1, index), taken)

    def test_layouts_do_not_change_bits(self, device):
        boxes, scores, labels = (t.to(device) for t in candidates(2, 70))
        expected = ops.soft_nms_scores(boxes, scores, labels)
        strided = torch.cat((boxes, boxes), dim=-1)[..., :4], torch.stack((scores, scores), dim=-1)[..., 0]
        assert torch.equal(ops.soft_nms_scores(*strided, labels), expected)
        assert torch.equal(ops.soft_nms_scores(unaligned(boxes), unaligned(scores), labels), expected)
        assert expected.is_contiguous() and not expected.requires_grad

    def test_arguments_stay_as_they_are(self, device):
        arguments = [t.to(device) for t in candidates(1, 50)]
        before = [t.clone() for t in arguments]
        ops.soft_nms_scores(*arguments)
        assert all(torch.equal(a, b) for a, b in zip(arguments, before, strict=True))

    def test_results_do_not_depend_on_threads(self, device):
        boxes, scores, labels = (t.to(device) for t in candidates(1, 2500))
        threads, results = torch.get_num_threads(), []
        try:
            for count in (1, 3):
                torch.set_num_threads(count)
                results.append(ops.soft_nms_scores(boxes, scores, labels))
        finally:
            torch.set_num_threads(threads)
        assert torch.equal(*results)

    @pytest.mark.once  # 70,000 blocks
    def test_more_images_than_a_grid_has_rows(self, device):
        boxes, scores = (
            torch.tensor([0.0, 0, 8, 8], device=device).repeat(70_000, 2, 1),
            torch.ones(1, 2, device=device),
        )
        lowered = ops.soft_nms_scores(boxes, scores.expand(70_000, 2), method="linear")
        assert torch.equal(lowered.cpu(), torch.tensor([1.0, 0.0]).expand(70_000, 2))

    def test_no_result_requires_a_gradient(self, device):
        boxes, scores, _ = (t.to(device) for t in candidates(1, 5))
        assert not ops.soft_nms_scores(boxes, scores.requires_grad_()).requires_grad


@pytest.mark.once
@given(seed=st.integers(0, 2**63 - 1))
@many_cases
def test_coarse_boxes_and_scores(device, seed):
    cases = Cases(seed)
    n = cases.one_of(*(cases.integer(0, limit) for limit in (40, 40, 300)))
    extent = cases.one_of(6, 6, 60)
    corner, size = cases.integers(2 * n, 0, extent).view(n, 2), cases.integers(2 * n, 0, 4).view(n, 2)
    boxes = torch.cat((corner, corner + size), dim=1).float()[None]
    # All values have few binary digits, so scores tie often.
    levels = cases.one_of(8, 8, 1024)
    scores, labels = cases.integers(n, 0, levels)[None] / levels, cases.integers(n, 0, 1)[None]
    options = {"method": cases.one_of(*METHODS), "iou_threshold": cases.one_of(0.0, 0.25, 0.5)}
    expected = reference.soft_nms_scores(boxes, scores, labels, **options)
    actual = ops.soft_nms_scores(boxes.to(device), scores.to(device), labels.to(device), **options)
    if options["method"] == "linear":
        assert torch.equal(actual.cpu(), expected)
    torch.testing.assert_close(actual.cpu(), expected, **CLOSE)


@pytest.mark.backends("emulated")
class TestLaunches:
    def test_one_launch_that_reads_each_candidate_once(self, tracing):
        boxes, scores, labels = candidates(1, 2000)
        ops.soft_nms_scores(boxes, scores, labels)
        launches = tracing.take_launches()
        assert [launch.kernel for launch in launches] == ["soft_nms_scores_kernel"]
        # A box and its class take 24 bytes, and a score 4. The cache that the test models holds less than one image.
        blocks = math.ceil(2000 / 256)
        assert_moves_at_most(launches, read=(blocks + 1) * 2000 * 28, written=2000 * 4)


class TestArguments:
    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"boxes": torch.zeros(3, 4)}, ValueError, r"boxes must have shape \[N, C, 4\], got \[3, 4\]"),
            ({"scores": torch.zeros(1, 2)}, ValueError, r"scores must have shape \[1, 3\], got \[1, 2\]"),
            ({"labels": torch.zeros(1, 3)}, TypeError, "labels must be an integer tensor"),
            ({"method": "naive"}, ValueError, "method must be 'gaussian' or 'linear', got 'naive'"),
            ({"sigma": 0.0}, ValueError, "sigma must be positive in torch.float32, got 0.0"),
            ({"counts": torch.zeros(1, device="meta").int()}, ValueError, "counts must be on boxes's device cpu"),
            ({"iou_threshold": math.nan}, ValueError, "iou_threshold must be a number, got nan"),
        ],
    )
    def test_message_names_the_argument(self, change, error, message):
        arguments = {"boxes": torch.zeros(1, 3, 4), "scores": torch.zeros(1, 3)} | change
        with pytest.raises(error, match=f"soft_nms_scores: {message}"):
            ops.soft_nms_scores(**arguments)

    def test_direct_call_is_memory_safe(self, device):
        boxes, scores = torch.zeros(1, 3, 4, device=device), torch.zeros(1, 3, device=device)
        call = torch.ops.retinanet_ops.soft_nms_scores
        for arguments, message in (
            ((boxes[0], scores, None, None, "linear", 0.3, 0.5), "soft_nms_scores: boxes must have shape"),
            ((boxes, scores[:, :2], None, None, "linear", 0.3, 0.5), "soft_nms_scores: scores must have shape"),
            ((boxes, scores, None, None, "naive", 0.3, 0.5), "soft_nms_scores: method must be"),
            ((boxes, scores, None, None, "linear", 0.3, 0.0), "soft_nms_scores: sigma must be positive"),
        ):
            with pytest.raises(RuntimeError, match=message):
                call(*arguments)

    def test_opcheck(self, device):
        boxes, scores, labels = (t.to(device) for t in candidates(2, 30))
        counts = torch.tensor([30, 4], device=device)
        opcheck(torch.ops.retinanet_ops.soft_nms_scores, (boxes, scores, labels, counts, "linear", 0.3, 0.5))
        opcheck(torch.ops.retinanet_ops.soft_nms_scores, (boxes, scores, None, None, "gaussian", 0.3, 0.5))

    def test_compiles_in_one_graph(self, device):
        arguments = [t.to(device) for t in candidates(2, 40)]
        compiled = torch.compile(lambda *a: ops.soft_nms_scores(*a) * 2, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(*arguments), ops.soft_nms_scores(*arguments) * 2)
