"""Greedy NMS of one list of boxes, of each class separately, and of padded batches."""

import math

import pytest
import torch
from cases import DEGENERATE_BOXES, FLOATING, SIZES, random_boxes, unaligned
from torch.library import opcheck

import retinanet_ops as ops
from retinanet_ops import reference


def candidates(*shape, num_classes=3, levels=20, **box_options):
    """Return boxes, scores with many ties, and classes."""
    scores = torch.randint(0, levels, shape).float() / levels
    return random_boxes(*shape, **box_options), scores, torch.randint(0, num_classes, shape)


class TestForward:
    @pytest.mark.parametrize("n", SIZES)
    @pytest.mark.parametrize("threshold", (0.0, 0.3, 0.5, 1.0))
    def test_nms(self, device, n, threshold):
        boxes, scores, _ = (t.to(device) for t in candidates(n))
        keep = ops.nms(boxes, scores, threshold)
        assert keep.dtype == torch.int64 and torch.equal(keep, reference.nms(boxes, scores, threshold))

    @pytest.mark.parametrize("dtype", FLOATING)
    def test_dtypes(self, device, dtype):
        boxes, scores, idxs = (t.to(device) for t in candidates(300))
        boxes, scores = boxes.to(dtype), scores.to(dtype)
        assert torch.equal(ops.nms(boxes, scores, 0.5), reference.nms(boxes, scores, 0.5))
        assert torch.equal(ops.batched_nms(boxes, scores, idxs, 0.5), reference.batched_nms(boxes, scores, idxs, 0.5))

    @pytest.mark.parametrize("idx_dtype", (torch.int32, torch.int64))
    @pytest.mark.parametrize("num_classes", (1, 7, 91))
    def test_batched_nms(self, device, num_classes, idx_dtype):
        boxes, scores, idxs = (t.to(device) for t in candidates(600, num_classes=num_classes))
        keep = ops.batched_nms(boxes, scores, idxs.to(idx_dtype), 0.4)
        assert torch.equal(keep, reference.batched_nms(boxes, scores, idxs, 0.4))
        assert len(keep) >= len(ops.nms(boxes, scores, 0.4))

    @pytest.mark.parametrize("dtype", FLOATING)
    def test_floating_classes(self, device, dtype):
        boxes, scores, idxs = (t.to(device) for t in candidates(600, num_classes=7))
        expected = ops.batched_nms(boxes, scores, idxs, 0.4)
        for classes in (idxs.to(dtype), idxs.to(dtype) / 4 - 1, torch.where(idxs == 3, torch.nan, idxs.to(dtype))):
            assert torch.equal(ops.batched_nms(boxes, scores, classes, 0.4), expected)
            assert torch.equal(reference.batched_nms(boxes, scores, classes, 0.4), expected)

    def test_floating_classes_are_not_rounded(self, device):
        boxes, scores = torch.tensor([[0.0, 0, 9, 9]]).repeat(6, 1).to(device), torch.arange(6.0, 0, -1).to(device)
        classes = torch.tensor([0.0, -0.0, 2**24, 2**24 + 2, torch.inf, 2**24], device=device)
        assert ops.batched_nms(boxes, scores, classes, 0.5).tolist() == [0, 2, 3, 4]
        classes = torch.tensor([0.25, 0.75, 0.25, 2**53 + 2, 2**53, torch.inf], dtype=torch.float64, device=device)
        assert ops.batched_nms(boxes, scores, classes, 0.5).tolist() == [0, 1, 3, 4, 5]

    def test_floating_classes_in_one_graph(self, device):
        boxes, scores, idxs = (t.to(device) for t in candidates(60, num_classes=7))
        compiled = torch.compile(ops.batched_nms, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(boxes, scores, idxs.float(), 0.4), ops.batched_nms(boxes, scores, idxs, 0.4))

    @pytest.mark.parametrize("max_detections", (0, 1, 31, 32, 33, 100, 255, 256, 257, 700))
    @pytest.mark.parametrize("with_labels", (False, True))
    def test_padded(self, device, max_detections, with_labels):
        boxes, scores, labels = (t.to(device) for t in candidates(4, 600))
        labels = labels if with_labels else None
        counts = torch.tensor([600, 257, 0, 1], device=device)
        options = {"iou_threshold": 0.3, "max_detections": max_detections, "counts": counts}
        index, count = ops.batched_nms_padded(boxes, scores, labels, **options)
        expected_index, expected_count = reference.batched_nms_padded(boxes, scores, labels, **options)
        assert torch.equal(index, expected_index) and torch.equal(count, expected_count)

    def test_padded_equals_nms_of_each_image(self, device):
        boxes, scores, labels = (t.to(device) for t in candidates(3, 200))
        index, count = ops.batched_nms_padded(boxes, scores, labels, iou_threshold=0.5, max_detections=200)
        for n in range(3):
            keep = ops.batched_nms(boxes[n], scores[n], labels[n], 0.5)
            assert torch.equal(index[n, : count[n]], keep) and (index[n, count[n] :] == -1).all()

    @pytest.mark.parametrize("threshold", (0.3, 0.5, 0.7))
    def test_equals_torchvision(self, device, threshold):
        torchvision = pytest.importorskip("torchvision")
        for seed in range(10):
            torch.manual_seed(seed)
            boxes, scores, idxs = (t.to(device) for t in candidates(400, num_classes=5))
            assert torch.equal(ops.nms(boxes, scores, threshold), torchvision.ops.nms(boxes, scores, threshold))
            # torchvision's loop over classes is exact. Scores are unique, because its sort is not stable.
            scores = torch.randperm(400).to(device).float()
            expected = torchvision.ops.boxes._batched_nms_vanilla(boxes, scores, idxs, threshold)
            assert torch.equal(ops.batched_nms(boxes, scores, idxs, threshold), expected)


