"""Arguments that `detect` and the ops of its steps refuse."""

import math

import pytest
import torch
from cases import random_boxes

import retinanet_ops as ops


class TestErrors:
    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"cls_logits": []}, ValueError, "cls_logits must hold 1 to 16 levels, got 0"),
            (
                {"box_deltas": [torch.zeros(1, 4, 2, 2)] * 2},
                ValueError,
                "box_deltas must hold 1 levels like cls_logits, got 2",
            ),
            (
                {"cls_logits": [torch.zeros(1, 6, 2)]},
                ValueError,
                r"cls_logits\[0\] must have shape \[1, A\*K, H, W\], got \[1, 6, 2\]",
            ),
            (
                {"box_deltas": [torch.zeros(1, 8, 2, 3)]},
                ValueError,
                r"box_deltas\[0\] must have shape \[1, A\*4, 2, 2\]",
            ),
            (
                {"box_deltas": [torch.zeros(1, 16, 2, 2)]},
                ValueError,
                r"box_deltas\[0\] and cls_logits\[0\] must have A \* 4 and A \* K channels, got 16 and 6",
            ),
            ({"anchors": torch.zeros(9, 4)}, ValueError, "expected one row for each of the 9 anchors, got 8"),
            (
                {"image_sizes": torch.zeros(2, 2)},
                ValueError,
                r"image_sizes must have shape \[1, 2\], got \[2, 2\]",
            ),
            ({"image_sizes": None}, TypeError, r"image_sizes must be a tensor or \(height, width\) pairs, got None"),
            ({"image_sizes": torch.zeros(1, 2).bool()}, TypeError, "image_sizes must be an integer or floating tensor"),
            ({"cls_logits": None}, TypeError, "cls_logits must be a list of tensors, got NoneType"),
            ({"cls_logits": torch.zeros(1, 6, 2, 2)}, TypeError, "cls_logits must be a list of tensors, got Tensor"),
            ({"anchors": None}, TypeError, "anchors must be a tensor or an AnchorGrid, got NoneType"),
            ({"topk_per_level": 0}, ValueError, "topk_per_level must be at least 1, got 0"),
            ({"topk_per_level": 10.0}, TypeError, "topk_per_level must be an integer, got 10.0"),
            ({"topk_per_level": 2**63}, ValueError, r"topk_per_level must be less than 2\^63, got 9223372036854775808"),
            ({"max_detections": -1}, ValueError, "max_detections must not be negative, got -1"),
            ({"max_detections": "3"}, TypeError, "max_detections must be an integer, got '3'"),
            ({"max_per_class": 1.5}, TypeError, "max_per_class must be an integer, got 1.5"),
            ({"score_threshold": None}, TypeError, "score_threshold must be a number, got None"),
            ({"iou_threshold": "0.5"}, TypeError, "iou_threshold must be a number, got '0.5'"),
            ({"iou_threshold": math.nan}, ValueError, "iou_threshold must be a number, got nan"),
            (
                {"coder_weights": (1, 1, 0, 1)},
                ValueError,
                r"coder_weights must be positive and finite, got \[1.0, 1.0, 0.0, 1.0\]",
            ),
            ({"coder_weights": (1, 1, None, 1)}, TypeError, r"coder_weights\[2\] must be a number, got None"),
            ({"max_log_ratio": math.nan}, ValueError, "max_log_ratio must be a number, got nan"),
            (
                {"min_log_ratio": 5},
                ValueError,
                r"min_log_ratio must not be greater than max_log_ratio 4\.1\d*, got 5.0",
            ),
            ({"offset": math.nan}, ValueError, "offset must be a number, got nan"),
            ({"max_per_class": 0}, ValueError, "max_per_class must be at least 1, got 0"),
            (
                {"cls_logits": [torch.zeros(1, 6, 2, 2).long()]},
                TypeError,
                r"cls_logits\[0\] must be float16.* got torch.int64",
            ),
        ],
    )
    def test_message_names_the_argument(self, change, error, message):
        arguments = {
            "cls_logits": [torch.zeros(1, 6, 2, 2)],
            "box_deltas": [torch.zeros(1, 8, 2, 2)],
            "anchors": torch.zeros(8, 4),
            "image_sizes": torch.zeros(1, 2),
        }
        with pytest.raises(error, match=f"detect: .*{message}"):
            ops.detect(**(arguments | change))


