"""Matching against the rules of other projects, and the deliberate deviations from them (docs/deviations.md)."""

import pytest
import torch
from cases import random_boxes

import retinanet_ops as ops
from retinanet_ops import AnchorGrid, MatchRule


def case(seed, device, count=12):
    torch.manual_seed(seed)
    grid = AnchorGrid.torchvision(((13, 17), (7, 9)), (104, 136), sizes=((16, 20), (32, 40)), device=device)
    gt_boxes = random_boxes(1, count, size=100.0, max_side=60.0).to(device)
    # Copies of anchors give ties, and half an anchor gives an IoU on the threshold.
    copies = grid.boxes()[torch.randint(0, grid.num_anchors, (count // 3,))]
    gt_boxes[0, : len(copies)] = copies
    gt_boxes[0, 0, 3] = (copies[0, 1] + copies[0, 3]) / 2
    return grid, gt_boxes, torch.tensor([count], device=device)


def max_iou_assigner(iou, pos_iou_thr=0.5, neg_iou_thr=0.4, min_pos_iou=0.0):  # [M, A] -> [A]
    """Match by mmdet's rule, in the four steps of its documentation."""
    assigned = torch.full((iou.shape[1],), -2)
    best, argmax = iou.max(dim=0)
    assigned[best < neg_iou_thr] = -1
    assigned[best >= pos_iou_thr] = argmax[best >= pos_iou_thr]
    for gt, row in enumerate(iou):
        if row.max() >= min_pos_iou:
            assigned[row == row.max()] = gt
    return assigned


@pytest.mark.parametrize("min_iou", (0.0, 0.35))
@pytest.mark.parametrize("seed", range(20))
def test_mmdet_rule_equals_max_iou_assigner(device, seed, min_iou):
    grid, gt_boxes, count = case(seed, device)
    matches = ops.match_anchors(grid, gt_boxes, count, rule=MatchRule(low_quality="mmdet", low_quality_min_iou=min_iou))
    iou = ops.box_iou(gt_boxes[0], grid.boxes()).cpu()
    assert iou.max(dim=1).values.min() > 0
    assert torch.equal(matches[0].long().cpu(), max_iou_assigner(iou, min_pos_iou=min_iou))


@pytest.mark.parametrize("seed", range(20))
def test_torchvision_rule_equals_its_matcher(device, seed):
    pytest.importorskip("torchvision")
    from torchvision.models.detection._utils import Matcher
    from torchvision.ops import box_iou

    grid, gt_boxes, count = case(seed, device)
    matches = ops.match_anchors(grid, gt_boxes, count, rule=MatchRule(low_quality_min_iou=-1.0))
    expected = Matcher(0.5, 0.4, allow_low_quality_matches=True)(box_iou(gt_boxes[0], grid.boxes()))
    assert torch.equal(matches[0].long(), expected)


@pytest.mark.parametrize("seed", range(20))
def test_ssd_rule_equals_torchvisions_ssd_matcher(device, seed):
    pytest.importorskip("torchvision")
    from torchvision.models.detection._utils import SSDMatcher
    from torchvision.ops import box_iou

    grid, gt_boxes, count = case(seed, device)
    gt_boxes[0, 4] = gt_boxes[0, 5] + 0.5  # shares its best anchor with another one
    gt_boxes[0, 7] += 5000  # overlaps no anchor
    expected = SSDMatcher(0.5)(box_iou(gt_boxes[0].cpu(), grid.boxes().cpu()))
    rule = MatchRule(0.5, 0.5, low_quality="ssd", low_quality_min_iou=-1.0)
    for anchors in (grid, grid.boxes()):
        assert torch.equal(ops.match_anchors(anchors, gt_boxes, count, rule=rule)[0].long().cpu(), expected)


@pytest.mark.parametrize("seed", range(5))
def test_low_quality_off_equals_odtks_rule(device, seed):
    grid, gt_boxes, count = case(seed, device)
    matches = ops.match_anchors(grid, gt_boxes, count, rule=MatchRule(low_quality="off"))
    best, argmax = ops.box_iou(gt_boxes[0], grid.boxes()).max(dim=0)
    expected = torch.where(best >= 0.5, argmax, torch.where(best < 0.4, -1, -2))
    assert torch.equal(matches[0].long(), expected)


def test_crowds_leave_positives_alone(device):
    # mmdet's `ignore_iof_thr` removes all anchors in ignored regions before it matches.
    box = torch.tensor([[[0.0, 0, 10, 10]]], device=device)
    one = torch.tensor([1], device=device)
    matches = ops.match_anchors(box[0], box, one, crowds=(box, one))
    assert matches.tolist() == [[0]]


def test_a_best_iou_equal_to_the_minimum_does_not_promote(device):
    # In mmdet, `min_pos_iou` is inclusive.
    gt_boxes, anchors = (
        torch.tensor([[[0.0, 0, 10, 10]]], device=device),
        torch.tensor([[0.0, 0, 10, 2.5]], device=device),
    )
    assert max_iou_assigner(ops.box_iou(gt_boxes[0], anchors).cpu(), min_pos_iou=0.25).tolist() == [0]
    one = torch.tensor([1], device=device)
    rule = MatchRule(low_quality="mmdet", low_quality_min_iou=0.25)
    assert ops.match_anchors(anchors, gt_boxes, one, rule=rule).item() == -1
