"""`match_anchors` and `assign_targets`: matches, edge cases and compilation."""

import pytest
import torch
from cases import DEGENERATE_BOXES, random_boxes, unaligned
from hypothesis import given, settings
from hypothesis import strategies as st
from matching_cases import GRID_SIZES, assert_equals_reference, padded, small_grid
from torch.library import opcheck

import retinanet_ops as ops
from retinanet_ops import AnchorGrid, MatchRule, PaddedBoxes, reference
from retinanet_ops.constants import LOW_QUALITY_RULES


class TestForward:
    @pytest.mark.parametrize("low_quality", LOW_QUALITY_RULES)
    @pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.float16, torch.bfloat16))
    def test_equals_reference(self, device, dtype, low_quality):
        anchors = random_boxes(500).to(device, dtype)
        gt_boxes, gt_count = (t.to(device) for t in padded([0, 7, 40, 1], 40))
        matches = assert_equals_reference(
            device, anchors, gt_boxes.to(dtype), gt_count, rule=MatchRule(low_quality=low_quality)
        )
        assert (matches[0] == -1).all() and (matches[1] >= 0).any() and (matches[1] == -2).any()

    @pytest.mark.parametrize("num_anchors", (0, 1, 31, 255, 256, 257, 4095, 4096, 4097))
    @pytest.mark.parametrize("max_gt", (0, 1, 127, 128, 129))
    def test_sizes(self, device, num_anchors, max_gt):
        anchors = random_boxes(num_anchors).to(device)
        gt_boxes, gt_count = (t.to(device) for t in padded([max_gt, max_gt // 2], max_gt))
        assert_equals_reference(device, anchors, gt_boxes, gt_count)

    def test_anchors_of_each_image(self, device):
        anchors = random_boxes(3, 200).to(device)
        gt_boxes, gt_count = (t.to(device) for t in padded([9, 4, 0], 9))
        matches = assert_equals_reference(device, anchors, gt_boxes, gt_count)
        for n in range(3):
            assert torch.equal(
                matches[n : n + 1], ops.match_anchors(anchors[n], gt_boxes[n : n + 1], gt_count[n : n + 1])
            )

    @pytest.mark.parametrize("low_quality", LOW_QUALITY_RULES)
    @pytest.mark.parametrize("scale", (2.0**-10, 2.0**20))
    def test_scaling_by_a_power_of_two_changes_nothing(self, device, scale, low_quality):
        # The smaller scale gives coordinates in 0..1 and areas far below 1.
        anchors = random_boxes(2000, size=1000.0).to(device)
        gt_boxes, gt_count = (t.to(device) for t in padded([30, 7], 30, size=1000.0, max_side=60.0))
        scaled = assert_equals_reference(
            device, anchors * scale, gt_boxes * scale, gt_count, rule=MatchRule(low_quality=low_quality)
        )
        assert torch.equal(
            scaled, ops.match_anchors(anchors, gt_boxes, gt_count, rule=MatchRule(low_quality=low_quality))
        )

    @given(
        st.integers(0, 2**32 - 1),
        st.integers(0, 40),
        st.integers(0, 12),
        st.sampled_from(LOW_QUALITY_RULES),
        st.sampled_from((-1.0, 0.0, 0.3)),
    )
    @settings(max_examples=60, deadline=None)
    def test_equals_reference_where_ious_tie(self, device, seed, num_anchors, num_gt, low_quality, min_iou):
        # With integer corners on a small lattice, most IoUs occur more than once, and many lie on a threshold.
        generator = torch.Generator().manual_seed(seed)
        corners = torch.randint(0, 5, (num_anchors + num_gt, 2, 2), generator=generator).sort(dim=1).values
        boxes = corners.reshape(-1, 4).float().to(device)
        rule = MatchRule(low_quality=low_quality, low_quality_min_iou=min_iou)
        anchors, gt_boxes = boxes[:num_anchors], boxes[None, num_anchors:]
        gt_count = torch.tensor([num_gt], device=device)
        matches = ops.match_anchors(anchors, gt_boxes, gt_count, rule=rule)
        assert torch.equal(matches, reference.match_anchors(anchors, gt_boxes, gt_count, rule=rule))


class TestAssignTargets:
    @pytest.mark.parametrize("label_dtype", (torch.int32, torch.int64))
    def test_labels_and_counts_follow_the_matches(self, device, label_dtype):
        grid = small_grid(device)
        gt_boxes, gt_count = (t.to(device) for t in padded([6, 0, 20], 20, max_side=80.0))
        gt_labels = torch.randint(0, 91, (3, 20), dtype=label_dtype).to(device)
        targets = ops.assign_targets(grid, gt_boxes, gt_labels, gt_count)
        expected = reference.assign_targets(grid, gt_boxes, gt_labels, gt_count)
        for actual, wanted in zip(targets, expected, strict=True):
            assert actual.dtype == torch.int32 and torch.equal(actual, wanted)
        assert torch.equal(targets.matches, ops.match_anchors(grid, gt_boxes, gt_count))
        assert targets.num_positive[0] > 0 and targets.num_positive[1] == 0

    @pytest.mark.parametrize("with_crowds", (False, True))
    @pytest.mark.parametrize("min_iou", (-1.0, 0.0, 0.3))
    @pytest.mark.parametrize("low_quality", LOW_QUALITY_RULES)
    def test_equals_reference(self, device, low_quality, min_iou, with_crowds):
        anchors = random_boxes(900).to(device)
        gt_boxes, gt_count = (t.to(device) for t in padded([17, 0, 5], 17))
        gt_labels = torch.randint(0, 91, (3, 17), device=device)
        rule = MatchRule(low_quality=low_quality, low_quality_min_iou=min_iou)
        crowds = None
        if with_crowds:
            crowds = PaddedBoxes(*(t.to(device) for t in padded([2, 3, 0], 3, max_side=80.0)))
        targets = ops.assign_targets(anchors, gt_boxes, gt_labels, gt_count, rule=rule, crowds=crowds)
        expected = reference.assign_targets(anchors, gt_boxes, gt_labels, gt_count, rule=rule, crowds=crowds)
        for actual, wanted in zip(targets, expected, strict=True):
            assert torch.equal(actual, wanted)
        # These boxes are chosen so that the rule and the crowds change the result.
        by_iou = ops.match_anchors(anchors, gt_boxes, gt_count, rule=MatchRule(low_quality="off"))
        promoted = (targets.matches >= 0) & (by_iou < 0)
        assert promoted.any() == (low_quality != "off")
        assert (targets.matches[1] == -2).any() == with_crowds
        assert targets.num_positive[0] > targets.num_positive[2] > targets.num_positive[1] == 0

    def test_no_ground_truth_at_all(self, device):
        gt_count = torch.zeros(2, dtype=torch.int64, device=device)
        targets = ops.assign_targets(
            small_grid(device),
            torch.empty(2, 0, 4, device=device),
            torch.empty(2, 0, dtype=torch.int64, device=device),
            gt_count,
        )
        assert (targets.labels == -1).all() and (targets.matches == -1).all() and (targets.num_positive == 0).all()

    def test_no_images(self, device):
        empty = torch.empty(0, 3, dtype=torch.int64, device=device)
        targets = ops.assign_targets(small_grid(device), torch.empty(0, 3, 4, device=device), empty, empty[:, 0])
        assert targets.labels.shape == (0, small_grid().num_anchors) and targets.num_positive.shape == (0,)


class TestEdgeCases:
    def test_thresholds_are_inclusive_and_rounded_to_the_dtype(self, device):
        # The IoUs with the 10 x 10 box are 0.5, 0.4 and 0.3. In float32, 0.3 is not the double 0.3.
        gt_boxes = torch.tensor([[[0.0, 0, 10, 10]]], device=device)
        anchors = torch.tensor([[0.0, 0, 10, 5], [0, 0, 10, 4], [0, 0, 10, 3]], device=device)
        count = torch.tensor([1], device=device)
        for fg, bg, expected in ((0.5, 0.4, [0, -2, -1]), (0.4, 0.3, [0, 0, -2]), (0.3, 0.3, [0, 0, 0])):
            matches = ops.match_anchors(anchors, gt_boxes, count, rule=MatchRule(fg, bg, low_quality="off"))
            assert matches[0].tolist() == expected

    def test_argmax_ties_go_to_the_lowest_ground_truth(self, device):
        gt_boxes = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 10, 10], [50, 50, 60, 60]]], device=device)
        anchors = torch.tensor([[0.0, 0, 10, 10], [50, 50, 60, 60]], device=device)
        assert ops.match_anchors(anchors, gt_boxes, torch.tensor([3], device=device))[0].tolist() == [0, 2]

    def test_low_quality_rules_differ_on_a_shared_anchor(self, device):
        # Both ground truths have their best IoU with anchors 0 and 1, whose own highest IoU is with ground truth 0.
        gt_boxes = torch.tensor([[[0.0, 0, 10, 3], [0, 0, 10, 1]]], device=device)
        anchors = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 10], [40, 0, 50, 10]], device=device)
        count = torch.tensor([2], device=device)
        expected = {"torchvision": [0, 0, -1], "mmdet": [1, 1, -1], "ssd": [1, -1, -1], "off": [-1, -1, -1]}
        for low_quality, expected_matches in expected.items():
            matches = ops.match_anchors(anchors, gt_boxes, count, rule=MatchRule(low_quality=low_quality))
            assert matches[0].tolist() == expected_matches

    def test_ssd_rule_takes_an_anchor_from_another_ground_truth(self, device):
        # Ground truth 0 has its best IoU with anchors 0 and 2, and takes the first. Anchor 1 equals ground truth 1, but
        # it is also the best anchor of ground truth 2, which takes it later. Ground truth 1 keeps anchor 3, with which
        # its IoU is 0.8.
        gt_boxes = torch.tensor([[[0.0, 0, 10, 2], [50, 50, 60, 60], [50, 50, 60, 54]]], device=device)
        anchors = torch.tensor([[0.0, 0, 10, 9], [50, 50, 60, 60], [0, 0, 10, 9], [50, 52, 60, 60]], device=device)
        labels, count = torch.tensor([[4, 5, 6]], device=device), torch.tensor([3], device=device)
        rule = MatchRule(0.5, 0.5, low_quality="ssd")
        targets = ops.assign_targets(anchors, gt_boxes, labels, count, rule=rule)
        assert targets.matches.tolist() == [[0, 2, -1, 1]] and targets.labels.tolist() == [[4, 6, -1, 5]]
        assert targets.num_positive.tolist() == [3]
        statistics = ops.match_statistics(anchors, gt_boxes, count, rule=rule)
        torch.testing.assert_close(statistics.ious.cpu(), torch.tensor([[2 / 9, 0.4, 0, 0.8]]))
        assert statistics.gt_positives.tolist() == [[1, 1, 1]]

    def test_ssd_rule_with_ground_truths_of_one_box(self, device):
        # All of them have the same best anchor, the first of two equal ones. The last ground truth has it. The first
        # ground truth has the other one by its IoU, because a tie of IoUs goes to the lowest index.
        gt_boxes = torch.tensor([0.0, 0, 10, 10], device=device).expand(1, 300, 4)
        anchors = torch.tensor([[50.0, 0, 60, 10], [0, 0, 10, 8], [0, 0, 10, 8]], device=device)
        rule = MatchRule(0.5, 0.5, low_quality="ssd")
        for count in (1, 2, 256, 300):
            matches = ops.match_anchors(anchors, gt_boxes, torch.tensor([count], device=device), rule=rule)
            assert matches.tolist() == [[-1, count - 1, 0]]

    def test_ssd_rule_without_overlap(self, device):
        # With a minimum of -1, as in torchvision's matcher, the first anchor ties for the best IoU of 0.
        gt_boxes, anchors = torch.tensor([[[500.0, 500, 510, 510]]], device=device), random_boxes(300).to(device)
        count = torch.tensor([1], device=device)
        for form in (anchors, small_grid(device)):
            taken = ops.match_anchors(form, gt_boxes, count, rule=MatchRule(0.5, 0.5, "ssd", low_quality_min_iou=-1.0))
            assert taken[0, 0] == 0 and (taken[0, 1:] == -1).all()
            assert (ops.match_anchors(form, gt_boxes, count, rule=MatchRule(0.5, 0.5, "ssd")) == -1).all()

    @pytest.mark.parametrize("first", (0, 1))
    def test_promoted_anchor_takes_the_box_of_its_own_highest_iou(self, device, first):
        # Anchor 7 is the best anchor of the small box. Its own highest IoU is with the large box, which is too large to
        # match any anchor of that strip or tile and has a better anchor at the end.
        corners = torch.rand(600, 2) * 1000 + 1000
        anchors = torch.cat((corners, corners + 8), dim=1)
        anchors[7], anchors[-1] = torch.tensor([[0.0, 0, 10, 10], [0, 0, 30, 10]])
        gt_boxes = torch.tensor([[[0.0, 0, 1, 10], [0, 0, 30, 10]]])[:, [first, 1 - first]]
        count = torch.tensor([2], device=device)
        matches = ops.match_anchors(anchors.to(device), gt_boxes.to(device), count)
        assert matches[0, 7] == matches[0, -1] == 1 - first and matches[0].ge(0).sum() == 2

    def test_ground_truth_that_overlaps_nothing_promotes_nothing(self, device):
        # This deviates from torchvision, whose rule makes every anchor with IoU 0 positive here.
        gt_boxes = torch.tensor([[[500.0, 500, 510, 510]]], device=device)
        anchors = random_boxes(20).to(device)
        count = torch.tensor([1], device=device)
        assert (ops.match_anchors(anchors, gt_boxes, count) == -1).all()
        assert (ops.match_anchors(anchors, gt_boxes, count, rule=MatchRule(low_quality_min_iou=-1.0)) == 0).all()

    def test_low_quality_min_iou_is_exclusive(self, device):
        gt_boxes = torch.tensor([[[0.0, 0, 10, 10]]], device=device)
        anchors = torch.tensor([[0.0, 0, 10, 2.5]], device=device)  # IoU 0.25
        count = torch.tensor([1], device=device)
        assert ops.match_anchors(anchors, gt_boxes, count, rule=MatchRule(low_quality_min_iou=0.25)).item() == -1
        assert ops.match_anchors(anchors, gt_boxes, count, rule=MatchRule(low_quality_min_iou=0.2499)).item() == 0

    @pytest.mark.parametrize("min_iou", (0.0, -1.0, -0.5))
    @pytest.mark.parametrize("low_quality", LOW_QUALITY_RULES)
    def test_degenerate_ground_truth_never_matches(self, device, low_quality, min_iou):
        degenerate = DEGENERATE_BOXES.to(device)
        anchors = torch.cat([random_boxes(300).to(device), degenerate])
        count = torch.tensor([len(degenerate)], device=device)
        rule = MatchRule(low_quality=low_quality, low_quality_min_iou=min_iou)
        assert (ops.match_anchors(anchors, degenerate[None], count, rule=rule) == -1).all()
        # Degenerate boxes after or before valid ones, one of which overlaps no anchor, do not change any match.
        far = torch.tensor([[2000.0, 2000, 2010, 2010]])
        gt_boxes = torch.cat([random_boxes(12), far]).to(device)
        alone = ops.match_anchors(anchors, gt_boxes[None], torch.tensor([13], device=device), rule=rule)
        after = ops.match_anchors(anchors, torch.cat([gt_boxes, degenerate])[None], 13 + count, rule=rule)
        before = ops.match_anchors(anchors, torch.cat([degenerate, gt_boxes])[None], 13 + count, rule=rule)
        assert torch.equal(after, alone)
        assert torch.equal(before, torch.where(alone >= 0, alone + len(degenerate), alone))
        if min_iou >= 0:  # otherwise the box that overlaps nothing promotes all anchors
            assert (alone[0, 300:] == -1).all()  # a degenerate anchor is background

    def test_count_is_clamped(self, device):
        anchors, gt_boxes = random_boxes(100).to(device), random_boxes(1, 5).to(device)
        for count, same_as in ((99, 5), (6, 5), (-3, 0)):
            matches = ops.match_anchors(anchors, gt_boxes, torch.tensor([count], device=device))
            assert torch.equal(matches, ops.match_anchors(anchors, gt_boxes, torch.tensor([same_as], device=device)))

    def test_crowds_ignore_background_only(self, device):
        gt_boxes = torch.tensor([[[0.0, 0, 10, 10]]], device=device)
        anchors = torch.tensor([[0.0, 0, 10, 10], [20, 0, 30, 10], [25, 0, 35, 10], [40, 0, 50, 10]], device=device)
        crowd = torch.tensor([[[0.0, 0, 30, 10], [float("nan")] * 4]], device=device)
        one, two = torch.tensor([1], device=device), torch.tensor([2], device=device)

        def matches(crowd_count, crowd_ioa=0.5):
            rule = MatchRule(low_quality="off", crowd_ioa=crowd_ioa)
            return ops.match_anchors(anchors, gt_boxes, one, rule=rule, crowds=(crowd, crowd_count))[0].tolist()

        assert matches(two) == [0, -2, -2, -1]
        assert matches(one, crowd_ioa=0.51) == [0, -2, -1, -1]
        assert matches(one, crowd_ioa=0.0) == [0, -2, -2, -1]
        assert matches(0 * one) == [0, -1, -1, -1]

    def test_crowds_equal_reference(self, device):
        crowds = PaddedBoxes(random_boxes(2, 4).to(device), torch.tensor([4, 2], device=device))
        gt_boxes, gt_count = (t.to(device) for t in padded([3, 5], 5))
        assert_equals_reference(device, random_boxes(300).to(device), gt_boxes, gt_count, crowds=crowds)

    def test_degenerate_crowds_ignore_nothing(self, device):
        anchors = random_boxes(300, size=20.0).to(device)
        crowd = DEGENERATE_BOXES[None].to(device)
        none, count = torch.tensor([0], device=device), torch.tensor([crowd.shape[1]], device=device)
        options = {"rule": MatchRule(crowd_ioa=0.1), "crowds": PaddedBoxes(crowd, count)}
        matches = assert_equals_reference(device, anchors, random_boxes(1, 1).to(device), none, **options)
        assert (matches == -1).all()

    @pytest.mark.parametrize("low_quality", LOW_QUALITY_RULES)
    @pytest.mark.parametrize("num_anchors", (1, 300, 513))
    def test_every_positive_is_counted_once(self, device, num_anchors, low_quality):
        box = torch.tensor([[10.0, 10, 20, 20]], device=device)
        label, one = torch.tensor([[7]], device=device), torch.tensor([1], device=device)
        # The first case both matches and promotes the anchors. In the second, thresholds of 0 accept an IoU of 0.
        for boxes, thresholds in ((box, (0.5, 0.4)), (box + 50, (0.0, 0.0))):
            rule = MatchRule(*thresholds, low_quality)
            targets = ops.assign_targets(box.expand(num_anchors, 4), boxes[None], label, one, rule=rule)
            assert (targets.labels == 7).all() and targets.num_positive.tolist() == [num_anchors]

    def test_unaligned_and_strided_input(self, device):
        anchors, gt_boxes = random_boxes(100).to(device), random_boxes(2, 6).to(device)
        count = torch.tensor([6, 3], device=device)
        expected = ops.match_anchors(anchors, gt_boxes, count)
        assert torch.equal(ops.match_anchors(unaligned(anchors), unaligned(gt_boxes), unaligned(count)), expected)
        strided = torch.stack((anchors, anchors), dim=-1)[..., 0]
        assert torch.equal(
            ops.match_anchors(strided, gt_boxes.transpose(0, 1).contiguous().transpose(0, 1), count), expected
        )

    def test_independent_of_threads(self, device):
        anchors, gt_boxes = random_boxes(20_000).to(device), random_boxes(2, 20).to(device)
        count, threads = torch.tensor([20, 11], device=device), torch.get_num_threads()
        results = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(ops.match_anchors(anchors, gt_boxes, count))
        torch.set_num_threads(threads)
        assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


