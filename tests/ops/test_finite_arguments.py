"""No op receives an infinite or NaN number: AOTInductor does not load an exported graph that holds one."""

import math

import pytest
import torch
from cases import random_boxes
from torch.utils._python_dispatch import TorchDispatchMode

import retinanet_ops as ops
from retinanet_ops import AnchorGrid, reference

INF = math.inf
GRID_SIZES = ((4, 5), (2, 3))


class NumbersOfOps(TorchDispatchMode):
    """Collect the names of the ops of this package that are called, and the numbers that they are called with."""

    def __init__(self):
        super().__init__()
        self.numbers: dict[str, list[float]] = {}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "retinanet_ops":
            numbers = self.numbers.setdefault(op.name().removeprefix("retinanet_ops::").removesuffix(".default"), [])
            for value in (*args, *(kwargs or {}).values()):
                numbers.extend(x for x in (value if isinstance(value, (list, tuple)) else [value]) if type(x) is float)
        return op(*args, **(kwargs or {}))

    def infinite(self):
        return {name: numbers for name, numbers in self.numbers.items() if not all(map(math.isfinite, numbers))}


class Inputs:
    """Inputs of every op: two images, two levels, two anchors in each cell, three classes."""

    def __init__(self, device):
        self.anchors = AnchorGrid.torchvision(
            GRID_SIZES, (32, 40), sizes=((8,), (16,)), aspect_ratios=((0.5, 2.0),) * 2
        )
        self.anchors = self.anchors.to(device)
        self.sizes = torch.tensor([[32, 40], [30, 33]], device=device)
        self.logits = [torch.randn(2, 2 * 3, h, w, device=device, requires_grad=True) for h, w in GRID_SIZES]
        self.deltas = [torch.randn(2, 2 * 4, h, w, device=device, requires_grad=True) for h, w in GRID_SIZES]
        self.gt_boxes = random_boxes(2, 3, size=20.0).to(device)
        self.gt_labels = torch.randint(0, 3, (2, 3), device=device)
        self.gt_count = torch.tensor([3, 1], device=device)
        self.rows = torch.randn(2, self.anchors.num_anchors, 4, device=device, requires_grad=True)
        self.labels = torch.randint(-2, 3, (2, self.anchors.num_anchors), device=device)
        self.boxes = random_boxes(2, 20, size=20.0).to(device)
        self.scores = torch.rand(2, 20, device=device)


def call_every_op(x):
    """Call every public op with default options, and every backward."""
    matches, _, _ = ops.assign_targets(x.anchors, x.gt_boxes, x.gt_labels, x.gt_count)
    ops.match_anchors(x.anchors, x.gt_boxes, x.gt_count)
    ops.match_statistics(x.anchors, x.gt_boxes, x.gt_count)
    ops.assign_points(x.anchors, x.gt_boxes, x.gt_labels, x.gt_count, radius=INF)
    losses = [
        ops.dense_focal_loss(x.logits, x.labels, 3).sum(),
        ops.sigmoid_focal_loss(x.rows, (x.rows > 0).float()).sum(),
        ops.dense_softmax_cross_entropy(x.logits, x.labels.clamp(min=0), 3).sum(),
        ops.encode_boxes(x.rows, x.anchors).sum(),
        ops.decode_boxes(x.rows, x.anchors).sum(),
        ops.decode_boxes(x.rows, x.anchors, image_sizes=x.sizes).sum(),
        ops.clip_boxes(x.rows, x.sizes).sum(),
        *(ops.dense_box_loss(x.deltas, x.anchors, x.gt_boxes, matches, kind=kind).sum() for kind in ("l1", "ciou")),
        *(op(x.rows[0], x.boxes[0]).sum() for op in (ops.box_iou, ops.generalized_box_iou)),
        *(op(x.rows[0], x.boxes[0]).sum() for op in (ops.distance_box_iou, ops.complete_box_iou)),
        *(op(x.rows[0], x.rows[0]).sum() for op in (ops.generalized_box_iou_loss, ops.distance_box_iou_loss)),
        ops.complete_box_iou_loss(x.rows[0], x.rows[0]).sum(),
    ]
    sum(losses).backward()
    ops.candidates(x.logits, x.deltas, x.anchors, x.sizes)
    detections = ops.detect(x.logits, x.deltas, x.anchors, x.sizes)
    ops.gather_class_scores(x.logits, detections.anchor_index, 3)
    ops.nms(x.boxes[0], x.scores[0], 0.5)
    ops.batched_nms(x.boxes[0], x.scores[0], torch.zeros_like(x.scores[0], dtype=torch.int64), 0.5)
    ops.batched_nms_padded(x.boxes, x.scores, iou_threshold=0.5, max_detections=5)
    # Only kernels call these two.
    order, valid = torch.ops.retinanet_ops.rank_scores(x.scores, None)
    torch.ops.retinanet_ops.nms_sorted(x.boxes, order, valid, None, 0.5, 5, 0, False)
    ops.soft_nms(x.boxes, x.scores, max_detections=5)
    ops.soft_nms_scores(x.boxes, x.scores)
    ops.hard_negative_mask(x.labels.float(), x.labels)


