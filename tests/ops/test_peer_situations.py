"""Situations that the test suites of other projects check, with the values that follow from the definitions.

The suites are those of detectron2, fvcore, mmdetection, supervision and MONAI.
"""

import math

import pytest
import torch
import torch.nn.functional as F

import retinanet_ops as ops
from retinanet_ops import AnchorGrid, MatchRule

pytestmark = pytest.mark.once

UNIT = (0.0, 0.0, 1.0, 1.0)


def tensor(rows, device):
    """Return the rows as float32 [M, 4]."""
    return torch.tensor(rows, dtype=torch.float32, device=device).reshape(-1, 4)


class TestOverlaps:
    def test_parts_of_a_unit_box(self, device):
        """detectron2: a unit box against itself, its halves, two quarters and a box that shares a quarter."""
        parts = [UNIT, (0, 0, 1, 0.5), (0, 0, 0.5, 1), (0, 0, 0.5, 0.5), (0.5, 0.5, 1, 1), (0.5, 0.5, 1.5, 1.5)]
        iou = ops.box_iou(tensor([UNIT], device), tensor(parts, device))
        torch.testing.assert_close(iou.cpu(), torch.tensor([[1, 0.5, 0.5, 0.25, 0.25, 0.25 / 1.75]]))

    def test_boxes_that_touch_or_lie_apart(self, device):
        """mmdetection: a pair that overlaps by half, a pair that touches, and a pair far apart."""
        a = tensor([(0, 0, 10, 10), (10, 10, 20, 20), (32, 32, 38, 42)], device)
        b = tensor([(0, 0, 10, 20), (0, 10, 10, 19), (10, 10, 20, 20)], device)
        assert ops.box_iou(a, b).tolist() == [[0.5, 0, 0], [0, 0, 1], [0, 0, 0]]
        giou = ops.generalized_box_iou(a, b).diagonal().cpu()
        torch.testing.assert_close(giou, torch.tensor([0.5, -10 / 200, -(896 - 160) / 896]))

    @pytest.mark.parametrize("name", ("box_iou", "generalized_box_iou", "distance_box_iou", "complete_box_iou"))
    def test_no_boxes(self, device, name):
        """mmdetection, supervision and MONAI: either side is empty, or both are."""
        empty, some = tensor([], device), tensor([UNIT] * 3, device)
        for a, b in ((empty, some), (some, empty), (empty, empty)):
            assert getattr(ops, name)(a, b).shape == (len(a), len(b))

    def test_giou_loss_of_displaced_boxes(self, device):
        """fvcore: no displacement, half a side, a whole side, and two sides."""
        moved = tensor([(x, 0, x + 1, 1) for x in (0, 0.5, 1, 2)], device)
        loss = 1 - ops.generalized_box_iou(tensor([UNIT], device), moved)
        torch.testing.assert_close(loss.cpu(), torch.tensor([[0, 2 / 3, 1, 1 + 1 / 3]]))

    def test_half_precision(self, device):
        """mmdetection and MONAI: boxes in float16 give the measures of the same boxes in float32."""
        a = tensor([(0, 0, 300, 300), (10, 20, 1000, 1200)], device)  # areas beyond the range of float16
        for name in ("box_iou", "generalized_box_iou"):
            op = getattr(ops, name)
            assert torch.equal(op(a.half(), a.half()), op(a, a))


