"""How often an op calls PyTorch's dispatcher: once for the op, and once for its gradient.

Each call takes about a microsecond, and on CUDA most of them launch a kernel. Inputs have the dtypes for which no
conversion is needed: float32, int64 for what users give, and int32 for what `assign_targets` returns.
"""

import pytest
import torch
from cases import random_boxes
from torch.utils._python_dispatch import TorchDispatchMode

import retinanet_ops as ops
from retinanet_ops import AnchorGrid, _gradients

GRID_SIZES = ((4, 5), (2, 3))
CLASSES = 3


class Calls(TorchDispatchMode):
    """Collect the names of the operators that reach a kernel."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.names.append(op.name().removesuffix(".default"))
        return op(*args, **(kwargs or {}))


class Inputs:
    """Two images, two levels, two anchors in each cell."""

    def __init__(self, device, requires_grad=False):
        self.grid = AnchorGrid.torchvision(
            GRID_SIZES, (32, 40), sizes=((8,), (16,)), aspect_ratios=((0.5, 2.0),) * 2, device=device
        )
        self.anchors = self.grid.boxes()
        count = len(self.anchors)
        self.sizes = torch.tensor([[32.0, 40.0], [30.0, 33.0]], device=device)
        self.logits = [torch.randn(2, 2 * CLASSES, h, w, device=device) for h, w in GRID_SIZES]
        self.deltas = [torch.randn(2, 2 * 4, h, w, device=device) for h, w in GRID_SIZES]
        self.gt_boxes = random_boxes(2, 3, size=20.0).to(device)
        self.gt_labels = torch.randint(0, CLASSES, (2, 3), device=device)
        self.gt_count = torch.tensor([3, 1], device=device)
        self.labels = torch.randint(-2, CLASSES, (2, count), device=device, dtype=torch.int32)
        self.matches = torch.randint(-2, 3, (2, count), device=device, dtype=torch.int32)
        self.anchor_classes = torch.randint(0, CLASSES, (2, count), device=device, dtype=torch.int32)
        self.losses = torch.rand(2, count, device=device)
        self.rows = random_boxes(2, count, size=2.0, max_side=2.0).to(device)
        self.boxes, self.scores = random_boxes(2, 20, size=20.0).to(device), torch.rand(2, 20, device=device)
        self.classes = torch.randint(0, CLASSES, (2, 20), device=device)
        self.index = torch.randint(0, count, (2, 7), device=device)
        self.list1, self.list2, self.list3 = (random_boxes(count).to(device) for count in (4, 5, 4))
        self.list_scores, self.list_classes = torch.rand(4, device=device), torch.tensor([0, 1, 1, 2], device=device)
        self.x, self.ids = torch.randn(9, CLASSES, device=device), torch.randint(-2, CLASSES, (9,), device=device)
        self.targets, self.factors = torch.rand_like(self.x), torch.rand(CLASSES, device=device)
        self.parameters = [*self.logits, *self.deltas, self.rows, self.boxes, self.list1, self.x]
        if requires_grad:
            for tensor in self.parameters:
                tensor.requires_grad_()


# A call of each op, and the operator that it calls.
CONSTANT = {
    "match_anchors": ("assign_targets", lambda i: ops.match_anchors(i.grid, i.gt_boxes, i.gt_count)),
    "assign_targets": ("assign_targets", lambda i: ops.assign_targets(i.grid, i.gt_boxes, i.gt_labels, i.gt_count)),
    "assign_targets, boxes and crowds": (
        "assign_targets",
        lambda i: ops.assign_targets(
            i.anchors, i.gt_boxes, i.gt_labels, i.gt_count, crowds=ops.PaddedBoxes(i.gt_boxes, i.gt_count)
        ),
    ),
    "assign_points": ("assign_points", lambda i: ops.assign_points(i.grid, i.gt_boxes, i.gt_labels, i.gt_count)),
    "assign_points, boxes": (
        "assign_points",
        lambda i: ops.assign_points(
            i.anchors, i.gt_boxes, i.gt_labels, i.gt_count, level_sizes=[2 * h * w for h, w in GRID_SIZES]
        ),
    ),
    "match_statistics": ("assign_targets", lambda i: ops.match_statistics(i.grid, i.gt_boxes, i.gt_count)),
    "hard_negative_mask": ("hard_negative_mask", lambda i: ops.hard_negative_mask(i.losses, i.labels)),
    "gather_class_scores": ("gather_class_scores", lambda i: ops.gather_class_scores(i.logits, i.index, CLASSES)),
    "nms": ("nms", lambda i: ops.nms(i.list1, i.list_scores, 0.5)),
    "batched_nms": ("nms", lambda i: ops.batched_nms(i.list1, i.list_scores, i.list_classes, 0.5)),
    "batched_nms_padded": (
        "batched_nms_padded",
        lambda i: ops.batched_nms_padded(i.boxes, i.scores, i.classes, iou_threshold=0.5, max_detections=5),
    ),
    "detect": ("detect", lambda i: ops.detect(i.logits, i.deltas, i.grid, i.sizes, max_detections=5)),
    "soft_nms": ("soft_nms", lambda i: ops.soft_nms(i.boxes, i.scores, i.classes, max_detections=5)),
    "soft_nms_scores": ("soft_nms_scores", lambda i: ops.soft_nms_scores(i.boxes, i.scores, i.classes)),
}
DIFFERENTIABLE = {
    "dense_focal_loss": ("dense_focal_loss", lambda i: ops.dense_focal_loss(i.logits, i.labels, CLASSES)),
    "dense_box_loss": ("dense_box_loss", lambda i: ops.dense_box_loss(i.deltas, i.grid, i.gt_boxes, i.matches)),
    "dense_box_loss, boxes": (
        "dense_box_loss",
        lambda i: ops.dense_box_loss(i.deltas, i.anchors, i.gt_boxes, i.matches, kind="giou"),
    ),
    "sigmoid_focal_loss, class ids": ("sigmoid_focal_loss", lambda i: ops.sigmoid_focal_loss(i.x, i.ids)),
    "sigmoid_focal_loss, dense targets, sum": (
        "sigmoid_focal_loss",
        lambda i: ops.sigmoid_focal_loss(i.x, i.targets, reduction="sum"),
    ),
    "sigmoid_focal_loss, factors of classes": (
        "sigmoid_focal_loss",
        lambda i: ops.sigmoid_focal_loss(i.x, i.targets, pos_weight=i.factors, ignore_value=-100.0),
    ),
    "dense_softmax_cross_entropy": (
        "dense_softmax_cross_entropy",
        lambda i: ops.dense_softmax_cross_entropy(i.logits, i.anchor_classes, CLASSES),
    ),
    "box_iou": ("box_iou", lambda i: ops.box_iou(i.list1, i.list2)),
    "generalized_box_iou": ("box_iou", lambda i: ops.generalized_box_iou(i.list1, i.list2)),
    "distance_box_iou": ("box_iou", lambda i: ops.distance_box_iou(i.list1, i.list2)),
    "complete_box_iou": ("box_iou", lambda i: ops.complete_box_iou(i.list1, i.list2)),
    "generalized_box_iou_loss": ("box_iou_loss", lambda i: ops.generalized_box_iou_loss(i.list1, i.list3)),
    "distance_box_iou_loss": ("box_iou_loss", lambda i: ops.distance_box_iou_loss(i.list1, i.list3)),
    "complete_box_iou_loss": ("box_iou_loss", lambda i: ops.complete_box_iou_loss(i.list1, i.list3)),
}
# The references compute the gradients of these ops, in many calls.
DIFFERENTIABLE_BY_REFERENCE = {
    "encode_boxes": ("encode_boxes", lambda i: ops.encode_boxes(i.rows, i.grid)),
    "encode_boxes, boxes": ("encode_boxes", lambda i: ops.encode_boxes(i.rows, i.anchors)),
    "decode_boxes": ("decode_boxes", lambda i: ops.decode_boxes(i.rows, i.grid)),
    "decode_boxes, clipped": ("decode_boxes", lambda i: ops.decode_boxes(i.rows, i.grid, image_sizes=i.sizes)),
    "clip_boxes": ("clip_boxes", lambda i: ops.clip_boxes(i.boxes, i.sizes)),
}


def cases(*tables):
    return [pytest.param(*case, id=name) for table in tables for name, case in table.items()]


@pytest.mark.parametrize(("operator", "call"), cases(CONSTANT, DIFFERENTIABLE, DIFFERENTIABLE_BY_REFERENCE))
@pytest.mark.parametrize("grad_mode", (True, False))
def test_an_op_is_one_call(device, operator, call, grad_mode):
    inputs = Inputs(device)
    with torch.set_grad_enabled(grad_mode), Calls() as calls:
        call(inputs)
    assert calls.names == [f"retinanet_ops::{operator}"]


@pytest.mark.parametrize(("operator", "call"), cases(DIFFERENTIABLE, DIFFERENTIABLE_BY_REFERENCE))
def test_an_op_that_needs_a_gradient_is_one_call(device, operator, call):
    inputs = Inputs(device, requires_grad=True)
    with Calls() as calls:
        result = call(inputs)
    assert result.requires_grad and calls.names == [f"retinanet_ops::{operator}"]


@pytest.mark.parametrize(("operator", "call"), cases(DIFFERENTIABLE))
def test_a_gradient_is_one_call(device, operator, call):
    inputs = Inputs(device, requires_grad=True)
    result = call(inputs)
    ones = torch.ones_like(result)
    with Calls() as calls:
        grads = torch.autograd.grad(result, inputs.parameters, ones, allow_unused=True)
    assert calls.names == [f"retinanet_ops::{operator}_backward"]
    assert any(g is not None and g.any() for g in grads)


@pytest.mark.parametrize(("operator", "call"), cases(DIFFERENTIABLE, DIFFERENTIABLE_BY_REFERENCE))
def test_the_short_path_gives_the_same_gradients(device, operator, call):
    results = []
    for short in (True, False):
        torch.manual_seed(0)
        inputs = Inputs(device, requires_grad=True)
        with pytest.MonkeyPatch.context() as patch:
            if not short:
                patch.setattr(_gradients, "_transforms_active", lambda: True)
            value = call(inputs)
            assert value.grad_fn.name().startswith("GradientOf" if short else "GeneratedBackwardFor")
        grads = torch.autograd.grad(value.sum(), inputs.parameters, allow_unused=True)
        results.append([value, *(g for g in grads if g is not None)])
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_without_the_undocumented_functions_of_pytorch_the_operator_is_called(monkeypatch):
    monkeypatch.setattr(_gradients, "_HAS_SHORT_PATH", False)
    monkeypatch.setattr(torch.library, "register_autograd", lambda *arguments, **options: None)
    assert _gradients.differentiable("box_iou", print, print) is torch.ops.retinanet_ops.box_iou.default
