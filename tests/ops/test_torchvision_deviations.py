"""Where the ops with torchvision's names stay apart from torchvision; docs/deviations.md has the list."""

import math

import pytest
import torch
from cases import random_boxes
from torch import Tensor
from torchvision_cases import IOUS, LOSSES, WITH_EPS, assert_same, boxes_of, candidates

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
        (torch.zeros(0, 4), torch.zeros(3), torch.zeros(3)),
        (torch.zeros(0, 5), empty, empty),
        (torch.zeros(3, 0), torch.zeros(3), torch.zeros(3)),
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
        lambda: ops.generalized_box_iou_loss(boxes, boxes.float()),
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
    """torchvision's default changes the losses of small boxes in the third digit."""
    a = torch.rand(40, 2, dtype=torch.float64).repeat(1, 2) + torch.tensor([0.0, 0, 10, 10])
    b = a + torch.rand(40, 4) * 2 - 1
    small = [boxes / 1e3 for boxes in (a, b)]
    exact = getattr(ops, name)(*small)
    torch.testing.assert_close(exact, getattr(ops, name)(a, b))
    default = getattr(tv, name)(*small)
    torch.testing.assert_close(getattr(ops, name)(*small, eps=1e-7), default, rtol=1e-12, atol=1e-12)
    assert 1e-4 < ((default - exact) / exact).abs().median() < 1e-2


def test_epsilon_of_the_complete_loss():
    """The term of the aspect ratios is v^2 / (1 - iou + v), with eps added to the denominator."""
    a, b = torch.tensor([[0.0, 0, 40, 4]]).double(), torch.tensor([[0.0, 0, 4, 40]]).double()
    v = 4 / math.pi**2 * (math.atan(10) - math.atan(0.1)) ** 2
    eps, iou = 30.0, 16 / (160 + 160 - 16)
    of_aspect_ratios = tv.complete_box_iou_loss(a, b, eps=eps) - tv.distance_box_iou_loss(a, b)
    assert of_aspect_ratios.item() == pytest.approx(v**2 / (1 - iou + v + eps), rel=1e-6)
    of_aspect_ratios = ops.complete_box_iou_loss(a, b, eps=eps) - ops.distance_box_iou_loss(a, b, eps=eps)
    assert of_aspect_ratios.item() == pytest.approx(v**2 / (1 - 16 / (304 + eps) + v + eps), rel=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_of_boxes_without_area(name):
    point, line = torch.tensor([[5.0, 5, 5, 5]]), torch.tensor([[5.0, 5, 8, 5]])
    box = torch.tensor([[0.0, 0, 10, 10]])
    for flat in (point, line):
        assert getattr(ops, name)(flat, flat).item() == 0 and not getattr(tv, name)(flat, flat).item() == 0
    is_ciou = name == "complete_box_iou_loss"
    assert getattr(ops, name)(point, box).isfinite().all() and getattr(tv, name)(point, box).isnan().all() == is_ciou
    ours, theirs = (
        torch.autograd.grad(getattr(library, name)(line.requires_grad_(), box).sum(), line)[0] for library in (ops, tv)
    )
    assert ours.isfinite().all() and theirs.isnan().any() == is_ciou


@pytest.mark.parametrize("name", LOSSES)
def test_gradient_of_losses_of_touching_boxes(name):
    a, b = torch.tensor([[0.0, 0, 10, 10]], requires_grad=True), torch.tensor([[10.0, 5, 20, 15]])
    ours, theirs = (torch.autograd.grad(getattr(library, name)(a, b).sum(), a)[0] for library in (ops, tv))
    # Half of the derivative of the intersection by x2, which is 5. The union has 200, and the enclosing box 300.
    expected = -0.5 * 5 / 200 + (0.5 * 5 / 300 if name == "generalized_box_iou_loss" else 0)
    assert (ours - theirs)[0, 2].item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", (*IOUS, *LOSSES))
def test_forward_mode_of_pairs_raises(name):
    a, b = boxes_of(5), boxes_of(5)
    assert torch.func.jvp(lambda a: getattr(tv, name)(a, b), (a,), (a,))[1].isfinite().all()
    with pytest.raises(NotImplementedError, match=f"{name}: forward-mode differentiation is not supported"):
        torch.func.jvp(lambda a: getattr(ops, name)(a, b), (a,), (a,))


@pytest.mark.parametrize("name", LOSSES)
def test_losses_of_large_integer_boxes(name):
    a, b = torch.tensor([[100_000_000, 0, 100_000_013, 10]]), torch.tensor([[100_000_003, 0, 100_000_016, 10]])
    exact = getattr(ops, name)((a % 100_000_000).double(), (b % 100_000_000).double())
    assert getattr(ops, name)(a, b).item() == pytest.approx(exact.item(), rel=1e-6)
    assert getattr(tv, name)(a, b).item() != pytest.approx(exact.item(), rel=1e-2)


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
