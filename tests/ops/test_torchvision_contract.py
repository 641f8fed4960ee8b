"""The ops with torchvision's names take what torchvision takes: torchvision is the oracle.

The inputs are valid in torchvision and do not touch the deliberate differences, which have their own tests in
test_torchvision_deviations.py.
"""

import numpy as np
import pytest
import torch
from cases import random_boxes
from torchvision_cases import (
    FLOAT,
    INTEGER,
    IOUS,
    LOSSES,
    SIGNED,
    VARIANTS,
    WITH_EPS,
    assert_same,
    boxes_of,
    candidates,
)

import retinanet_ops as ops
from retinanet_ops import reference

tv = pytest.importorskip("torchvision", minversion="0.29").ops

pytestmark = pytest.mark.once


class TestIou:
    @pytest.mark.parametrize("name", IOUS)
    @pytest.mark.parametrize("dtype", (*FLOAT, *SIGNED))
    def test_dtypes(self, device, name, dtype):
        a, b = boxes_of(17, dtype=dtype, device=device), boxes_of(12, dtype=dtype, device=device)
        for first, second in ((a, b), (a, b.float()), (a.float(), b)):
            expected = getattr(tv, name)(first, second)
            assert_same(getattr(ops, name)(first, second), expected)
            assert_same(getattr(reference, name)(first, second), expected)

    @pytest.mark.parametrize("name", IOUS)
    @pytest.mark.parametrize(
        ("lead1", "lead2"),
        (
            ((2,), (2,)),
            ((2,), ()),
            ((), (2,)),
            ((2, 3), (3,)),
            ((1,), (3,)),
            ((3, 1), (1, 2)),
            ((0,), (0,)),
            ((0,), ()),
        ),
        ids=str,
    )
    @pytest.mark.parametrize("counts", ((4, 5), (0, 5), (4, 0)), ids=str)
    def test_leading_dimensions(self, device, name, lead1, lead2, counts):
        a, b = boxes_of(*lead1, counts[0], device=device), boxes_of(*lead2, counts[1], device=device)
        for first, second in ((a, b), (a.int(), b)):
            assert_same(getattr(ops, name)(first, second), getattr(tv, name)(first, second))
            assert_same(getattr(reference, name)(first, second), getattr(tv, name)(first, second))

    @pytest.mark.parametrize("name", IOUS)
    @pytest.mark.parametrize(("lead1", "lead2"), (((2,), (2,)), ((2,), ()), ((), (2,)), ((3, 1), (2,)), ((0,), (0,))))
    def test_gradient_of_leading_dimensions(self, device, name, lead1, lead2):
        tensors = [boxes_of(*lead, 4, device=device, whole=False).requires_grad_() for lead in (lead1, lead2)]
        actual, expected = (getattr(library, name)(*tensors) for library in (ops, tv))
        weight = torch.randn_like(expected)
        grads = [torch.autograd.grad((value * weight).sum(), tensors) for value in (actual, expected)]
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("fmt", ("xyxy", "xywh", "cxcywh"))
    @pytest.mark.parametrize("dtype", (*FLOAT, *SIGNED, torch.float16))
    def test_formats(self, device, fmt, dtype):
        a, b = (boxes_of(n, dtype=dtype, device=device, fmt=fmt) for n in (17, 12))
        assert (tv.box_iou(a, b, fmt) > 0).any()
        for arguments, options in (((a, b, fmt), {}), ((), {"boxes1": a, "boxes2": b, "fmt": fmt})):
            assert_same(ops.box_iou(*arguments, **options), tv.box_iou(a, b, fmt))
        assert_same(reference.box_iou(a, b, fmt), tv.box_iou(a, b, fmt))
        batch = ops.box_iou(a[None], torch.stack((b, b.flip(0))), fmt)
        assert_same(batch, tv.box_iou(a[None], torch.stack((b, b.flip(0))), fmt))

    @pytest.mark.parametrize("fmt", ("xywh", "cxcywh"))
    def test_gradient_of_formats(self, device, fmt):
        tensors = [boxes_of(n, device=device, fmt=fmt, whole=False).requires_grad_() for n in (5, 4)]
        grads = [torch.autograd.grad(library.box_iou(*tensors, fmt).sum(), tensors) for library in (ops, tv)]
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize("name", WITH_EPS)
    @pytest.mark.parametrize("eps", (0, 1e-7, 1e-3, 30.0))
    def test_epsilon(self, device, name, eps):
        a, b = (boxes_of(n, device=device, whole=False).div(100).requires_grad_() for n in (9, 7))
        expected = getattr(tv, name)(a, b, eps)
        for value in (getattr(ops, name)(a, b, eps), getattr(ops, name)(a, b, eps=eps)):
            assert_same(value, expected)
            grads = [torch.autograd.grad(v.sum(), (a, b), retain_graph=True) for v in (value, expected)]
            torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)
        assert_same(getattr(ops, name)(a[None], b, eps), expected[None])
        assert (expected - getattr(ops, name)(a, b)).abs().max() > (1e-4 if eps > 1e-4 else -1)

    @pytest.mark.parametrize("name", IOUS)
    def test_keywords(self, device, name):
        a, b = boxes_of(3, device=device), boxes_of(4, device=device)
        assert torch.equal(getattr(ops, name)(boxes1=a, boxes2=b), getattr(ops, name)(a, b))

    def test_one_graph(self, device):
        def function(a, b):
            return ops.box_iou(a, b, "xywh") + ops.complete_box_iou(a, b, 1e-3) + ops.generalized_box_iou(a, b[0])

        a, b = boxes_of(2, 5, device=device), boxes_of(2, 4, device=device)
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(a, b), function(a, b))

    @pytest.mark.parametrize("name", VARIANTS)
    def test_values_are_bounded_for_boxes_that_are_not_inverted(self, device, name):
        """The docstrings promise -1..1 for GIoU and DIoU, and nothing for inverted boxes."""
        a, b = random_boxes(200, min_side=0.0).to(device), random_boxes(200, min_side=0.0, max_side=1.0).to(device)
        values = getattr(ops, name)(a, torch.cat((a, b)))
        assert values.max() <= 1 and (name == "complete_box_iou" or values.min() >= -1)

    def test_inverted_boxes_have_finite_values(self, device):
        inverted = torch.tensor([[100.0, 100, 0, 0], [9, 5, 5, 9], [5, 9, 9, 5]], device=device)
        box = torch.tensor([[40.0, 40, 60, 60]], device=device)
        assert_same(ops.generalized_box_iou(inverted, box), tv.generalized_box_iou(inverted, box))
        assert ops.generalized_box_iou(inverted, box)[0].item() == 25 and (ops.box_iou(inverted, box) == 0).all()
        for name in VARIANTS:
            assert getattr(ops, name)(inverted, inverted).isfinite().all()
        assert not tv.generalized_box_iou(inverted, inverted).isfinite().all()