class TestCompile:
    def arguments(self, device, with_grid):
        grid = small_grid(device)
        anchors = grid.arguments() if with_grid else (grid.boxes(), [], [])
        gt_boxes, count = random_boxes(2, 5).to(device), torch.tensor([5, 2], device=device)
        labels = torch.randint(0, 3, (2, 5), device=device)
        return (
            *anchors,
            gt_boxes,
            labels,
            count,
            random_boxes(2, 1).to(device),
            count * 0 + 1,
            0.5,
            0.4,
            "torchvision",
            0.0,
            0.5,
            True,
        )

    @pytest.mark.parametrize("with_grid", (False, True))
    def test_opcheck(self, device, with_grid):
        opcheck(torch.ops.retinanet_ops.assign_targets, self.arguments(device, with_grid))

    def test_compiles_in_one_graph(self, device):
        base = small_grid(device)

        def function(features, gt_boxes, gt_labels, gt_count):
            sizes = tuple((f.shape[-2], f.shape[-1]) for f in features)
            grid = AnchorGrid(base.base_anchors, base.anchors_per_cell, sizes, base.strides, base.offsets)
            return ops.assign_targets(grid, gt_boxes, gt_labels, gt_count)

        compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
        for scale in (1, 2):
            features = [torch.zeros(1, h * scale, w, device=device) for h, w in GRID_SIZES]
            gt_boxes, count = (
                random_boxes(2, 5 + scale, max_side=90.0).to(device),
                torch.tensor([5, 2], device=device),
            )
            labels = torch.randint(0, 3, (2, 5 + scale), device=device)
            for a, b in zip(
                compiled(features, gt_boxes, labels, count),
                function(features, gt_boxes, labels, count),
                strict=True,
            ):
                assert torch.equal(a, b)

    def test_integer_results_have_no_gradient(self, device):
        gt_boxes = random_boxes(1, 3).to(device).requires_grad_()
        matches = ops.match_anchors(random_boxes(10).to(device), gt_boxes, torch.tensor([3], device=device))
        assert not matches.requires_grad