class TestEdgeCases:
    def test_threshold_is_exclusive_and_rounded_to_the_dtype(self, device):
        # IoU exactly 0.5, and IoU float32(3 / 10), which is greater than 0.3 in float64.
        for height, threshold in ((5.0, 0.5), (3.0, 0.3)):
            boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, height]], device=device)
            scores = torch.tensor([1.0, 0.5], device=device)
            assert ops.nms(boxes, scores, threshold).tolist() == [0, 1]
            assert ops.nms(boxes, scores, threshold - 1e-6).tolist() == [0]

    def test_equal_scores_keep_the_lower_index(self, device):
        boxes = torch.tensor([[0.0, 0, 10, 10]], device=device).expand(300, 4)
        assert ops.nms(boxes, torch.ones(300, device=device), 0.5).tolist() == [0]
        signed = torch.tensor([-0.0, 0.0], device=device)
        assert ops.nms(boxes[:2] + torch.tensor([[0.0], [50.0]], device=device), signed, 0.5).tolist() == [
            0,
            1,
        ]

    def test_a_suppressed_box_does_not_suppress(self, device):
        # In this chain the first box suppresses the second, so the second cannot suppress the third.
        boxes = torch.tensor([[0.0, 0, 10, 10], [4, 0, 14, 10], [8, 0, 18, 10]], device=device)
        scores = torch.tensor([0.9, 0.8, 0.7], device=device)
        assert ops.nms(boxes, scores, 0.4).tolist() == [0, 2]
        far = torch.arange(700, device=device)[:, None] * torch.tensor([4.0, 0, 4, 0], device=device)
        chain = boxes[:1] + far
        assert ops.nms(chain, torch.linspace(1, 0.5, 700, device=device), 0.4).tolist() == list(range(0, 700, 2))

    def test_nan_and_infinite_scores(self, device):
        boxes = torch.tensor([[0.0, 0, 10, 10]], device=device).expand(5, 4)
        scores = torch.tensor([math.nan, 0.5, math.inf, -math.inf, math.nan], device=device)
        assert ops.nms(boxes, scores, 0.5).tolist() == [2]
        index, count = ops.batched_nms_padded(boxes[None] + 0, scores[None], iou_threshold=1.0, max_detections=5)
        assert index.tolist() == [[2, 1, -1, -1, -1]] and count.tolist() == [2]

    def test_degenerate_boxes_are_kept_and_suppress_nothing(self, device):
        degenerate = DEGENERATE_BOXES.to(device)
        boxes = torch.cat([degenerate, random_boxes(50).to(device)])
        scores = torch.linspace(1, 0.1, len(boxes), device=device)
        keep = ops.nms(boxes, scores, 0.4)
        assert keep[: len(degenerate)].tolist() == list(range(len(degenerate)))
        assert torch.equal(
            keep[len(degenerate) :] - len(degenerate),
            ops.nms(boxes[len(degenerate) :], scores[len(degenerate) :], 0.4),
        )

    def test_classes_are_compared_exactly(self, device):
        # Each case defeats torchvision's offset of coordinates: negative coordinates, half precision, huge class ids.
        box = torch.tensor([[-50.0, -50, -40, -40]], device=device).expand(2, 4)
        scores = torch.tensor([0.9, 0.8], device=device)
        for idxs in ([0, 1], [5, 2**40], [-7, 7]):
            assert ops.batched_nms(box, scores, torch.tensor(idxs, device=device), 0.5).tolist() == [0, 1]
            assert ops.batched_nms(box.half(), scores.half(), torch.tensor(idxs, device=device), 0.5).tolist() == [0, 1]

    @pytest.mark.once
    def test_more_than_a_hundred_thousand_boxes(self, device):
        # 300 piles of 400 boxes: a dense N x N mask would take 1.8 GB.
        boxes = (torch.arange(120_000, device=device) % 300).float()[:, None] * 50 + torch.tensor(
            [0.0, 0, 20, 20], device=device
        )
        keep = ops.nms(boxes, torch.rand(120_000, device=device), 0.5)
        assert len(keep) == 300 and len((keep % 300).unique()) == 300

    @pytest.mark.once
    @pytest.mark.parametrize("threshold", (0.05, 0.3, 0.5, 0.7, 0.9))
    @pytest.mark.parametrize("larger", ("first", "second"))
    @pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
    def test_pairs_with_an_iou_near_the_threshold(self, device, threshold, larger, dtype):
        # The boxes of a pair overlap only each other. They are as far apart along one axis as their IoU allows.
        count = 3000
        width = torch.exp(torch.rand(count, dtype=torch.float64) * 3)
        ratio = threshold + (1 - threshold) * torch.rand(count, dtype=torch.float64)
        overlap = (1 + ratio) * width * threshold / (1 + threshold) * (1 + 0.002 * (torch.rand(count) - 0.3))
        overlap = torch.minimum(overlap, ratio * width)
        place = torch.arange(count) * 64 + torch.rand(count, dtype=torch.float64) * 20
        a = torch.stack((place, place * 0, place + width, width), dim=1)
        b = torch.stack((place + width - overlap, place * 0, place + width - overlap + ratio * width, width), dim=1)
        upright = torch.rand(count) < 0.5
        a, b = (torch.where(upright[:, None], t[:, [1, 0, 3, 2]], t).to(dtype) for t in (a, b))
        better, worse = (a, b) if larger == "first" else (b, a)
        iou = torch.cat([reference.box_iou(better[i : i + 1], worse[i : i + 1])[0] for i in range(count)])
        expected = [*range(count), *(count + (iou <= torch.tensor(threshold, dtype=dtype)).nonzero()[:, 0]).tolist()]
        assert count < len(expected) < 2 * count
        scores = torch.linspace(1, 0.1, 2 * count, device=device)
        assert ops.nms(torch.cat((better, worse)).to(device), scores, threshold).tolist() == expected

    def test_threshold_below_the_least_normal_number(self, device):
        # The IoU of 3 * 2^-149 * (1 + 2^-10) rounds to the threshold.
        threshold, x = 3 * 2.0**-149, 2.0**-45 * (1 + 2.0**-10)
        boxes = torch.tensor([[0.0, 0.0, 2.0**30, 2.0**30], [0.0, 0.0, x, 3 * 2.0**-44]], device=device)
        scores = torch.tensor([1.0, 0.5], device=device)
        assert ops.nms(boxes, scores, threshold).tolist() == [0, 1]
        assert ops.nms(boxes, scores, threshold * 2 / 3).tolist() == [0]

    def test_a_box_much_larger_than_the_others(self, device):
        boxes = torch.arange(601, device=device)[:, None] * torch.tensor([1e-9, 0, 1e-9, 0], device=device)
        boxes = boxes + torch.tensor([0.0, 0, 1e-10, 1e-10], device=device)
        boxes[600] = torch.tensor([-1e10, 1.1e-10, 1e10, 1e-9])
        scores = torch.linspace(1, 0.1, 601, device=device)
        assert ops.nms(boxes, scores, 0.0).tolist() == list(range(601))

    def test_coordinates_near_the_largest_float64(self, device):
        y = torch.arange(600, device=device, dtype=torch.float64) * 1e-6
        boxes = torch.stack((y * 0, y, y * 0 + 1.2e308, y + 1e-7), dim=1)
        boxes = torch.cat((boxes, boxes[-1:]))
        assert ops.nms(boxes, torch.linspace(1, 0.1, 601, device=device), 0.5).tolist() == list(range(600))

    def test_counts_out_of_range(self, device):
        boxes, scores, _ = (t.to(device) for t in candidates(2, 40))
        scores[0, 7], boxes[0, 7] = math.nan, boxes[0, 7] + 5000  # not a candidate, and far from the others
        index, count = ops.batched_nms_padded(
            boxes, scores, iou_threshold=0.5, max_detections=40, counts=torch.tensor([50, -3], device=device)
        )
        expected = ops.nms(boxes[0], scores[0], 0.5)
        assert count.tolist() == [len(expected), 0] and torch.equal(index[0, : len(expected)], expected)

    def test_strided_and_unaligned(self, device):
        boxes, scores, idxs = (t.to(device) for t in candidates(100))
        expected = ops.batched_nms(boxes, scores, idxs, 0.5)
        wide = torch.stack((boxes, boxes), dim=-1)[..., 0]
        assert torch.equal(ops.batched_nms(wide, unaligned(scores), unaligned(idxs), 0.5), expected)
        assert torch.equal(ops.batched_nms(unaligned(boxes), scores, idxs, 0.5), expected)

    def test_empty_batch(self, device):
        index, count = ops.batched_nms_padded(
            torch.empty(0, 5, 4, device=device),
            torch.empty(0, 5, device=device),
            iou_threshold=0.5,
            max_detections=3,
        )
        assert index.shape == (0, 3) and count.shape == (0,)


