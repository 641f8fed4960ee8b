"""The cases whose time is predicted: ops, shapes, and kinds of input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tools.kernel_times import inputs
from tools.kernel_times.inputs import IMAGES

Call = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """One call of an op.

    Attributes:
        name: Name in the tables.
        prepare: Function that makes the inputs of so many images on torch's default device, and returns the call.
        goal: Microseconds on an H200 that the project aims at.
        images: Number of images.
        emulated_images: Number of images whose blocks are emulated; 0: all. Only for ops whose images are independent.
        sampled_blocks: About how many blocks of each launch to emulate; 0: all. Only for ops of which no launch
            depends on the results of an earlier one.
        waits: Whether the op waits for the device, so that a CUDA graph cannot hold it.
        note: What a reader of the table should know.
    """

    name: str
    prepare: Callable[[int], Call]
    goal: float | None = None
    images: int = IMAGES
    emulated_images: int = 0
    sampled_blocks: int = 0
    waits: bool = False
    note: str = ""


def nms(n: int, make: Callable[[int], Tensor]) -> Callable[[int], Call]:
    """Prepare the NMS of one list."""

    def prepare(images: int) -> Call:
        import retinanet_ops as ops

        boxes, scores = make(n), torch.rand(n)
        return lambda: ops.nms(boxes, scores, 0.5)

    return prepare


def padded_nms(images: int) -> Call:
    """Prepare the NMS of a padded batch of 5,000 boxes of 80 classes, of which 100 are kept."""
    import retinanet_ops as ops

    boxes, scores = inputs.uniform_boxes(images, 5000), torch.rand(images, 5000)
    classes = torch.randint(0, inputs.CLASSES, (images, 5000))
    return lambda: ops.batched_nms_padded(boxes, scores, classes, iou_threshold=0.5, max_detections=100)


def detect(dtype: torch.dtype, mean: float) -> Callable[[int], Call]:
    """Prepare the detection from logits of a mean that determines how many pass the score threshold."""

    def prepare(images: int) -> Call:
        import retinanet_ops as ops

        grid, sizes = inputs.anchor_grid(), torch.tensor([inputs.SIZE] * images)
        logits, deltas = inputs.logits(images, dtype, mean), inputs.deltas(images, dtype)
        return lambda: ops.detect(logits, deltas, grid, sizes)

    return prepare


def dense_focal_loss(dtype: torch.dtype) -> Callable[[int], Call]:
    """Prepare the forward and backward pass of the dense focal loss."""

    def prepare(images: int) -> Call:
        import retinanet_ops as ops

        logits = [level.requires_grad_() for level in inputs.logits(images, dtype, -4.6)]
        labels = inputs.labels(images, 1500)
        return lambda: torch.autograd.grad(ops.dense_focal_loss(logits, labels, inputs.CLASSES).sum(), logits)

    return prepare


def focal_loss_rows(dtype: torch.dtype) -> Callable[[int], Call]:
    """Prepare the forward and backward pass of the sum of the focal loss of rows."""

    def prepare(images: int) -> Call:
        import retinanet_ops as ops

        image = (torch.randn(inputs.ANCHORS, inputs.CLASSES) * 1.2 - 4.6).to(dtype)
        rows, labels = image.repeat(images, 1).requires_grad_(), inputs.labels(images, 1500).flatten()
        return lambda: torch.autograd.grad(ops.sigmoid_focal_loss(rows, labels, reduction="sum"), rows)

    return prepare


def dense_softmax_cross_entropy(dtype: torch.dtype) -> Callable[[int], Call]:
    """Prepare the forward and backward pass of SSD's classification loss, which counts a twelfth of the anchors."""

    def prepare(images: int) -> Call:
        import retinanet_ops as ops

        levels = ((4, 38), (6, 19), (6, 10), (6, 5), (4, 3), (4, 1))
        logits = [torch.randn(images, a * 91, side, side).to(dtype).requires_grad_() for a, side in levels]
        targets = torch.randint(0, 91, (images, 8732), dtype=torch.int32)
        weight = (torch.arange(8732) % 12 == 0).float().expand(images, -1)
        return lambda: torch.autograd.grad(ops.dense_softmax_cross_entropy(logits, targets, 91), logits, weight)

    return prepare


def ssd_matching(images: int) -> Call:
    """Prepare SSD's matching of 50 ground truths an image with the default boxes of SSD300."""
    import retinanet_ops as ops

    corner = torch.rand(8732, 2) * 300
    default_boxes = torch.cat((corner, corner + 20 + 100 * torch.rand(8732, 2)), dim=1)
    corner = torch.rand(images, 50, 2) * 250
    boxes, count = torch.cat((corner, corner + 50 * torch.rand(images, 50, 2)), dim=2), torch.full((images,), 50)
    labels, rule = torch.zeros(images, 50, dtype=torch.int64), ops.MatchRule(0.5, 0.5, low_quality="ssd")
    return lambda: ops.assign_targets(default_boxes, boxes, labels, count, rule=rule)


def matching(on_grid: bool) -> Callable[[int], Call]:
    """Prepare the matching of 100 ground truths an image."""

    def prepare(images: int) -> Call:
        import retinanet_ops as ops

        grid = inputs.anchor_grid()
        anchors = grid if on_grid else grid.boxes()
        boxes, classes = inputs.uniform_boxes(images, 100), torch.randint(0, inputs.CLASSES, (images, 100))
        counts = torch.full((images,), 100)
        return lambda: ops.assign_targets(anchors, boxes, classes, counts)

    return prepare


