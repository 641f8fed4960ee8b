"""How many bytes the kernels move, as the emulator counts them."""

import importlib.util
import sys

import pytest
import torch
from cases import random_boxes
from launches import assert_moves_at_most, assert_streams
from matching_cases import grid_of_levels

import retinanet_ops as ops
from retinanet_ops import MatchRule

pytestmark = pytest.mark.backends("emulated")


def names(launches):
    return [launch.kernel for launch in launches]


class TestTraffic:
    @pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64))
    def test_focal_loss_of_class_ids_passes_three_times(self, tracing, dtype):
        x = torch.randn(6_000, 80, dtype=dtype, requires_grad=True)
        ops.sigmoid_focal_loss(x, torch.randint(-2, 80, (6_000,)), reduction="sum").backward()
        launches = tracing.take_launches()
        size = x.numel() * x.element_size()
        assert_moves_at_most(launches, read=2 * size, written=size)
        assert names(launches) == ["focal_loss_rows_kernel", "sum_partials_kernel", "focal_loss_rows_kernel"]
        # Each row of 80 elements has a class id of 8 bytes.
        logits = [launch.traffic for launch in (launches[0], launches[2])]
        assert all(t.wide_reads >= size // 16 for t in logits) and logits[1].wide_writes >= size // 16

    def test_focal_loss_of_dense_targets(self, tracing):
        x = torch.randn(6_000, 80, requires_grad=True)
        ops.sigmoid_focal_loss(x, torch.rand(6_000, 80), reduction="sum").backward()
        launches = tracing.take_launches()
        size = x.numel() * x.element_size()
        assert_moves_at_most(launches, read=4 * size, written=size)
        assert_streams(launches)

    @pytest.mark.parametrize("channels_last", (False, True))
    @pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
    def test_dense_focal_loss_passes_three_times(self, tracing, dtype, channels_last):
        layout = torch.channels_last if channels_last else torch.contiguous_format
        # The planes of the last level, of 13 x 7 cells, start at every offset within a pack.
        levels = [
            torch.randn(2, 3 * 40, h, w).to(dtype, memory_format=layout).requires_grad_()
            for h, w in ((48, 48), (24, 24), (13, 7))
        ]
        rows = sum(level[0].numel() // 40 for level in levels)
        ops.dense_focal_loss(levels, torch.randint(-2, 40, (2, rows), dtype=torch.int32), 40).sum().backward()
        launches = tracing.take_launches()
        size = sum(level.numel() * level.element_size() for level in levels)
        assert names(launches) == ["dense_focal_loss_kernel", "sum_partials_kernel", "dense_focal_loss_kernel"]
        # The forward and the backward pass each read the labels once.
        assert_moves_at_most(launches, read=2 * size + 2 * 4 * 2 * rows, written=size)
        logits = [launch.traffic for launch in (launches[0], launches[2])]
        assert all(t.wide_reads >= 0.9 * size // 16 for t in logits) and logits[1].wide_writes >= 0.9 * size // 16

    @pytest.mark.parametrize("low_quality", ("torchvision", "mmdet", "off"))
    def test_matching_reads_each_anchor_once(self, tracing, low_quality):
        anchors = random_boxes(100_000, size=1000.0)
        gt_boxes, gt_count = random_boxes(2, 4, size=900.0, max_side=100.0), torch.tensor([4, 3])
        ops.match_anchors(anchors, gt_boxes, gt_count, rule=MatchRule(low_quality=low_quality))
        launches = tracing.take_launches()
        assert_moves_at_most(launches, read=2 * 16 * len(anchors), written=2 * 4 * len(anchors))
        assert launches[1].kernel == "assign_kernel" and launches[1].traffic.wide_reads >= 2 * len(anchors)

    @pytest.mark.parametrize(("num_gt", "blocks_again"), ((8, 0), (20, 0), (40, 40)))
    def test_matching_neighbouring_anchors_with_many_boxes(self, tracing, num_gt, blocks_again):
        # In the order of a grid, few of the 630 blocks hold the best anchors of the ground truths, and only these
        # blocks are read again. With 40 ground truths they are up to a tenth of the blocks, so one block for each
        # ground truth is added to the expected bytes. From about 46 ground truths on, the maxima and the atomics that
        # update them are more than a tenth of the bytes written.
        anchors = grid_of_levels((128, 160)).boxes()
        ops.match_anchors(anchors, random_boxes(1, num_gt, size=1000.0, max_side=60.0), torch.tensor([num_gt]))
        launches = tracing.take_launches()
        assert_moves_at_most(launches, read=16 * (len(anchors) + 256 * blocks_again), written=4 * len(anchors))

    @pytest.mark.parametrize("low_quality_min_iou", (0.0, 0.9))
    def test_matching_with_boxes_that_promote_nothing_reads_once(self, tracing, low_quality_min_iou):
        # The boxes overlap no anchor, or no anchor with an IoU above 0.9.
        anchors = grid_of_levels((128, 160)).boxes()
        gt_boxes = random_boxes(1, 8, size=1000.0, max_side=60.0) + (1e4 if low_quality_min_iou == 0 else 0)
        rule = MatchRule(1.0, 1.0, low_quality_min_iou=low_quality_min_iou)
        ops.match_anchors(anchors, gt_boxes, torch.tensor([8]), rule=rule)
        launches = tracing.take_launches()
        assert_moves_at_most(launches, read=16 * len(anchors), written=4 * len(anchors))

    def test_matching_with_a_grid_reads_nothing(self, tracing):
        grid = grid_of_levels()
        gt_boxes, gt_count = random_boxes(2, 4, size=500.0, max_side=100.0), torch.tensor([4, 3])
        ops.match_anchors(grid, gt_boxes, gt_count)
        launches = tracing.take_launches()
        assert names(launches) == ["match_prepare_kernel", "assign_kernel"]
        assert_moves_at_most(launches, read=0, written=2 * 4 * len(grid.boxes()))

    @pytest.mark.parametrize("on_grid", (True, False))
    def test_assigning_points_reads_each_anchor_once_and_a_grid_never(self, tracing, on_grid):
        grid = grid_of_levels((128, 160))
        anchors = grid if on_grid else grid.boxes()
        labels, count = torch.randint(0, 9, (2, 4)), torch.tensor([4, 3])
        ops.assign_points(anchors, random_boxes(2, 4, size=900.0, max_side=100.0), labels, count)
        launches = tracing.take_launches()
        assert names(launches) == ["clear_positives_kernel", "assign_points_kernel"]
        read = 0 if on_grid else 2 * 16 * grid.num_anchors
        assert_moves_at_most(launches, read=read, written=2 * 8 * grid.num_anchors)
        assert on_grid or launches[1].traffic.wide_reads >= 2 * grid.num_anchors

    @pytest.mark.parametrize("channels_last", (False, True))
    @pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
    def test_dense_box_loss_reads_matches_once_and_writes_gradients_once(self, tracing, dtype, channels_last):
        layout = torch.channels_last if channels_last else torch.contiguous_format
        grid = grid_of_levels()
        levels = [
            torch.randn(2, 4 * a, h, w).to(dtype, memory_format=layout).requires_grad_()
            for a, (h, w) in zip(grid.anchors_per_cell, grid.grid_sizes, strict=True)
        ]
        matches = torch.full((2, grid.num_anchors), -1, dtype=torch.int32)
        matches[:, ::1000] = 1
        ops.dense_box_loss(levels, grid, random_boxes(2, 3, size=500.0), matches).sum().backward()
        launches = tracing.take_launches()
        assert names(launches) == ["dense_box_loss_kernel", "sum_partials_kernel", "dense_box_loss_backward_kernel"]
        size = sum(level.numel() * level.element_size() for level in levels)
        # Positives are far apart, so each pass reads a sector of 32 bytes for each of their four deltas, and the
        # backward pass another one for their match. It knows from one bit per anchor which anchors have a match.
        of_positives, bits = (2 * 4 + 1) * 32 * matches.ge(0).sum().item(), matches.numel() // 8
        assert_moves_at_most(launches, read=4 * matches.numel() + bits + of_positives, written=size + bits)
        assert_streams(launches[2:], reads=False)

    @pytest.mark.parametrize("channels_last", (False, True))
    @pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
    def test_selecting_candidates_reads_the_logits_once(self, tracing, dtype, channels_last):
        layout = torch.channels_last if channels_last else torch.contiguous_format
        logits = [torch.randn(2, 9 * 20, h, w).to(dtype, memory_format=layout) for h, w in ((48, 48), (24, 24))]
        torch.ops.retinanet_ops.select_candidates(logits, 20, 0.95, 100)
        launches = tracing.take_launches()
        assert names(launches) == ["sample_kernel", "select_tile_kernel", "select_level_kernel"]
        size = sum(level.numel() * level.element_size() for level in logits)
        assert_moves_at_most(launches, read=size, written=0.05 * size)
        assert launches[1].traffic.wide_reads >= size // 16

    @pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64))
    def test_selecting_reads_images_at_any_address_in_packs(self, tracing, dtype):
        # The second and the third image start within 16 bytes.
        logits = [torch.randn(3, 3 * 91, h, w).to(dtype) for h, w in ((25, 41), (13, 21))]
        torch.ops.retinanet_ops.select_candidates(logits, 91, 0.95, 100)
        launches = tracing.take_launches()
        size = sum(level.numel() * level.element_size() for level in logits)
        assert_moves_at_most(launches, read=size, written=0.05 * size)
        assert launches[1].traffic.wide_reads >= 0.99 * size // 16

    def test_selecting_writes_no_segments_for_a_large_topk(self, tracing):
        logits = [torch.randn(2, 3 * 20, 48, 48)]
        torch.ops.retinanet_ops.select_candidates(logits, 20, 0.5, 3000)
        launches = tracing.take_launches()
        # Each level of an image has 2,048 bins, which a pass of the search writes and clears.
        bins = 6 * 2 * 2 * 4 * 2048
        assert sum(launch.traffic.bytes_written for launch in launches) <= 2 * 8 * 3000 + bins + 4096

    def test_nms_reads_no_more_candidates_than_it_needs(self, tracing):
        # The boxes do not overlap, so all of them could be kept.
        place = 100.0 * torch.arange(2000)[:, None]
        boxes = (place + torch.tensor([0.0, 0.0, 50.0, 50.0])).expand(2, -1, -1).contiguous()
        order = torch.arange(2000).expand(2, -1).contiguous()
        torch.ops.retinanet_ops.nms_sorted(boxes, order, torch.tensor([2000, 1999]), None, 0.5, 100, 0, True)
        launches = tracing.take_launches()
        assert names(launches) == ["nms_kernel"]
        # The kernel stops at 100 kept boxes, within the first chunk of 256 candidates. It also stores each kept box,
        # with which later candidates are compared.
        assert_moves_at_most(launches, read=2 * 256 * (16 + 8), written=2 * 100 * (8 + 16 + 8))

    def test_padded_nms_reads_boxes_of_the_best_only(self, tracing):
        place = 100.0 * torch.arange(2000)[:, None]
        boxes = (place + torch.tensor([0.0, 0.0, 50.0, 50.0])).expand(2, -1, -1).contiguous()
        ops.batched_nms_padded(boxes, torch.rand(2, 2000), iou_threshold=0.5, max_detections=100)
        launches = tracing.take_launches()
        assert names(launches) == ["nms_padded_kernel"]
        # Three passes over the scores find the best 512 candidates at most, of which the first 256 fill all slots.
        assert_moves_at_most(launches, read=2 * (3 * 2000 * 4 + 256 * 16), written=2 * 100 * (8 + 32))

    def test_hard_negatives_read_twice(self, tracing):
        losses, labels = torch.rand(2, 50_000), torch.randint(-2, 2, (2, 50_000), dtype=torch.int32)
        ops.hard_negative_mask(losses, labels)
        count, split, finish = tracing.take_launches()
        size = 2 * 4 * losses.numel()  # labels and losses
        blocks, histogram = 2 * 13, 4 * 2049
        assert_moves_at_most([count], read=size, written=blocks * histogram)
        assert count.traffic.wide_reads >= size // 16
        # Each block of the second kernel reads the counts of the 13 tiles of its image.
        assert_moves_at_most([split], read=size + blocks * 13 * histogram, written=losses.numel())
        assert split.traffic.wide_reads >= size // 16
        # Only the losses of one bin are left to the third kernel.
        assert finish.traffic.bytes_read < size / 10

    def test_class_scores_read_only_what_is_gathered(self, tracing):
        logits = [torch.randn(2, 9 * 20, h, w).contiguous(memory_format=torch.channels_last) for h, w in ((48, 48),)]
        index = torch.randint(0, 9 * 48 * 48, (2, 300))
        ops.gather_class_scores(logits, index, 20)
        launches = tracing.take_launches()
        # 20 logits are 80 bytes. They lie in three sectors of 32 bytes, or in four if they straddle a sector at both
        # ends.
        assert_moves_at_most(launches, read=600 * (8 + 3.5 * 32), written=600 * 20 * 4)

    def test_box_iou_writes_packs(self, tracing):
        boxes1, boxes2 = random_boxes(40), random_boxes(3_000)
        ops.box_iou(boxes1, boxes2)
        launches = tracing.take_launches()
        # The results are one row of tiles, which reads boxes2 once. Each tile reads boxes1.
        assert_moves_at_most(launches, read=2 * 16 * len(boxes2), written=4 * 40 * 3_000)
        assert_streams(launches, reads=False)

    @pytest.mark.parametrize("op", ("encode", "decode"))
    def test_box_coding(self, tracing, op):
        boxes, anchors = random_boxes(50_000), random_boxes(50_000)
        (ops.encode_boxes if op == "encode" else ops.decode_boxes)(boxes, anchors)
        launches = tracing.take_launches()
        assert_moves_at_most(launches, read=32 * len(boxes), written=16 * len(boxes))
        assert_streams(launches)


@pytest.fixture(scope="module")
def toys():
    """Return a module of kernels that stream well and badly, which has its own emulator."""
    from tools.emulator import build

    (folder,) = build.build("races")
    spec = importlib.util.spec_from_file_location("planted_bugs", folder / "planted_bugs.so")
    module = importlib.util.module_from_spec(spec)
    sys.modules["planted_bugs"] = module
    spec.loader.exec_module(module)
    return module


class TestTrafficAssertions:
    SIZE = 4 * 2**18

    @pytest.fixture
    def launch(self, tracing, toys):
        def launch(kernel):
            toys.take_launches()
            toys.run(kernel)
            return toys.take_launches()

        return launch

    def test_good_kernel_passes(self, launch):
        launches = launch("sixteen_bytes_per_thread")
        assert_moves_at_most(launches, read=self.SIZE, written=self.SIZE)
        assert_streams(launches)

    def test_one_element_per_thread_fails(self, launch):
        launches = launch("one_element_per_thread")
        with pytest.raises(AssertionError):
            assert_streams(launches, writes=False)
        with pytest.raises(AssertionError):
            assert_streams(launches, reads=False)

    def test_second_pass_fails(self, launch):
        launches = launch("two_passes")
        assert_streams(launches, writes=False)
        with pytest.raises(AssertionError):
            assert_moves_at_most(launches, read=self.SIZE, written=self.SIZE)