class TestErrors:
    @pytest.mark.parametrize(
        ("call", "error", "message"),
        [
            (
                lambda: ops.nms(torch.zeros(3, 5), torch.zeros(3), 0.5),
                ValueError,
                r"nms: boxes must have shape \[C, 4\], got \[3, 5\]",
            ),
            (
                lambda: ops.nms(torch.zeros(3, 4), torch.zeros(2), 0.5),
                ValueError,
                r"nms: scores must have shape \[3\], got \[2\]",
            ),
            (
                lambda: ops.nms(torch.zeros(3, 4).int(), torch.zeros(3), 0.5),
                TypeError,
                "nms: boxes must be float16.* got torch.int32",
            ),
            (
                lambda: ops.nms(torch.zeros(3, 4), torch.zeros(3), math.nan),
                ValueError,
                "nms: iou_threshold must be a number, got nan",
            ),
            (
                lambda: ops.batched_nms(torch.zeros(3, 4), torch.zeros(3), torch.zeros(3).int(), None),
                TypeError,
                "batched_nms: iou_threshold must be a number, got None",
            ),
            (
                lambda: ops.batched_nms(torch.zeros(3, 4), torch.zeros(3), torch.zeros(3).cfloat(), 0.5),
                TypeError,
                "batched_nms: idxs must be an integer, floating or bool tensor, got torch.complex64",
            ),
            (
                lambda: ops.batched_nms_padded(
                    torch.zeros(1, 3, 4), torch.zeros(1, 3), iou_threshold=0.5, max_detections=-1
                ),
                ValueError,
                "max_detections must not be negative, got -1",
            ),
            (
                lambda: ops.batched_nms_padded(
                    torch.zeros(1, 3, 4), torch.zeros(1, 3), iou_threshold=0.5, max_detections=3.0
                ),
                TypeError,
                "batched_nms_padded: max_detections must be an integer, got 3.0",
            ),
            (
                lambda: ops.batched_nms(
                    torch.zeros(3, 4), torch.zeros(3), torch.zeros(3, device="meta").int(), iou_threshold=0.5
                ),
                ValueError,
                "batched_nms: idxs must be on boxes's device cpu, got meta",
            ),
            *(
                (
                    lambda name=name, shape=shape: ops.batched_nms_padded(
                        torch.zeros(1, 3, 4),
                        torch.zeros(1, 3),
                        iou_threshold=0.5,
                        max_detections=1,
                        **{name: torch.zeros(shape, device="meta").int()},
                    ),
                    ValueError,
                    f"batched_nms_padded: {name} must be on boxes's device cpu, got meta",
                )
                for name, shape in (("labels", (1, 3)), ("counts", (1,)))
            ),
            (
                lambda: ops.batched_nms_padded(torch.zeros(3, 4), torch.zeros(3), iou_threshold=0.5, max_detections=1),
                ValueError,
                r"boxes must have shape \[N, C, 4\], got \[3, 4\]",
            ),
        ],
    )
    def test_message_names_the_argument(self, call, error, message):
        with pytest.raises(error, match=message):
            call()