def assign_points(images: int) -> Call:
    """Prepare the assignment of FCOS's points, one in each cell, to 100 ground truths an image."""
    import retinanet_ops as ops

    grid = inputs.point_grid()
    boxes, classes = inputs.uniform_boxes(images, 100), torch.randint(0, inputs.CLASSES, (images, 100))
    counts = torch.full((images,), 100)
    return lambda: ops.assign_points(grid, boxes, classes, counts)


def dense_box_loss(dtype: torch.dtype) -> Callable[[int], Call]:
    """Prepare the forward and backward pass of the L1 box loss."""

    def prepare(images: int) -> Call:
        import retinanet_ops as ops

        grid, boxes = inputs.anchor_grid(), inputs.uniform_boxes(images, 100)
        deltas = [level.requires_grad_() for level in inputs.deltas(images, dtype)]
        matches = inputs.labels(images, 400)
        return lambda: torch.autograd.grad(ops.dense_box_loss(deltas, grid, boxes, matches).sum(), deltas)

    return prepare


def dense_box_loss_backward(dtype: torch.dtype) -> Callable[[int], Call]:
    """Prepare the backward pass alone. Its kernel is called directly, so that a CUDA graph can hold it."""

    def prepare(images: int) -> Call:
        from retinanet_ops._anchor_arguments import anchor_arguments

        grid, boxes = inputs.anchor_grid(), inputs.uniform_boxes(images, 100)
        deltas, matches = inputs.deltas(images, dtype), inputs.labels(images, 400).int()
        anchors = anchor_arguments("dense_box_loss", grid, images, inputs.ANCHORS, torch.float32, ("deltas", deltas[0]))
        options = ("l1", 0.0, [1.0, 1.0, 1.0, 1.0], None, 0.0)
        arguments = (deltas, *anchors, boxes, matches)
        _, matched = torch.ops.retinanet_ops.dense_box_loss(*arguments, *options)
        grad = torch.ones(images)
        return lambda: torch.ops.retinanet_ops.dense_box_loss_backward(grad, *arguments, matched, *options)

    return prepare


def box_iou(images: int) -> Call:
    """Prepare the IoU of 100 boxes and all anchors."""
    import retinanet_ops as ops

    boxes, anchors = inputs.uniform_boxes(100), inputs.anchor_grid().boxes()
    return lambda: ops.box_iou(boxes, anchors)


def hard_negative_mask(images: int) -> Call:
    """Prepare the choice of the hardest negatives among all anchors."""
    import retinanet_ops as ops

    loss, labels = torch.rand(images, inputs.ANCHORS), inputs.labels(images, 1000)
    return lambda: ops.hard_negative_mask(loss, labels)


def soft_nms(images: int) -> Call:
    """Prepare Soft-NMS of 5,000 boxes, of which 100 are taken."""
    import retinanet_ops as ops

    boxes, scores = inputs.uniform_boxes(images, 5000), torch.rand(images, 5000)
    classes = torch.randint(0, inputs.CLASSES, (images, 5000))
    return lambda: ops.soft_nms(boxes, scores, classes, max_detections=100)


F32, BF16 = torch.float32, torch.bfloat16

CASES = [
    Case("nms 5k, thousands kept", nms(5_000, inputs.uniform_boxes), 150, waits=True),
    Case("nms 12k, thousands kept", nms(12_000, inputs.uniform_boxes), waits=True),
    Case("nms 20k, thousands kept", nms(20_000, inputs.uniform_boxes), 700, waits=True),
    Case("nms 20k, few kept", nms(20_000, inputs.one_cluster), 200, waits=True),
    Case("batched_nms_padded 16 x 5000", padded_nms, 25),
    Case("batched_nms_padded 1 x 5000", padded_nms, 20, images=1),
    # One read of the logits takes 240 us in fp32 and 120 us in bf16.
    Case("detect few candidates fp32", detect(F32, inputs.FEW), 306, emulated_images=1),
    Case("detect few candidates bf16", detect(BF16, inputs.FEW), 168, emulated_images=1),
    Case("detect 4.7 M candidates fp32", detect(F32, inputs.MANY), 372, emulated_images=1),
    Case("detect 4.7 M candidates bf16", detect(BF16, inputs.MANY), 216, emulated_images=1),
    Case("dense_focal_loss fp32", dense_focal_loss(F32), 1000, sampled_blocks=120),
    Case("dense_focal_loss bf16", dense_focal_loss(BF16), 450, sampled_blocks=120),
    Case("sigmoid_focal_loss rows fp32", focal_loss_rows(F32), 1000, sampled_blocks=120),
    Case("sigmoid_focal_loss rows bf16", focal_loss_rows(BF16), 450, sampled_blocks=120),
    Case("assign_targets grid", matching(on_grid=True), 90, emulated_images=2),
    Case("assign_targets explicit", matching(on_grid=False), 200, emulated_images=2),
    Case("assign_points 16 x 22,400", assign_points, emulated_images=2),
    Case("assign_targets SSD", ssd_matching, emulated_images=2),
    Case("dense_softmax_cross_entropy fp32", dense_softmax_cross_entropy(F32), sampled_blocks=120),
    Case("dense_softmax_cross_entropy bf16", dense_softmax_cross_entropy(BF16), sampled_blocks=120),
    Case("dense_box_loss fp32", dense_box_loss(F32), emulated_images=1),
    Case("dense_box_loss bf16", dense_box_loss(BF16), emulated_images=1),
    Case("dense_box_loss backward fp32", dense_box_loss_backward(F32), 18, emulated_images=1),
    Case("dense_box_loss backward bf16", dense_box_loss_backward(BF16), 11, emulated_images=1),
    Case("box_iou 100 x 201,600", box_iou, 25, sampled_blocks=200),
    Case("hard_negative_mask 16 x 201,600", hard_negative_mask, 30, emulated_images=1),
    Case("soft_nms 16 x 5000", soft_nms, 45, emulated_images=1),
]