class TestIouLosses:
    @pytest.mark.parametrize("name", LOSSES)
    @pytest.mark.parametrize("dtype", (*FLOAT, torch.float16, *SIGNED))
    @pytest.mark.parametrize("reduction", ("none", "sum", "mean"))
    def test_dtypes_and_reductions(self, device, name, dtype, reduction):
        a, b = boxes_of(17, dtype=dtype, device=device), boxes_of(17, dtype=dtype, device=device)
        # torchvision does not take float64 beside float32.
        for first, second in ((a, b), (a, b.float()), (a.float(), b))[: 1 if dtype == torch.float64 else 3]:
            expected = getattr(tv, name)(first, second, reduction)
            assert_same(getattr(ops, name)(first, second, reduction), expected)
            assert_same(getattr(ops, name)(first, second, reduction=reduction, eps=1e-7), expected)
            assert_same(getattr(reference, name)(first, second, reduction), expected)

    @pytest.mark.parametrize("name", LOSSES)
    @pytest.mark.parametrize(
        "shapes", (((4,), (4,)), ((3, 2, 4), (3, 2, 4)), ((5, 4), (4,)), ((0, 4), (0, 4))), ids=str
    )
    @pytest.mark.parametrize("reduction", ("none", "mean"))
    def test_shapes(self, device, name, shapes, reduction):
        a, b = (boxes_of(*shape[:-1], device=device, whole=False).requires_grad_() for shape in shapes)
        losses = [getattr(library, name)(a, b, reduction) for library in (ops, tv)]
        assert_same(*losses)
        grads = [torch.autograd.grad(loss.sum(), (a, b)) for loss in losses]
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("name", LOSSES)
    @pytest.mark.parametrize("eps", (0, 1e-7, 1e-3, 30.0))
    def test_epsilon_of_losses(self, device, name, eps):
        if name == "complete_box_iou_loss" and eps > 1e-7:
            pytest.skip("torchvision adds 1e-7 to some of the denominators")
        a, b = boxes_of(17, device=device), boxes_of(17, device=device)
        expected = getattr(tv, name)(a, b, eps=eps)
        assert_same(getattr(ops, name)(a, b, eps=eps), expected)
        assert_same(getattr(ops, name)(a, b, "sum", eps), expected.sum())

    @pytest.mark.parametrize("name", LOSSES)
    def test_keywords(self, device, name):
        a, b = boxes_of(3, device=device), boxes_of(3, device=device)
        call = getattr(ops, name)
        assert torch.equal(call(boxes1=a, boxes2=b, reduction="sum", eps=0), call(a, b).sum())

    @pytest.mark.parametrize("name", LOSSES)
    def test_unknown_reduction(self, name):
        for library in (ops, tv):
            with pytest.raises(ValueError, match="xyz"):
                getattr(library, name)(torch.zeros(1, 4), torch.zeros(1, 4), "xyz")


