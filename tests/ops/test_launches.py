"""Which kernels the ops launch."""

import pytest
import torch
from cases import random_boxes
from matching_cases import grid_of_levels

import retinanet_ops as ops

pytestmark = pytest.mark.backends("emulated")


class TestLaunches:
    """An op launches the same kernels, of the same sizes, whatever is in its tensors."""

    @pytest.fixture
    def launched(self, emulator):
        def launched(function, *arguments):
            emulator.take_launches()
            function(*arguments)
            return [repr(launch) for launch in emulator.take_launches()]

        return launched

    def test_focal_loss(self, launched):
        def loss(x, labels):
            ops.sigmoid_focal_loss(x, labels, reduction="sum").backward()

        logits = (torch.randn(700, 7), torch.full((700, 7), float("nan")), torch.full((700, 7), 1e30))
        labels = (torch.randint(-2, 7, (700,)), torch.full((700,), -2), torch.full((700,), 99))
        logs = [launched(loss, x.requires_grad_(), t) for x, t in zip(logits, labels, strict=True)]
        assert len(logs[0]) == 3 and logs[0] == logs[1] == logs[2]

    def test_dense_focal_loss(self, launched):
        def loss(level, labels):
            levels = [level.reshape(2, 21, 10, 5), level.reshape(2, 7, 10, 15)]
            ops.dense_focal_loss(levels, labels, 7).sum().backward()

        logits = (torch.randn(2, 1050), torch.full((2, 1050), float("nan")), torch.full((2, 1050), 1e30))
        labels = (torch.randint(-2, 7, (2, 300)), torch.full((2, 300), -2), torch.full((2, 300), 99))
        logs = [launched(loss, x.requires_grad_(), t) for x, t in zip(logits, labels, strict=True)]
        assert len(logs[0]) == 3 and logs[0] == logs[1] == logs[2]

    def test_matching(self, launched):
        anchors = random_boxes(3000)
        boxes = [random_boxes(2, 5), torch.zeros(2, 5, 4), torch.full((2, 5, 4), float("nan"))]
        counts = [torch.tensor(c) for c in ([5, 3], [0, 0], [-7, 99])]
        logs = [launched(ops.match_anchors, anchors, b, c) for b, c in zip(boxes, counts, strict=True)]
        assert len(logs[0]) == 3 and logs[0] == logs[1] == logs[2]

    def test_matching_on_a_grid(self, launched):
        grid = grid_of_levels()
        boxes = [random_boxes(2, 5), torch.zeros(2, 5, 4), torch.full((2, 5, 4), float("nan"))]
        counts = [torch.tensor(c) for c in ([5, 3], [0, 0], [-7, 99])]
        logs = [launched(ops.match_anchors, grid, b, c) for b, c in zip(boxes, counts, strict=True)]
        assert len(logs[0]) == 2 and logs[0] == logs[1] == logs[2]

    @pytest.mark.parametrize("on_grid", (True, False))
    def test_assign_points(self, launched, on_grid):
        anchors = grid_of_levels() if on_grid else random_boxes(3000)
        boxes = [random_boxes(2, 5), torch.zeros(2, 5, 4), torch.full((2, 5, 4), float("nan"))]
        labels = [torch.full((2, 5), label) for label in (0, 90, -1)]
        counts = [torch.tensor(c) for c in ([5, 3], [0, 0], [-7, 99])]
        truths = zip(boxes, labels, counts, strict=True)
        logs = [launched(ops.assign_points, anchors, *truth) for truth in truths]
        assert len(logs[0]) == 2 and logs[0] == logs[1] == logs[2]

    def test_dense_box_loss(self, launched):
        anchors, boxes = random_boxes(300), random_boxes(2, 3)

        def loss(level, matches):
            levels = [level.reshape(2, 8, 10, 15)]
            ops.dense_box_loss(levels, anchors, boxes, matches, kind="ciou").sum().backward()

        deltas = (torch.randn(2, 1200), torch.full((2, 1200), float("nan")), torch.full((2, 1200), 1e30))
        matches = (torch.randint(-2, 3, (2, 300)), torch.full((2, 300), -2), torch.full((2, 300), 99))
        logs = [launched(loss, x.requires_grad_(), m) for x, m in zip(deltas, matches, strict=True)]
        assert len(logs[0]) == 3 and logs[0] == logs[1] == logs[2]

    def test_assigning_with_crowds(self, launched):
        anchors = random_boxes(3000)
        boxes = [random_boxes(2, 5), torch.zeros(2, 5, 4), torch.full((2, 5, 4), float("nan"))]
        labels = [torch.full((2, 5), label) for label in (0, 90, -1)]
        counts = [torch.tensor(c) for c in ([5, 3], [0, 0], [-7, 99])]

        def assign(boxes, labels, count):
            ops.assign_targets(anchors, boxes, labels, count, crowds=(boxes.flip(0), count.flip(0)))

        logs = [launched(assign, *arguments) for arguments in zip(boxes, labels, counts, strict=True)]
        assert len(logs[0]) == 3 and logs[0] == logs[1] == logs[2]

    @pytest.mark.parametrize(
        "function",
        (
            lambda boxes: ops.encode_boxes(boxes, boxes.flip(0)),
            lambda boxes: ops.decode_boxes(boxes, boxes.flip(0)),
            lambda boxes: ops.clip_boxes(boxes, (60, 80)),
            lambda boxes: ops.box_iou(boxes, boxes),
        ),
        ids=("encode_boxes", "decode_boxes", "clip_boxes", "box_iou"),
    )
    def test_boxes(self, launched, function):
        boxes = (random_boxes(700), torch.zeros(700, 4), torch.full((700, 4), float("nan")))
        logs = [launched(function, b) for b in boxes]
        assert len(logs[0]) == 1 and logs[0] == logs[1] == logs[2]

    @pytest.mark.parametrize(("rows", "columns", "launches"), ((700, 30, 1), (30, 700, 2)))
    def test_gradient_of_box_iou(self, launched, rows, columns, launches):
        function = torch.ops.retinanet_ops.box_iou_backward
        boxes = (random_boxes(700), torch.zeros(700, 4), torch.full((700, 4), float("nan")))
        logs = [launched(function, torch.ones(rows, columns), b[:rows], b[:columns], "iou") for b in boxes]
        assert len(logs[0]) == launches and logs[0] == logs[1] == logs[2]

    @pytest.mark.parametrize("op", ("nms", "batched_nms"))
    def test_nms(self, launched, op):
        boxes = (random_boxes(600), torch.zeros(600, 4), random_boxes(1).expand(600, 4))
        scores = (torch.rand(600), torch.full((600,), float("nan")), torch.zeros(600))
        labels = (torch.randint(0, 9, (600,)), torch.arange(600), torch.zeros(600, dtype=torch.int64))
        arguments = zip(boxes, scores, labels, strict=True) if op == "batched_nms" else zip(boxes, scores, strict=True)
        logs = [launched(getattr(ops, op), *a, 0.5) for a in arguments]
        assert len(logs[0]) == 1 and logs[0] == logs[1] == logs[2]

    def test_nms_of_a_long_list(self, launched):
        boxes = (random_boxes(1100), torch.zeros(1100, 4), random_boxes(1).expand(1100, 4))
        scores = (torch.rand(1100), torch.full((1100,), float("nan")), torch.zeros(1100))
        logs = [launched(ops.nms, *a, 0.5) for a in zip(boxes, scores, strict=True)]
        # One kernel ranks the boxes, two prepare, and two chunks are resolved with one filter in between.
        assert len(logs[0]) == 6 and logs[0] == logs[1] == logs[2]

    @pytest.mark.parametrize(("topk", "count"), ((50, 4), (2048, 4), (2049, 14)))
    def test_detect(self, launched, topk, count):
        grid = ops.AnchorGrid.torchvision([(8, 9), (4, 5)], (64, 72), sizes=((16, 20), (32, 40)))
        shapes = [(1, grid.anchors_per_cell[level], h, w) for level, (h, w) in enumerate(((8, 9), (4, 5)))]

        def detect(fill):
            logits = [fill(torch.randn(n, a * 3, h, w)) for n, a, h, w in shapes]
            deltas = [torch.randn(n, a * 4, h, w) for n, a, h, w in shapes]
            ops.detect(logits, deltas, grid, torch.tensor([[64, 72]]), topk_per_level=topk)

        fills = (lambda t: t, lambda t: t - 100, lambda t: t + 100, lambda t: t * float("nan"))
        logs = [launched(detect, fill) for fill in fills]
        assert len(logs[0]) == count and all(log == logs[0] for log in logs)

    def test_padded_nms(self, launched):
        scores = (torch.rand(2, 300), torch.full((2, 300), float("nan")), torch.zeros(2, 300))
        boxes = (random_boxes(2, 300), random_boxes(2, 300), torch.zeros(2, 300, 4))
        logs = [
            launched(lambda b, s: ops.batched_nms_padded(b, s, iou_threshold=0.5, max_detections=20), b, s)
            for b, s in zip(boxes, scores, strict=True)
        ]
        assert len(logs[0]) == 1 and logs[0] == logs[1] == logs[2]

    @pytest.mark.parametrize("method", ("linear", "gaussian"))
    def test_soft_nms(self, launched, method):
        scores = (torch.rand(2, 300), torch.full((2, 300), float("nan")), torch.zeros(2, 300))
        boxes = (random_boxes(2, 300), random_boxes(2, 300), torch.zeros(2, 300, 4))
        logs = [
            launched(lambda b, s: ops.soft_nms(b, s, method=method, max_detections=20), b, s)
            for b, s in zip(boxes, scores, strict=True)
        ]
        assert len(logs[0]) == 1 and logs[0] == logs[1] == logs[2]

    def test_hard_negative_mask(self, launched):
        labels = (torch.randint(-2, 2, (2, 700)), torch.full((2, 700), -1), torch.zeros(2, 700, dtype=torch.int64))
        logs = [launched(ops.hard_negative_mask, torch.rand(2, 700), t) for t in labels]
        assert len(logs[0]) == 3 and logs[0] == logs[1] == logs[2]

    def test_gather_class_scores(self, launched):
        logits = [torch.randn(2, 6, 5, 7), torch.randn(2, 6, 3, 4)]
        logs = [launched(ops.gather_class_scores, logits, torch.full((2, 9), i), 3) for i in (0, 80, -1)]
        assert len(logs[0]) == 1 and logs[0] == logs[1] == logs[2]