def test_integer_anchors(device):
    logits, deltas = [torch.randn(2, 6, 2, 2, device=device)], [torch.randn(2, 8, 2, 2, device=device)]
    anchors, gt_boxes = random_boxes(8).round().to(device), random_boxes(2, 3).to(device)
    count, sizes = torch.tensor([3, 1], device=device), torch.tensor([[60, 80]] * 2, device=device)

    def results(anchors):
        matches = ops.match_anchors(anchors, gt_boxes, count)
        yield from (matches, ops.dense_box_loss(deltas, anchors, gt_boxes, matches))
        yield from ops.detect(logits, deltas, anchors, sizes)
        yield from ops.candidates(logits, deltas, anchors)

    for dtype in (torch.int64, torch.int16):
        for actual, expected in zip(results(anchors.to(dtype)), results(anchors), strict=True):
            assert torch.equal(actual, expected)


class TestDirectCalls:
    """Direct calls of the ops that `detect` uses, which access no memory outside their tensors for any argument."""

    def decode(self, device, *, key=0, channels=4, num_classes=1):
        keys = torch.tensor([[key]], device=device)
        deltas = [torch.zeros(1, channels, 1, 1, device=device)]
        anchors, sizes = torch.tensor([[0.0, 0, 8, 8]], device=device), torch.tensor([[9.0, 9.0]], device=device)
        return torch.ops.retinanet_ops.decode_candidates(
            keys, deltas, anchors, [], [], sizes, num_classes, [1.0] * 4, -4.0, 4.0, 0.0
        )

    def test_a_key_beyond_the_anchors_is_an_empty_slot(self, device):
        assert self.decode(device, key=~0 & 0xFFFFFFFF)[3].item() == 0  # the key of index 0, the only anchor
        for index in (1, 1000):
            boxes, scores, labels, anchor_index = self.decode(device, key=~index & 0xFFFFFFFF)
            assert anchor_index.item() == -1 and labels.item() == -1
            assert scores.item() == -math.inf and (boxes == 0).all()

    def test_arguments_are_checked(self, device):
        with pytest.raises(RuntimeError, match=r"box_deltas \[1, 2, 1, 1\] must have 4 channels per anchor"):
            self.decode(device, channels=2)
        with pytest.raises(RuntimeError, match="num_classes must be positive, got 0"):
            self.decode(device, num_classes=0)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"box_deltas": [torch.zeros(1, 8, 2, 2)] * 2}, "as many levels of box_deltas as of cls_logits, 1, got 2"),
            ({"box_deltas": [torch.zeros(1, 8, 2, 3)]}, "box_deltas.0. .1, 8, 2, 3. do not fit cls_logits"),
            ({"box_deltas": [torch.zeros(2, 8, 2, 2)]}, "do not fit"),
            ({"box_deltas": [torch.zeros(1, 2, 2, 2)]}, "do not fit"),
            ({"cls_logits": [torch.zeros(1, 6, 4)]}, "do not fit"),
            ({"cls_logits": []}, "as many levels"),
            ({"anchors": torch.zeros(9, 4)}, "expected 36 deltas per image, got 32"),
            ({"anchors": torch.zeros(2, 8, 4)}, "do not fit 1 images"),
            ({"anchors": torch.zeros(8, 4, dtype=torch.int32)}, "expected float16"),
            ({"image_sizes": torch.zeros(2, 2)}, r"image_sizes must have shape \[1, 2\]"),
            ({"image_sizes": torch.zeros(1, 2, dtype=torch.bool)}, "must be integers or floating-point numbers"),
            ({"topk": 0}, "topk must be positive"),
            ({"max_detections": -1}, "max_detections must not be negative"),
            ({"coder_weights": [1.0] * 3}, "coder_weights must hold 4 numbers"),
        ],
        ids=str,
    )
    @pytest.mark.backends("cpu")
    def test_arguments_of_detect_are_checked(self, change, message):
        arguments = {
            "cls_logits": [torch.zeros(1, 6, 2, 2)],
            "box_deltas": [torch.zeros(1, 8, 2, 2)],
            "anchors": torch.zeros(8, 4),
            "grid_sizes": [],
            "grid_steps": [],
            "image_sizes": torch.zeros(1, 2),
            "score_threshold": 0.05,
            "topk": 10,
            "iou_threshold": 0.5,
            "max_detections": 5,
            "max_per_class": 0,
            "class_agnostic": False,
            "coder_weights": [1.0] * 4,
            "min_log_ratio": None,
            "max_log_ratio": 4.0,
            "offset": 0.0,
            "clip_after_nms": False,
        }
        with pytest.raises(RuntimeError, match=f"detect: .*{message}"):
            torch.ops.retinanet_ops.detect(*(arguments | change).values())