class TestDirectCalls:
    @pytest.mark.parametrize(
        "arguments",
        [
            (torch.zeros(3, 4), torch.zeros(2), None),
            (torch.zeros(3, 5), torch.zeros(3), None),
            (torch.zeros(1, 3, 4), torch.zeros(3), None),
            (torch.zeros(3, 4), torch.zeros(3, 1), None),
            (torch.zeros(3, 4).half(), torch.zeros(3), None),
            (torch.zeros(3, 4), torch.zeros(3).long(), None),
            (torch.zeros(3, 4), torch.zeros(3), torch.zeros(2).long()),
            (torch.zeros(3, 4), torch.zeros(3), torch.zeros(3).int()),
        ],
    )
    def test_a_direct_call_is_memory_safe(self, device, arguments):
        arguments = (None if t is None else t.to(device) for t in arguments)
        with pytest.raises(RuntimeError, match="nms.*: "):
            torch.ops.retinanet_ops.nms(*arguments, 0.5)

    @pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
    def test_strided_lists(self, device, dtype):
        boxes, scores, labels = (t[0].to(device) for t in candidates(1, 60))
        boxes, scores = boxes.to(dtype), scores.to(dtype)
        expected = ops.batched_nms(boxes, scores, labels, 0.5)
        rows = torch.cat((boxes, scores[:, None], labels[:, None].to(dtype)), dim=1)
        assert torch.equal(ops.batched_nms(rows[:, :4], rows[:, 4], labels, 0.5), expected)
        columns = rows.t().contiguous()
        assert torch.equal(ops.batched_nms(columns[:4].t(), columns[4], labels, 0.5), expected)
        spread = torch.stack((labels, labels), dim=1)[:, 1]
        assert torch.equal(ops.batched_nms(unaligned(boxes), unaligned(scores), spread, 0.5), expected)
        once = boxes[:1].expand(60, 4)
        assert ops.nms(once, scores, 0.5).tolist() == [int(scores.argmax())]