class TestNms:
    @pytest.mark.parametrize("dtype", FLOAT)
    @pytest.mark.parametrize("id_dtype", (*FLOAT, *INTEGER, torch.float16, torch.bfloat16, torch.bool))
    def test_class_ids(self, device, dtype, id_dtype):
        boxes, scores, classes = candidates(200, device, dtype)
        classes = classes.to(id_dtype)
        expected = tv.batched_nms(boxes, scores, classes, 0.4)
        assert torch.equal(ops.batched_nms(boxes, scores, classes, 0.4), expected)
        assert torch.equal(reference.batched_nms(boxes, scores, classes, 0.4), expected)

    def test_a_column_of_predictions(self, device):
        boxes, scores, classes = candidates(50, device)
        rows = torch.cat((boxes, scores[:, None], classes[:, None]), dim=1)
        expected = tv.batched_nms(rows[:, :4], rows[:, 4], rows[:, 5], 0.4)
        assert torch.equal(ops.batched_nms(rows[:, :4], rows[:, 4], rows[:, 5], 0.4), expected)

    @pytest.mark.parametrize("shape", ((0,), (0, 4)))
    @pytest.mark.parametrize("id_dtype", (torch.float32, torch.int64, torch.bool))
    def test_empty(self, device, shape, id_dtype):
        boxes, none = torch.zeros(shape, device=device), torch.zeros(0, device=device)
        expected = tv.batched_nms(boxes, none, none.to(id_dtype), 0.5)
        for library in (ops, reference):
            kept = library.batched_nms(boxes, none, none.to(id_dtype), 0.5)
            assert kept.dtype == expected.dtype and kept.shape == expected.shape
        if len(shape) == 1:
            whatever = torch.zeros(shape, dtype=torch.int64, device=device), None, None, None
            assert torch.equal(ops.batched_nms(*whatever), tv.batched_nms(*whatever))
        if len(shape) == 2:
            assert ops.nms(boxes, none, 0.5).shape == tv.nms(boxes, none, 0.5).shape

    @pytest.mark.parametrize("threshold", (0, 1, 0.5, np.float32(0.5), np.float64(0.5)), ids=repr)
    def test_keywords_and_thresholds(self, device, threshold):
        boxes, scores, classes = candidates(60, device)
        options = {"boxes": boxes, "scores": scores, "iou_threshold": threshold}
        assert torch.equal(ops.nms(**options), tv.nms(**options))
        assert torch.equal(ops.batched_nms(idxs=classes, **options), tv.batched_nms(idxs=classes, **options))