class TestCoding:
    ROIS = (UNIT, UNIT, UNIT, (5, 5, 5, 5))
    DELTAS = ((0, 0, 0, 0), (1, 1, 1, 1), (0, 0, 2, -1), (0.7, -1.9, -0.5, 0.3))

    def test_decoding(self, device):
        """mmdetection: no change, a move and growth, a change of shape that is clipped, and a box without area."""
        boxes = ops.decode_boxes(tensor(self.DELTAS, device), tensor(self.ROIS, device), image_sizes=(32, 32))
        half, flat, wide = math.e / 2, math.exp(-1) / 2, math.exp(2) / 2
        expected = [
            UNIT,
            (1.5 - half, 1.5 - half, 1.5 + half, 1.5 + half),
            (0, 0.5 - flat, 0.5 + wide, 0.5 + flat),
            (5, 5, 5, 5),
        ]
        torch.testing.assert_close(boxes, tensor(expected, device))

    def test_empty(self, device):
        """mmdetection and MONAI: no boxes to encode, decode or clip."""
        empty = tensor([], device)
        for result in (
            ops.encode_boxes(empty, empty),
            ops.decode_boxes(empty, empty, image_sizes=(32, 32)),
            ops.clip_boxes_to_image(empty, (32, 32)),
        ):
            assert result.shape == (0, 4)

    @pytest.mark.parametrize("weights", ((5.0, 5.0, 10.0, 10.0), (1.0, 1.0, 1.0, 1.0)))
    def test_reconstruction(self, device, weights):
        """detectron2: decoding the encoded boxes gives the boxes, at the scale of an image."""
        sides = torch.rand(10, 4, device=device) * 99 + 1
        source, target = (torch.cat((s[:, :2] * 10, s[:, :2] * 10 + s[:, 2:]), 1) for s in (sides, sides.roll(1, 0)))
        deltas = ops.encode_boxes(target, source, coder_weights=weights)
        boxes = ops.decode_boxes(deltas, source, coder_weights=weights, max_log_ratio=None)
        torch.testing.assert_close(boxes, target, rtol=1e-5, atol=2e-3)


class TestMatching:
    BOXES = ((0, 0, 10, 10), (10, 10, 20, 20), (5, 5, 15, 15), (32, 32, 38, 42))

    def matches(self, device, anchors, gt, **rule):
        rule = MatchRule(**{"fg_iou": 0.5, "bg_iou": 0.5, "low_quality": "mmdet", **rule})
        gt = tensor(gt, device)[None]
        return ops.match_anchors(tensor(anchors, device), gt, torch.tensor([gt.shape[1]], device=device), rule=rule)[0]

    def test_two_objects(self, device):
        """mmdetection: the second object overlaps its best box by 0.15 only, and promotes it."""
        objects = [(0, 0, 10, 9), (0, 10, 10, 19)]
        assert self.matches(device, self.BOXES, objects).tolist() == [0, -1, 1, -1]
        assert self.matches(device, self.BOXES, objects, low_quality="off").tolist() == [0, -1, -1, -1]
        assert self.matches(device, self.BOXES, objects, low_quality_min_iou=0.2).tolist() == [0, -1, -1, -1]

    def test_no_objects_or_no_boxes(self, device):
        """mmdetection and detectron2: an image without objects is background, and no boxes give no matches."""
        assert self.matches(device, self.BOXES, []).tolist() == [-1] * 4
        assert self.matches(device, [], [(0, 0, 10, 9)]).shape == (0,)
        assert self.matches(device, [], []).shape == (0,)

    def test_anchors_between_the_thresholds(self, device):
        """detectron2: IoUs of 0.45 with thresholds 0.4 and 0.5 are ignored unless the object promotes them."""
        anchors = [(0, 0, 10, 4.5), (0, 0, 10, 10)]
        assert self.matches(device, anchors, [(0, 0, 10, 10)], bg_iou=0.4).tolist() == [-2, 0]
        assert self.matches(device, anchors[:1], [(0, 0, 10, 10)], bg_iou=0.4).tolist() == [0]


