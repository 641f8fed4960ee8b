"""The arguments of matching: `MatchRule`, padded boxes, and the errors of the ops."""

import pytest
import torch

import retinanet_ops as ops
from retinanet_ops import MatchRule, PaddedBoxes


class TestMatchRule:
    @pytest.mark.parametrize(
        ("fields", "error", "message"),
        [
            ({"fg_iou": 1.5}, ValueError, r"fg_iou must be in 0\.\.1, got 1.5"),
            ({"bg_iou": -0.1}, ValueError, r"bg_iou must be in 0\.\.1, got -0.1"),
            ({"crowd_ioa": float("nan")}, ValueError, "crowd_ioa must be a number, got nan"),
            ({"low_quality_min_iou": float("nan")}, ValueError, "low_quality_min_iou must be a number, got nan"),
            ({"low_quality_min_iou": -1.5}, ValueError, r"low_quality_min_iou must be in -1\.\.1, got -1.5"),
            ({"fg_iou": "0.5"}, TypeError, "fg_iou must be a number, got '0.5'"),
            ({"low_quality": "all"}, ValueError, "low_quality must be one of torchvision, mmdet, ssd, off, got 'all'"),
            ({"fg_iou": 0.3}, ValueError, "bg_iou must be at most fg_iou 0.3, got 0.4"),
        ],
    )
    def test_message_names_the_field(self, fields, error, message):
        with pytest.raises(error, match=f"MatchRule: {message}"):
            MatchRule(**fields)

    def test_is_a_constant(self):
        assert MatchRule() == MatchRule(0.5, 0.4, "torchvision", 0.0, 0.5) and hash(MatchRule()) == hash(MatchRule())
        with pytest.raises(AttributeError):
            MatchRule().fg_iou = 0.6


class TestErrors:
    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            (
                {"gt_boxes": torch.zeros(2, 3, 4, device="meta"), "gt_count": torch.zeros(2, device="meta").long()},
                ValueError,
                "anchors must be on gt_boxes's device meta, got cpu",
            ),
            (
                {"gt_count": torch.zeros(2, dtype=torch.int64, device="meta")},
                ValueError,
                "gt_count must be on gt_boxes's device cpu, got meta",
            ),
            ({"gt_boxes": torch.zeros(2, 3)}, ValueError, r"gt_boxes must have shape \[N, M, 4\], got \[2, 3\]"),
            ({"gt_boxes": torch.zeros(2, 3, 4).int()}, TypeError, "gt_boxes must be float16, .* got torch.int32"),
            ({"gt_count": torch.zeros(3).long()}, ValueError, r"gt_count must have shape \[2\], got \[3\]"),
            ({"gt_count": torch.zeros(2)}, TypeError, "gt_count must be an integer tensor, got torch.float32"),
            (
                {"anchors": torch.zeros(5, 3)},
                ValueError,
                r"anchors must have shape \[A, 4\] or \[N, A, 4\], got \[5, 3\]",
            ),
            (
                {"anchors": torch.zeros(3, 5, 4)},
                ValueError,
                r"anchors must have shape \[A, 4\] or \[2, A, 4\], got \[3, 5, 4\]",
            ),
            ({"anchors": None}, TypeError, "anchors must be a tensor, got NoneType"),
            ({"rule": {"fg_iou": 0.5}}, TypeError, "rule must be a MatchRule, got dict"),
            (
                {"crowds": torch.zeros(2, 1, 4)},
                TypeError,
                r"crowds must be PaddedBoxes or a tuple \(boxes, count\), got Tensor",
            ),
            (
                {"crowds": (torch.zeros(2, 1), torch.zeros(2).long())},
                ValueError,
                r"crowds.boxes must have shape \[2, C, 4\], got \[2, 1\]",
            ),
            (
                {"crowds": PaddedBoxes(torch.zeros(2, 1, 4), torch.zeros(2))},
                TypeError,
                "crowds.count must be an integer tensor, got torch.float32",
            ),
        ],
    )
    def test_message_names_the_argument(self, change, error, message):
        arguments = {
            "anchors": torch.zeros(5, 4),
            "gt_boxes": torch.zeros(2, 3, 4),
            "gt_count": torch.zeros(2).long(),
        } | change
        with pytest.raises(error, match=f"match_anchors: {message}"):
            ops.match_anchors(**arguments)

    def test_labels(self):
        with pytest.raises(ValueError, match=r"assign_targets: gt_labels must have shape \[2, 3\], got \[2, 2\]"):
            ops.assign_targets(torch.zeros(5, 4), torch.zeros(2, 3, 4), torch.zeros(2, 2).long(), torch.zeros(2).long())


class TestPadding:
    def test_ground_truth(self):
        truth = ops.pad_ground_truth(
            [torch.ones(2, 4), torch.zeros(0, 4)], [torch.tensor([3, 4]), torch.tensor([]).long()]
        )
        assert truth.boxes.shape == (2, 2, 4) and truth.boxes.dtype == torch.float32
        assert truth.labels.tolist() == [[3, 4], [-1, -1]] and truth.count.tolist() == [2, 0]

    def test_boxes(self):
        padded = ops.pad_boxes([torch.zeros(0, 4), torch.ones(1, 4).double()])
        assert padded.boxes.tolist() == [[[0.0] * 4], [[1.0] * 4]] and padded.boxes.dtype == torch.float64
        assert padded.count.tolist() == [0, 1] and padded.count.dtype == torch.int64

    def test_messages_name_the_entry(self):
        with pytest.raises(ValueError, match=r"pad_boxes: boxes\[1\] must have shape \[M, 4\], got \[4\]"):
            ops.pad_boxes([torch.ones(2, 4), torch.zeros(4)])
        with pytest.raises(ValueError, match="pad_boxes: boxes must hold one tensor per image, got an empty list"):
            ops.pad_boxes([])
        with pytest.raises(ValueError, match=r"pad_ground_truth: labels\[0\] must have shape \[2\], got \[3\]"):
            ops.pad_ground_truth([torch.ones(2, 4)], [torch.tensor([1, 2, 3])])
        with pytest.raises(ValueError, match="labels must hold one tensor for each of the 1 images, got 0"):
            ops.pad_ground_truth([torch.ones(2, 4)], [])