def test_default_options(device):
    with NumbersOfOps() as seen:
        call_every_op(Inputs(device))
    schemas = [s for s in torch._C._jit_get_all_schemas() if s.name.startswith("retinanet_ops::")]
    assert seen.numbers.keys() == {s.name.removeprefix("retinanet_ops::") for s in schemas}
    assert seen.infinite() == {}


DETECT = (
    {"score_threshold": -INF},
    {"score_threshold": INF},
    {"iou_threshold": INF},
    {"iou_threshold": -INF},
    {"min_log_ratio": -INF, "max_log_ratio": INF},
    {"max_log_ratio": None},
)


@pytest.mark.parametrize("options", DETECT, ids=str)
def test_detect_without_bounds(device, options):
    x = Inputs(device)
    with NumbersOfOps() as seen:
        actual = ops.detect(x.logits, x.deltas, x.anchors, x.sizes, **options)
    assert seen.infinite() == {}
    expected = reference.detect(x.logits, x.deltas, x.anchors, x.sizes, **options)
    for name in ("labels", "count", "anchor_index", "truncated"):
        assert torch.equal(getattr(actual, name), getattr(expected, name)), name
    torch.testing.assert_close(actual.boxes, expected.boxes, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("low", (None, -INF, -1.0))
@pytest.mark.parametrize("high", (None, INF, 1.0))
def test_decode_boxes_without_bounds(device, low, high):
    x = Inputs(device)
    deltas = (10 * x.rows).detach()
    options = {"min_log_ratio": low, "max_log_ratio": high}
    tensors = [deltas.clone().requires_grad_() for _ in range(2)]
    with NumbersOfOps() as seen:
        actual = ops.decode_boxes(tensors[0], x.anchors, **options)
        actual.sum().backward()
    assert seen.infinite() == {}
    expected = reference.decode_boxes(tensors[1], x.anchors, **options)
    expected.sum().backward()
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(tensors[0].grad, tensors[1].grad, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("high", (None, INF))
def test_dense_box_loss_without_bound(device, high):
    x = Inputs(device)
    matches = (x.labels >= 0).int() - 1
    with NumbersOfOps() as seen:
        actual = ops.dense_box_loss(x.deltas, x.anchors, x.gt_boxes, matches, kind="giou", max_log_ratio=high)
        grads = torch.autograd.grad(actual.sum(), x.deltas, create_graph=True)
        sum(g.square().sum() for g in grads).backward()
    assert seen.infinite() == {}
    expected = reference.dense_box_loss(x.deltas, x.anchors, x.gt_boxes, matches, kind="giou", max_log_ratio=high)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("threshold", (INF, -INF))
def test_nms_without_threshold(device, threshold):
    x = Inputs(device)
    classes = torch.arange(20, device=device) % 3
    padded = {"iou_threshold": threshold, "max_detections": 9}
    with NumbersOfOps() as seen:
        actual = (
            ops.nms(x.boxes[0], x.scores[0], threshold),
            ops.batched_nms(x.boxes[0], x.scores[0], classes, threshold),
            *ops.batched_nms_padded(x.boxes, x.scores, **padded),
        )
    assert seen.infinite() == {}
    expected = (
        reference.nms(x.boxes[0], x.scores[0], threshold),
        reference.batched_nms(x.boxes[0], x.scores[0], classes, threshold),
        *reference.batched_nms_padded(x.boxes, x.scores, **padded),
    )
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize(
    "options",
    (
        {"sigma": INF},
        {"min_score": INF},
        {"method": "linear", "iou_threshold": INF},
        {"method": "linear", "iou_threshold": -INF},
    ),
    ids=str,
)
def test_soft_nms_without_bounds(device, dtype, options):
    x = Inputs(device)
    boxes, scores = x.boxes.to(dtype), x.scores.to(dtype)
    scores[0, 3] = INF
    with NumbersOfOps() as seen:
        actual = ops.soft_nms(boxes, scores, max_detections=9, **options)
    assert seen.infinite() == {}
    expected = reference.soft_nms(boxes, scores, max_detections=9, **options)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_infinite_options_without_a_meaning_raise(device):
    x = Inputs(device)
    matches = x.labels.clamp(max=0)
    for call, name in (
        (lambda: ops.encode_boxes(x.rows, x.anchors, offset=INF), "offset"),
        (lambda: ops.decode_boxes(x.rows, x.anchors, offset=-INF), "offset"),
        (lambda: ops.decode_boxes(x.rows, x.anchors, min_log_ratio=INF), "min_log_ratio"),
        (lambda: ops.decode_boxes(x.rows, x.anchors, max_log_ratio=-INF), "max_log_ratio"),
        (lambda: ops.dense_box_loss(x.deltas, x.anchors, x.gt_boxes, matches, beta=INF), "beta"),
        (lambda: ops.sigmoid_focal_loss(x.rows, x.rows, gamma=INF), "gamma"),
        (lambda: ops.dense_focal_loss(x.logits, x.labels, 3, alpha=-INF), "alpha"),
    ):
        with pytest.raises(ValueError, match=f"{name} must be finite, got -?inf"):
            call()