class TestNms:
    def test_boxes_with_and_without_classes(self, device):
        """supervision: an IoU of 25/36, with thresholds below and above it, in one class and in two."""
        boxes, scores = tensor([(10, 10, 40, 40), (15, 15, 40, 40)], device), torch.tensor([0.8, 0.9], device=device)
        assert ops.nms(boxes, scores, 0.5).tolist() == [1]
        assert ops.nms(boxes, scores, 0.7).tolist() == [1, 0]
        for classes, expected in (([0, 0], [1]), ([0, 1], [1, 0])):
            for dtype in (torch.int64, torch.float32):
                idxs = torch.tensor(classes, dtype=dtype, device=device)
                assert ops.batched_nms(boxes, scores, idxs, 0.5).tolist() == expected

    def test_a_chain_of_three(self, device):
        """supervision: the best box suppresses its neighbour, which then leaves the third one alone."""
        boxes = tensor([(0, 0, 30, 40), (5, 5, 35, 45), (10, 10, 40, 50)], device)
        for scores, expected in (((0.8, 0.9, 0.85), [1]), ((0.9, 0.8, 0.85), [0, 2]), ((0.7, 0.8, 0.9), [2, 0])):
            assert ops.nms(boxes, torch.tensor(scores, device=device), 0.5).tolist() == expected

    def test_arguments_stay_as_they_are(self, device):
        """detectron2: NMS changes none of its arguments, and results follow the scores."""
        corner = torch.rand(2000, 2, device=device) * 300
        boxes = torch.cat((corner, corner + torch.rand(2000, 2, device=device) * 50), 1)
        scores, idxs = torch.rand(2000, device=device), torch.randint(0, 20, (2000,), device=device)
        copies = [t.clone() for t in (boxes, scores, idxs)]
        keep = ops.batched_nms(boxes, scores, idxs, 0.5)
        assert all(map(torch.equal, copies, (boxes, scores, idxs)))
        assert (scores[keep].diff() <= 0).all()
        for c in range(20):
            rows = (idxs == c).nonzero()[:, 0]
            assert torch.equal(keep[idxs[keep] == c], rows[ops.nms(boxes[rows], scores[rows], 0.5)])

    def test_best_of_each_image(self, device):
        """MONAI: at most `max_proposals` boxes; here `batched_nms_padded` has as many slots."""
        boxes = tensor([(0, 0, 10, 10), (0, 0, 10, 9), (50, 50, 60, 60), (80, 80, 90, 90)], device)[None]
        scores = torch.tensor([[0.7, 0.9, 0.8, 0.6]], device=device)
        index, count = ops.batched_nms_padded(boxes, scores, iou_threshold=0.5, max_detections=2)
        assert index.tolist() == [[1, 2]] and count.tolist() == [2]


class TestFocalLoss:
    PROBABILITIES = (0.01, 0.1, 0.4, 0.6, 0.9, 0.99)

    def losses(self, device, target, **options):
        """Return the focal losses and the cross entropies of the probabilities."""
        logits = torch.tensor(self.PROBABILITIES, device=device).logit()[:, None]
        targets = torch.full_like(logits, target)
        entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
        return ops.sigmoid_focal_loss(logits, targets, **options), entropy

    @pytest.mark.parametrize("gamma", (0.5, 1, 2, 5))
    @pytest.mark.parametrize("target", (0, 1))
    def test_modulation(self, device, target, gamma):
        """fvcore: easy examples weigh less than in the cross entropy, and hard ones nearly as much."""
        loss, entropy = self.losses(device, target, alpha=-1, gamma=gamma)
        p = torch.tensor(self.PROBABILITIES, device=device)[:, None]
        torch.testing.assert_close(loss / entropy, (p if target == 0 else 1 - p) ** gamma, rtol=1e-5, atol=1e-7)

    def test_gamma_zero_is_the_cross_entropy(self, device):
        for target in (0, 1):
            loss, entropy = self.losses(device, target, alpha=-1, gamma=0, reduction="mean")
            torch.testing.assert_close(loss, entropy.mean())

    def test_alpha_of_one_class_only(self, device):
        """fvcore: alpha 0 leaves the positives out, and alpha 1 the negatives."""
        for alpha, ignored in ((0, 1), (1, 0)):
            assert (self.losses(device, ignored, alpha=alpha)[0] == 0).all()
            torch.testing.assert_close(
                self.losses(device, 1 - ignored, alpha=alpha)[0], self.losses(device, 1 - ignored, alpha=-1)[0]
            )


def test_anchors_of_one_level(device):
    """detectron2: two sizes and three ratios on two cells, without an offset and with half a cell."""
    base = [
        (-32, -8, 32, 8), (-16, -16, 16, 16), (-8, -32, 8, 32),
        (-64, -16, 64, 16), (-32, -32, 32, 32), (-16, -64, 16, 64),
    ]  # fmt: skip
    for offset in (0.0, 0.5):
        grid = AnchorGrid.detectron2(
            ((1, 2),), sizes=((32, 64),), aspect_ratios=(0.25, 1, 4), strides=(4,), offset=offset, device=device
        )
        expected = [
            [v + (4 * x if i % 2 == 0 else 0) + 4 * offset for i, v in enumerate(row)] for x in (0, 1) for row in base
        ]
        torch.testing.assert_close(grid.boxes(), tensor(expected, device))
