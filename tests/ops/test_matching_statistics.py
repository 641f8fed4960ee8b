"""Match statistics, and matching of inputs larger than one strip, tile or column."""

import pytest
import torch
from cases import random_boxes
from matching_cases import padded, small_grid

import retinanet_ops as ops
from retinanet_ops import AnchorGrid, MatchRule, PaddedBoxes, reference
from retinanet_ops.constants import LOW_QUALITY_RULES


class TestStatistics:
    @pytest.mark.parametrize("with_grid", (False, True))
    @pytest.mark.parametrize("low_quality", LOW_QUALITY_RULES)
    @pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
    def test_equals_reference(self, device, dtype, low_quality, with_grid):
        grid = small_grid(device)
        gt_boxes, gt_count = (t.to(device) for t in padded([17, 0, 5], 17, max_side=70.0))
        crowds = PaddedBoxes(*(t.to(device) for t in padded([2, 3, 0], 3, max_side=80.0)))
        anchors = grid if with_grid else grid.boxes()
        options = {"rule": MatchRule(low_quality=low_quality), "crowds": crowds}
        statistics = ops.match_statistics(anchors, gt_boxes.to(dtype), gt_count, **options)
        expected = reference.match_statistics(anchors, gt_boxes.to(dtype), gt_count, **options)
        for actual, wanted in zip(statistics, expected, strict=True):
            assert actual.dtype == wanted.dtype and torch.equal(actual, wanted)

    def test_values_of_a_small_example(self, device):
        # The IoUs with the 10 x 10 box are 1, 0.5, 0.45, 0.3 and 0.
        gt_boxes = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 0, 0]]], device=device)
        anchors = torch.tensor([[0.0, 0, 10, h] for h in (10, 5, 4.5, 3)] + [[50.0, 0, 60, 10]], device=device)
        statistics = ops.match_statistics(
            anchors, gt_boxes, torch.tensor([1], device=device), rule=MatchRule(low_quality="off")
        )
        assert statistics.matches.tolist() == [[0, 0, -2, -1, -1]]
        torch.testing.assert_close(statistics.ious.cpu(), torch.tensor([[1.0, 0.5, 0.45, 0.0, 0.0]]))
        assert statistics.gt_best_ious.tolist() == [[1.0, 0.0]] and statistics.gt_positives.tolist() == [[2, 0]]


@pytest.mark.once
class TestLarge:
    """Cases with more than one strip of anchors, and more than one tile or column of ground truth."""

    @pytest.mark.parametrize("min_iou", (0.0, -1.0))
    @pytest.mark.parametrize("low_quality", LOW_QUALITY_RULES)
    def test_grid(self, device, backend, low_quality, min_iou):
        grid = AnchorGrid.torchvision(((60, 80), (30, 40)), (480, 640), sizes=((24, 32), (48, 64)), device=device)
        count = 1030 if backend == "cpu" else 150
        gt_boxes = random_boxes(2, count, size=460.0, min_side=2.0, max_side=120.0).to(device)
        gt_boxes[0, 5] = torch.tensor([5000.0, 0, 5020, 20])  # overlaps no anchor
        arguments = grid, gt_boxes, torch.tensor([count, count - 5], device=device)
        rule = MatchRule(low_quality=low_quality, low_quality_min_iou=min_iou)
        expected = reference.match_statistics(*arguments, rule=rule)
        threads = torch.get_num_threads()
        for wanted_threads in (1, 2, 3):
            torch.set_num_threads(wanted_threads)
            for actual, wanted in zip(ops.match_statistics(*arguments, rule=rule), expected, strict=True):
                assert torch.equal(actual, wanted)
        torch.set_num_threads(threads)

    @pytest.mark.parametrize("min_iou", (0.0, -1.0))
    @pytest.mark.parametrize("low_quality", LOW_QUALITY_RULES)
    @pytest.mark.parametrize("count", (3, 1030))
    def test_explicit_anchors(self, device, count, low_quality, min_iou):
        # The anchors of the last strip lie apart, and one ground truth overlaps no anchor.
        anchors = torch.cat([random_boxes(1024), random_boxes(1024), random_boxes(5) + 1000]).to(device)
        gt_boxes = random_boxes(1, count).to(device)
        gt_boxes[0, 1] += 5000
        arguments = anchors, gt_boxes, torch.tensor([count], device=device)
        rule = MatchRule(low_quality=low_quality, low_quality_min_iou=min_iou)
        expected = reference.match_statistics(*arguments, rule=rule)
        for actual, wanted in zip(ops.match_statistics(*arguments, rule=rule), expected, strict=True):
            assert torch.equal(actual, wanted)

    def test_offsets_that_cancel(self, device):
        far = torch.tensor([[-1e9, -1e9, -1e9 + 64, -1e9 + 64]], device=device)
        grid = AnchorGrid(far, (1,), ((10, 10),), ((4.0, 4.0),), ((1e9, 1e9),))
        gt_boxes, one = torch.tensor([[[0.0, 0, 64, 64]]], device=device), torch.tensor([1], device=device)
        assert torch.equal(ops.match_anchors(grid, gt_boxes, one), reference.match_anchors(grid, gt_boxes, one))

    def test_best_iou_near_the_smallest_float32(self, device):
        gt_boxes, one = torch.tensor([[[0.0, 0, 1e19, 1e19]]], device=device), torch.tensor([1], device=device)
        anchors = torch.tensor([[0.0, 0, 1, 1]], device=device)
        assert ops.match_anchors(anchors, gt_boxes, one).item() == 0

    def test_results_have_no_gradient(self, device):
        gt_boxes = random_boxes(1, 3).to(device).requires_grad_()
        anchors = random_boxes(10).to(device).requires_grad_()
        statistics = ops.match_statistics(anchors, gt_boxes, torch.tensor([3], device=device))
        assert not any(t.requires_grad for t in statistics)
