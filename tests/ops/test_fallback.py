"""The fallback to the reference on devices without kernels, with one warning per op and device."""

import pytest
import torch

import retinanet_ops as ops
from retinanet_ops import _fallback, reference

pytestmark = pytest.mark.backends("cpu")


@pytest.fixture
def no_kernels(monkeypatch):
    monkeypatch.setattr(_fallback, "kernels_available", lambda device_type: False)
    _fallback._warn_once.cache_clear()
    yield
    _fallback._warn_once.cache_clear()


def test_falls_back_and_warns_once(no_kernels):
    x, targets = torch.randn(5, 3), torch.tensor([0, -1, -2, 2, 1])
    with pytest.warns(ops.FallbackWarning, match="sigmoid_focal_loss has no kernel for cpu tensors"):
        loss = ops.sigmoid_focal_loss(x, targets)
    assert torch.equal(loss, reference.sigmoid_focal_loss(x, targets))
    ops.sigmoid_focal_loss(x, targets)  # a second warning would be an error here


def test_finds_the_device_of_every_kind_of_first_argument(no_kernels):
    grid = ops.AnchorGrid.detectron2([(2, 2)], strides=[8], sizes=[(16.0,)])
    with pytest.warns(ops.FallbackWarning, match="match_anchors has no kernel for cpu"):
        ops.match_anchors(grid, torch.zeros(1, 1, 4), torch.tensor([1]))
    with pytest.warns(ops.FallbackWarning, match="detect has no kernel for cpu"):
        ops.detect([torch.zeros(1, 3, 2, 2)], [torch.zeros(1, 12, 2, 2)], grid, torch.tensor([[16, 16]]))
    with pytest.warns(ops.FallbackWarning, match="nms has no kernel for cpu"):
        ops.nms(boxes=torch.zeros(1, 4), scores=torch.zeros(1), iou_threshold=0.5)


def test_finds_the_device_among_keywords_in_any_order(no_kernels):
    boxes, scores = torch.zeros(1, 4, device="meta"), torch.zeros(1, device="meta")
    with pytest.warns(ops.FallbackWarning, match="nms has no kernel for meta"), pytest.raises(RuntimeError):
        ops.nms(iou_threshold=0.5, boxes=boxes, scores=scores)  # a loop cannot run on meta tensors


def test_a_meta_tensor_needs_no_fallback():
    loss = ops.sigmoid_focal_loss(torch.empty(4, 2, device="meta"), torch.empty(4, dtype=torch.int64, device="meta"))
    assert loss.shape == (4, 2) and loss.device.type == "meta"