class TestClipping:
    SIZES = (
        (20, 30),
        [20, 30],
        torch.Size((20, 30)),
        (20.0, 30.0),
        torch.tensor([20, 30]),
        (torch.tensor(20), torch.tensor(30)),
        np.array([20, 30]),
    )

    @pytest.mark.parametrize("dtype", (*FLOAT, *INTEGER, torch.float16, torch.bfloat16))
    @pytest.mark.parametrize("shape", ((4,), (5, 4), (2, 5, 4), (2, 3, 5, 4), (0,), (0, 4), (2, 0, 4)), ids=str)
    def test_shapes_and_dtypes(self, device, dtype, shape):
        boxes = (torch.rand(shape) * 60 - (0 if dtype == torch.uint8 else 10)).to(device, dtype)
        expected = tv.clip_boxes_to_image(boxes, (20, 30))
        for library in (ops, reference):
            for clip in (library.clip_boxes_to_image, library.clip_boxes):
                clipped = clip(boxes, (20, 30))
                assert clipped.dtype == dtype and torch.equal(clipped, expected)

    @pytest.mark.parametrize("size", SIZES, ids=repr)
    @pytest.mark.parametrize("shape", ((4,), (5, 4), (2, 5, 4)), ids=str)
    def test_sizes(self, device, size, shape):
        boxes = (torch.rand(shape) * 60 - 10).to(device)
        expected = tv.clip_boxes_to_image(boxes, (20, 30))
        for clip in (ops.clip_boxes_to_image, ops.clip_boxes, reference.clip_boxes_to_image, reference.clip_boxes):
            assert torch.equal(clip(boxes, size), expected)
        assert torch.equal(ops.clip_boxes_to_image(boxes=boxes, size=size), expected)

    def test_large_integers(self, device):
        boxes = torch.tensor([[200, 255, 0, 7]], dtype=torch.uint8, device=device)
        assert torch.equal(ops.clip_boxes_to_image(boxes, (300, 2**20)), boxes)
        large = torch.tensor([[-(2**60), 2**60 + 1, 5, 2**61]], device=device)
        expected = tv.clip_boxes_to_image(large, (800, 1333))
        assert torch.equal(ops.clip_boxes_to_image(large, (800, 1333)), expected)
        odd = torch.tensor([[2**24 + 1, 2**24 + 3, 2**40 + 1, 2**40 + 1]], device=device)
        for size in ((2**50, 2**50), (2**24 + 1, 2**40 - 1)):
            assert torch.equal(ops.clip_boxes_to_image(odd, size), tv.clip_boxes_to_image(odd, size))

    @pytest.mark.parametrize("shape", ((4,), (5, 4), (2, 3, 5, 4), (0,)), ids=str)
    def test_gradient(self, device, shape):
        boxes = (torch.rand(shape) * 60 - 10).to(device).requires_grad_()
        results = [library.clip_boxes_to_image(boxes, (20, 30)) for library in (ops, tv)]
        grads = [torch.autograd.grad(result.square().sum(), boxes)[0] for result in results]
        assert torch.equal(*grads)

    def test_one_graph(self, device):
        boxes = boxes_of(2, 3, 5, device=device)
        compiled = torch.compile(ops.clip_boxes_to_image, fullgraph=True, backend="aot_eager")
        for size in ((20, 30), torch.tensor([20, 30])):
            assert torch.equal(compiled(boxes, size), tv.clip_boxes_to_image(boxes, (20, 30)))


class TestCoding:
    @pytest.mark.parametrize("weights", ((1.0, 1.0, 1.0, 1.0), (10.0, 10.0, 5.0, 5.0)))
    @pytest.mark.parametrize("dtype", SIGNED)
    def test_integers(self, device, dtype, weights):
        from torchvision.models.detection._utils import BoxCoder

        coder = BoxCoder(weights)
        a, b = boxes_of(9, dtype=dtype, device=device), boxes_of(9, dtype=dtype, device=device)
        for boxes, anchors in ((a, b), (a, b.float()), (a.float(), b)):
            expected = coder.encode_single(boxes, anchors)
            for library in (ops, reference):
                actual = library.encode_boxes(boxes, anchors, coder_weights=weights)
                torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-4)
        deltas = torch.randn(9, 4, device=device)
        for library in (ops, reference):
            actual = library.decode_boxes(deltas, b, coder_weights=weights)
            torch.testing.assert_close(actual, coder.decode_single(deltas, b), rtol=1e-5, atol=1e-4)