class TestCompile:
    def test_opcheck(self, device):
        boxes, scores, labels = (t.to(device) for t in candidates(2, 40))
        order = scores.sort(descending=True, stable=True).indices
        count = torch.tensor([40, 9], device=device)
        opcheck(torch.ops.retinanet_ops.nms_sorted, (boxes, order, count, labels, 0.5, 10, 2, False))
        opcheck(torch.ops.retinanet_ops.nms_sorted, (boxes, None, count, None, 0.5, 10, 0, True))
        for given in (None, count):
            opcheck(torch.ops.retinanet_ops.rank_scores, (scores, given))
            opcheck(torch.ops.retinanet_ops.batched_nms_padded, (boxes, scores, labels, given, 0.5, 10))
        opcheck(torch.ops.retinanet_ops.batched_nms_padded, (boxes, scores, None, None, 0.5, 0))
        opcheck(torch.ops.retinanet_ops.nms, (boxes[0], scores[0], None, 0.5))
        opcheck(torch.ops.retinanet_ops.nms, (boxes[0], scores[0], labels[0], 0.5))

    def test_padded_compiles_in_one_graph(self, device):
        boxes, scores, labels = (t.to(device) for t in candidates(2, 60))

        def function(boxes, scores, labels):
            return ops.batched_nms_padded(boxes * 2, scores, labels, iou_threshold=0.5, max_detections=20)

        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        for a, b in zip(compiled(boxes, scores, labels), function(boxes, scores, labels), strict=True):
            assert torch.equal(a, b)

    def test_nms_exports(self, device):
        class Module(torch.nn.Module):
            def forward(self, boxes, scores):
                return boxes[ops.nms(boxes, scores, 0.5)]

        boxes, scores, _ = (t.to(device) for t in candidates(50))
        exported = torch.export.export(Module(), (boxes, scores)).module()
        boxes, scores, _ = (t.to(device) for t in candidates(50))
        assert torch.equal(exported(boxes, scores), Module()(boxes, scores))
