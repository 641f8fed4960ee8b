"""Where the ops with torchvision's names stay apart from torchvision; docs/deviations.md has the list."""

import pytest
import torch
from cases import random_boxes
from torch import Tensor
from torchvision_cases import LOSSES, WITH_EPS, assert_same, boxes_of, candidates

import retinanet_ops as ops
from retinanet_ops import reference

tv = pytest.importorskip("torchvision", minversion="0.29").ops

pytestmark = pytest.mark.backends("cpu")


class Scripted(torch.nn.Module):
    """A module whose forward calls the operator itself."""

    def forward(self, boxes: Tensor, scores: Tensor) -> Tensor:
        return torch.ops.retinanet_ops.nms(boxes, scores, None, 0.5)


def test_torchscript():
    boxes, scores, _ = candidates(20, "cpu")
    for op in (ops.nms, ops.batched_nms, ops.box_iou, ops.sigmoid_focal_loss, ops.clip_boxes_to_image):
        with pytest.raises((RuntimeError, torch.jit.frontend.NotSupportedError)):
            torch.jit.script(op)
    expected = ops.nms(boxes, scores, 0.5)
    assert torch.equal(torch.jit.script(Scripted())(boxes, scores), expected)
    traced = torch.jit.trace(lambda boxes, scores: ops.nms(boxes, scores, 0.5), (boxes, scores))
    assert torch.equal(traced(boxes, scores), expected)


@pytest.mark.filterwarnings("ignore")
def test_quantised_tensors_are_refused():
    boxes, scores = (torch.quantize_per_tensor(t, 0.5, 0, torch.quint8) for t in candidates(6, "cpu")[:2])
    with pytest.raises(TypeError, match=r"nms: boxes must be float16.* got torch.quint8"):
        ops.nms(boxes, scores, 0.5)


@pytest.mark.parametrize(
    ("arguments", "error"),
    (
        ((torch.rand(4), torch.rand(3)), ValueError),
        ((torch.rand(3, 5), torch.rand(3)), ValueError),
        ((torch.rand(3, 4), torch.rand(3, 2)), ValueError),
        ((torch.rand(3, 4), torch.rand(4)), ValueError),
        ((torch.rand(0), torch.rand(0)), ValueError),
        ((torch.ones(3, 4).int(), torch.rand(3)), TypeError),
    ),
)
def test_error_types(arguments, error):
    with pytest.raises(RuntimeError):
        tv.nms(*arguments, 0.5)
    with pytest.raises(error, match="nms: "):
        ops.nms(*arguments, 0.5)


def test_binary_labels_without_unsqueeze_are_class_ids():
    logits, labels = torch.zeros(4, 1), torch.tensor([0, 1, 1, 0])
    with pytest.raises(ValueError, match="must be the same as input size"):
        tv.sigmoid_focal_loss(logits, labels.float())
    with pytest.raises(TypeError, match="class ids must be an integer tensor"):
        ops.sigmoid_focal_loss(logits, labels.float())
    ids = ops.sigmoid_focal_loss(logits, labels)  # 0 is the only class, so 1 is out of range
    assert ids[:, 0].isnan().tolist() == [False, True, True, False]
    assert ids[0, 0] == ops.sigmoid_focal_loss(torch.zeros(1, 1), torch.ones(1, 1)).item()
    dense = ops.sigmoid_focal_loss(logits, labels.unsqueeze(1))
    assert_same(dense, tv.sigmoid_focal_loss(logits, labels.unsqueeze(1).float()))


@pytest.mark.parametrize("fmt", ("cxcywhr", "xywhr", "xyxyxyxy"))
def test_rotated_formats_are_refused(fmt):
    boxes = torch.rand(3, 8 if fmt == "xyxyxyxy" else 5)
    assert tv.box_iou(boxes, boxes, fmt).shape == (3, 3)
    for library in (ops, reference):
        with pytest.raises(
            ValueError, match=f"box_iou: fmt must be one of xyxy, xywh, cxcywh, got '{fmt}'; torchvision"
        ):
            library.box_iou(boxes, boxes, fmt)


@pytest.mark.parametrize("name", WITH_EPS)
def test_default_epsilon_is_zero(name):
    a, b = boxes_of(9).double() / 1000, boxes_of(7).double() / 1000
    assert torch.equal(getattr(ops, name)(a, b), getattr(ops, name)(a, b, 0))
    default = getattr(tv, name)(a, b)
    torch.testing.assert_close(getattr(ops, name)(a, b, 1e-7), default, rtol=1e-12, atol=1e-12)
    assert (getattr(ops, name)(a, b) - default).abs().max() > 1e-6
    for eps, error in (
        (-1.0, "must not be negative"),
        (float("nan"), "must be a number"),
        (float("inf"), "finite"),
    ):
        with pytest.raises(ValueError, match=f"{name}: eps {error}|{name}: eps must be {error}"):
            getattr(ops, name)(a, b, eps)


def test_arguments_beside_empty_boxes_are_checked():
    empty = torch.zeros(0)
    for boxes, scores, idxs in (
        (empty, None, None),
        (torch.zeros(0, 4), torch.zeros(3), torch.zeros(3)),
        (torch.zeros(0, 5), empty, empty),
        (torch.zeros(3, 0), torch.zeros(3), torch.zeros(3)),
        (empty.long(), empty, empty),
    ):
        assert tv.batched_nms(boxes, scores, idxs, 0.5).shape == (0,)
        with pytest.raises((TypeError, ValueError), match="batched_nms: "):
            ops.batched_nms(boxes, scores, idxs, 0.5)


def test_shapes_that_torchvision_broadcasts():
    boxes, scores, _ = candidates(6, "cpu")
    assert tv.box_iou(boxes[0], boxes).shape == (1, 6)
    with pytest.raises(ValueError, match=r"box_iou: boxes1 must have shape \[..., M, 4\], got \[4\]"):
        ops.box_iou(boxes[0], boxes)
    assert len(tv.batched_nms(boxes, scores, torch.tensor([1]), 0.5)) > 0
    with pytest.raises(ValueError, match=r"batched_nms: idxs must have shape \[6\], got \[1\]"):
        ops.batched_nms(boxes, scores, torch.tensor([1]), 0.5)
    points = torch.tensor([[-1.0, 5], [50, 60]])
    assert tv.clip_boxes_to_image(points, (20, 30)).tolist() == [[0, 5], [30, 20]]
    with pytest.raises(ValueError, match=r"clip_boxes_to_image: boxes must have shape \[..., 4\], got \[2, 2\]"):
        ops.clip_boxes_to_image(points, (20, 30))


def test_boolean_boxes_are_refused():
    boxes = torch.tensor([[False, False, True, True]])
    assert tv.clip_boxes_to_image(boxes, (2, 2)).dtype == torch.int64
    for call in (
        lambda: ops.clip_boxes_to_image(boxes, (2, 2)),
        lambda: ops.box_iou(boxes, boxes.float()),
        lambda: ops.decode_boxes(torch.zeros(1, 4), boxes),
    ):
        with pytest.raises(TypeError, match="must be a floating or integer tensor, got torch.bool"):
            call()


def test_integer_boxes_keep_their_dtype():
    boxes = torch.tensor([[-5, 3, 40, 50]])
    assert tv.clip_boxes_to_image(boxes, (20.5, 30.5)).tolist() == [[0, 3, 30.5, 20.5]]
    clipped = ops.clip_boxes_to_image(boxes, (20.5, 30.5))
    assert clipped.dtype == torch.int64 and clipped.tolist() == [[0, 3, 30, 20]]


@pytest.mark.parametrize("name", LOSSES)
def test_default_epsilon_of_losses_is_zero(name):
    """torchvision's default changes the losses of small boxes, as in normalised coordinates."""
    a = random_boxes(40, size=60.0, max_side=30.0)
    b = a + torch.rand(40, 4)
    small = [boxes.double() / 1e3 for boxes in (a, b)]
    torch.testing.assert_close(getattr(ops, name)(*small), getattr(ops, name)(a.double(), b.double()))
    default = getattr(tv, name)(*small)
    torch.testing.assert_close(getattr(ops, name)(*small, eps=1e-7), default, rtol=1e-12, atol=1e-12)
    assert (getattr(ops, name)(*small) - default).abs().max() > 1e-5


def test_epsilon_of_the_complete_loss():
    a = random_boxes(30, size=60.0, max_side=30.0)
    b = a + torch.rand(30, 4)
    eps = 30.0
    assert (tv.complete_box_iou_loss(a, b, eps=eps) - tv.complete_box_iou_loss(a, b)).abs().max() < 1e-3
    difference = ops.complete_box_iou_loss(a, b, eps=eps) - tv.distance_box_iou_loss(a, b, eps=eps)
    assert difference.abs().max() < 1e-3
    assert (ops.complete_box_iou_loss(a, b, eps=eps) - ops.complete_box_iou_loss(a, b)).abs().max() > 1e-2


def test_coder_weights_of_integer_boxes():
    from torchvision.models.detection._utils import BoxCoder

    a, b, weights = boxes_of(5), boxes_of(5), (0.5, 0.5, 1.5, 1.5)
    assert (BoxCoder(weights).encode_single(a.int(), b.int())[:, :2] == 0).all()
    expected = BoxCoder(weights).encode_single(a, b)
    torch.testing.assert_close(ops.encode_boxes(a.int(), b.int(), coder_weights=weights), expected)


def test_half_precision_boxes_are_computed_in_float32():
    for dtype in (torch.float16, torch.bfloat16):
        a, b = (random_boxes(n).to(dtype) for n in (30, 20))
        expected = tv.generalized_box_iou(a.float(), b.float())
        assert_same(ops.generalized_box_iou(a, b), expected)
        assert (tv.generalized_box_iou(a, b) - expected).abs().max() > 1e-4


@pytest.mark.parametrize("name", ("box_iou", "generalized_box_iou"))
def test_differences_of_small_integers_do_not_wrap(name):
    """The boxes are 201 px apart, or 150 px wide."""
    for dtype, boxes in (
        (torch.uint8, [[0, 0, 20, 20], [221, 221, 240, 240]]),
        (torch.int8, [[-50, -50, 100, 100], [-40, -40, 100, 100]]),
    ):
        boxes = torch.tensor(boxes, dtype=dtype)
        expected = getattr(tv, name)(boxes.float(), boxes.float())
        assert_same(getattr(ops, name)(boxes, boxes), expected)
        assert not torch.allclose(getattr(tv, name)(boxes, boxes), expected)


def test_arrays_are_refused_as_in_torchvision():
    boxes, scores, _ = candidates(6, "cpu")
    with pytest.raises((AttributeError, TypeError)):
        tv.nms(boxes.numpy(), scores.numpy(), 0.5)
    with pytest.raises(TypeError, match=r"nms: boxes must be a tensor, got ndarray; convert it with torch.as_tensor"):
        ops.nms(boxes.numpy(), scores.numpy(), 0.5)
    with pytest.raises(TypeError, match=r"box_iou: boxes2 must be a tensor, got list; convert it with torch.as_tensor"):
        ops.box_iou(boxes, boxes.tolist())
