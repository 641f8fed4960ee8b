"""`assign_points`: assignments, the bounds of each rule, edge cases, errors and compilation."""

import math
from functools import partial

import pytest
import torch
from cases import DEGENERATE_BOXES, FLOATING, random_boxes, unaligned
from torch.library import opcheck

import retinanet_ops as ops
from retinanet_ops import AnchorGrid, reference

GRID_SIZES = ((13, 17), (7, 9), (4, 5))
LEVEL_SIZES = [h * w for h, w in GRID_SIZES]


def point_grid(device="cpu", per_cell=1):
    """Return the points of a 104 x 136 image on three levels, whose cells have 8, 16 and 32 pixels."""
    sizes = tuple(tuple(s * (1 + 0.5 * i) for i in range(per_cell)) for s in (8, 16, 32))
    return AnchorGrid.torchvision(GRID_SIZES, (104, 136), sizes=sizes, aspect_ratios=((1.0,),) * 3, device=device)


def ground_truth(device, counts, max_gt, dtype=torch.float32, **box_options):
    """Return boxes, labels and counts, whose padding holds boxes that must take no point."""
    boxes = random_boxes(len(counts), max_gt, **{"max_side": 90.0, **box_options}).to(device, dtype)
    labels = torch.randint(0, 7, (len(counts), max_gt)).to(device)
    return boxes, labels, torch.tensor(counts, device=device, dtype=torch.int64)


def assert_equals_reference(device, anchors, truth, **options):
    """Compare all results with those of the reference and return them."""
    targets = ops.assign_points(anchors, *truth, **options)
    expected = reference.assign_points(anchors, *truth, **options)
    for name, value, wanted in zip(targets._fields, targets, expected, strict=True):
        assert value.dtype == torch.int32 and value.device.type == device.type
        assert torch.equal(value, wanted), name
    return targets


def assign_one(device, centre, box, *, width=8.0, **options):
    """Return whether a box takes a single point."""
    x, y = centre
    anchor = torch.tensor([[x - width / 2, y - width / 2, x + width / 2, y + width / 2]], device=device)
    boxes = torch.tensor([[box]], device=device)
    one = torch.ones(1, 1, dtype=torch.int64, device=device)
    sizes = options.pop("level_sizes", None)
    if sizes:
        anchor = anchor.expand(sum(sizes), 4)
    targets = assert_equals_reference(device, anchor, (boxes, one, one[0]), level_sizes=sizes, **options)
    return (targets.matches[0] >= 0).tolist() if sizes else targets.matches.item() == 0


def gpu_check_cases(small):
    """Yield (name, run, tolerance) for `python -m tools.gpu_check`; tolerance 0 demands the same bits."""

    def run(dtype, on_grid, device):
        torch.manual_seed(0)
        grid = point_grid(device, per_cell=1 if small else 3)
        truth = ground_truth(device, [9, 0, 40, 1] if small else [37, 0, 300, 1], 40 if small else 300, dtype)
        anchors = grid if on_grid else grid.boxes().to(dtype)
        return ops.assign_points(anchors, *truth)._asdict()

    for dtype in FLOATING:
        for on_grid in (True, False):
            yield f"assign_points {'grid' if on_grid else 'explicit'} {dtype}", partial(run, dtype, on_grid), 0.0


class TestForward:
    @pytest.mark.parametrize("dtype", FLOATING)
    @pytest.mark.parametrize("on_grid", (True, False))
    def test_equals_reference(self, device, dtype, on_grid):
        grid = point_grid(device)
        truth = ground_truth(device, [0, 7, 40, 1], 40, dtype)
        anchors, options = (grid, {}) if on_grid else (grid.boxes().to(dtype), {"level_sizes": LEVEL_SIZES})
        targets = assert_equals_reference(device, anchors, truth, **options)
        assert targets.num_positive[0] == 0 and (targets.num_positive[1:3] > 0).all()

    @pytest.mark.parametrize("count", (0, 1, 31, 127, 128, 129, 1023, 1024, 1025, 4097))
    @pytest.mark.parametrize("max_gt", (0, 1, 127, 128, 129))
    def test_sizes(self, device, count, max_gt):
        anchors = random_boxes(count, min_side=4.0, max_side=16.0).to(device)
        truth = ground_truth(device, [max_gt, max_gt // 2], max_gt)
        assert_equals_reference(device, anchors, truth)
        assert_equals_reference(device, anchors, truth, level_sizes=[count // 2, 0, count - count // 2])

    @pytest.mark.parametrize("per_cell", (0, 1, 3))
    def test_grid_equals_its_boxes(self, device, per_cell):
        grid = point_grid(device, per_cell)
        truth = ground_truth(device, [30, 5], 30)
        for options in ({}, {"radius": None}, {"radius": 0.6, "distance_range": (1.0, 3.0)}):
            targets = assert_equals_reference(device, grid, truth, **options)
            boxes = ops.assign_points(
                grid.boxes(), *truth, level_sizes=[per_cell * size for size in LEVEL_SIZES], **options
            )
            assert all(torch.equal(a, b) for a, b in zip(targets, boxes, strict=True))

    def test_anchors_of_each_image(self, device):
        anchors = random_boxes(3, 200, min_side=4.0, max_side=16.0).to(device)
        truth = ground_truth(device, [9, 4, 0], 9)
        targets = assert_equals_reference(device, anchors, truth)
        for n in range(3):
            alone = ops.assign_points(anchors[n], *(t[n : n + 1] for t in truth))
            assert torch.equal(alone.matches[0], targets.matches[n])

    @pytest.mark.parametrize("strides", ((0.0, 8.0), (-8.0, 8.0), (-1.3, 2.7), (1e-3, 8.0), (8.0, 4e5)))
    def test_unusual_strides(self, device, strides):
        base = torch.tensor([[-8.3, -6.1, 8, 6], [-1e-9, -5, 1e-9, 5], [-5, 2, 5, 2]], device=device)
        offsets = tuple(90.0 if stride < 0 else 0.0 for stride in strides)
        grid = AnchorGrid(base, (3,), ((11, 13),), (strides,), (offsets,))
        assert_equals_reference(device, grid, ground_truth(device, [40, 9], 40))

    @pytest.mark.parametrize("shift", (0.0, 1e5, 3e7))
    def test_boxes_far_from_the_origin(self, device, shift):
        grid = point_grid(device)
        moved = AnchorGrid(
            grid.base_anchors, grid.anchors_per_cell, grid.grid_sizes, grid.strides, ((shift, -shift),) * 3
        )
        boxes, labels, count = ground_truth(device, [30, 5], 30)
        boxes = boxes + torch.tensor([-shift, shift, -shift, shift], device=device)
        assert_equals_reference(device, moved, (boxes, labels, count))


class TestRules:
    """One point at the centre of an anchor of 8 x 8 pixels, on a single level unless sizes are given."""

    def test_centre_sampling_is_exclusive(self, device):
        # The box's centre is at (50, 50), so the point must be less than 12 pixels away in x and in y.
        box = [10.0, 10, 90, 90]
        for x, y, taken in ((61.5, 61.5, True), (62, 50, False), (50, 38, False), (38.5, 61.5, True)):
            assert assign_one(device, (x, y), box) is taken
            assert assign_one(device, (x, y), box, radius=None)
            assert assign_one(device, (x, y), box, radius=math.inf)
        assert assign_one(device, (62, 62), box, radius=1.51) and not assign_one(device, (50, 50), box, radius=0.0)

    def test_a_point_on_a_side_is_not_inside(self, device):
        box = [40.0, 46, 48, 54]
        for x, y, taken in ((40.5, 50, True), (40, 50, False), (48, 50, False), (44, 46, False), (44, 53.5, True)):
            assert assign_one(device, (x, y), box) is taken

    @pytest.mark.parametrize("distance", (32.0, 64.0))
    @pytest.mark.parametrize("change", (-0.5, 0.0, 0.5))
    def test_range_of_the_level_is_exclusive(self, device, distance, change):
        # The point is 4 pixels from three sides, and `distance` from the fourth. Each level has two points.
        for side in range(4):
            reach = [4.0, 4.0, 4.0, 4.0]
            reach[side] = distance + change
            box = [50 - reach[0], 50 - reach[1], 50 + reach[2], 50 + reach[3]]
            middle = (distance + change > 32) and (distance + change < 64)
            first, last = distance + change < 64, distance + change > 32
            taken = assign_one(device, (50, 50), box, radius=None, level_sizes=[2, 2, 2])
            assert taken == [first] * 2 + [middle] * 2 + [last] * 2

    def test_a_single_level_has_no_bounds(self, device):
        for side in (0.5, 4000.0):
            assert assign_one(device, (50, 50), [50 - side, 50 - side, 50 + side, 50 + side])

    def test_the_smallest_box_takes_the_point_and_ties_go_to_the_first(self, device):
        boxes = torch.tensor([[[0.0, 0, 40, 40], [4, 4, 36, 36], [10, 0, 30, 40], [0, 10, 40, 30]]], device=device)
        labels = torch.tensor([[3, 4, 5, 6]], device=device)
        anchor = torch.tensor([[16.0, 16, 24, 24]], device=device)
        for order, winner in (((0, 1, 2, 3), 2), ((3, 2, 1, 0), 0), ((0, 1, 3, 2), 2), ((1, 0, 0, 1), 0)):
            truth = boxes[:, list(order)], labels[:, list(order)], torch.tensor([4], device=device)
            targets = assert_equals_reference(device, anchor, truth)
            assert targets.matches.item() == winner and targets.labels.item() == labels[0, order[winner]]

    def test_float32_areas_within_4_pixels_may_tie(self, device):
        # 1e8 - area is a multiple of 8 in float32: 1600 and 1602 both become 99998400.
        boxes = torch.tensor([[[0.0, 0, 40, 40.05], [0, 0, 40, 40]]], device=device)
        anchor, labels = torch.tensor([[16.0, 16, 24, 24]], device=device), torch.zeros(1, 2, device=device).long()
        count = torch.tensor([2], device=device)
        assert assert_equals_reference(device, anchor, (boxes, labels, count)).matches.item() == 0
        assert assert_equals_reference(device, anchor, (boxes.double(), labels, count)).matches.item() == 1

    def test_a_box_of_1e8_pixels_takes_no_point(self, device):
        for side, taken in ((4999.0, True), (5000.0, False), (20_000.0, False)):
            assert assign_one(device, (50, 50), [50 - side, 50 - side, 50 + side, 50 + side]) is taken


class TestEdgeCases:
    def test_degenerate_boxes_and_anchors(self, device):
        count = torch.tensor([9], device=device)
        truth = DEGENERATE_BOXES[None].to(device), torch.zeros(1, 9, dtype=torch.int64, device=device), count
        for anchors in (point_grid(device), point_grid(device).boxes(), DEGENERATE_BOXES.to(device)):
            for radius in (1.5, None):
                targets = assert_equals_reference(device, anchors, truth, radius=radius)
                assert (targets.matches == -1).all() and targets.num_positive.item() == 0

    def test_count_is_clamped(self, device):
        boxes, labels, _ = ground_truth(device, [3, 3, 3], 3, min_side=20.0)
        counts = torch.tensor([-5, 99, 1], device=device)
        clamped = ops.assign_points(point_grid(device), boxes, labels, counts)
        expected = ops.assign_points(point_grid(device), boxes, labels, torch.tensor([0, 3, 1], device=device))
        assert all(torch.equal(a, b) for a, b in zip(clamped, expected, strict=True))
        assert clamped.num_positive[0] == 0

    def test_empty_batch_and_empty_levels(self, device):
        truth = ground_truth(device, [], 3)
        targets = ops.assign_points(point_grid(device), *truth)
        assert targets.matches.shape == (0, sum(LEVEL_SIZES)) and targets.num_positive.shape == (0,)
        base = torch.tensor([[-4.0, -4, 4, 4], [-8, -8, 8, 8], [-16, -16, 16, 16]], device=device)
        for sizes in (((0, 5), (7, 9), (4, 5)), ((7, 9), (4, 0), (0, 0)), ((0, 0),) * 3):
            grid = AnchorGrid(base, (1, 1, 1), sizes, ((8.0, 8.0), (16.0, 16.0), (32.0, 32.0)), ((0.0, 0.0),) * 3)
            assert_equals_reference(device, grid, ground_truth(device, [20, 5], 20))

    def test_strided_and_unaligned(self, device):
        anchors = random_boxes(300, min_side=4.0, max_side=16.0).to(device)
        boxes, labels, count = ground_truth(device, [9, 4], 9)
        expected = ops.assign_points(anchors, boxes, labels, count)
        wide = torch.stack((boxes, boxes), dim=-1)[..., 0]
        for changed in ((unaligned(anchors), unaligned(boxes)), (anchors.t().contiguous().t(), wide)):
            actual = ops.assign_points(*changed, labels.t().contiguous().t(), count)
            assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))

    def test_label_and_count_dtypes(self, device):
        boxes, labels, count = ground_truth(device, [9, 4], 9)
        expected = ops.assign_points(point_grid(device), boxes, labels, count)
        actual = ops.assign_points(point_grid(device), boxes, labels.to(torch.uint8), count.int())
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))

    def test_integer_anchors(self, device):
        anchors = point_grid(device).boxes()
        truth = ground_truth(device, [9, 4], 9)
        for options in ({}, {"level_sizes": LEVEL_SIZES}):
            expected = ops.assign_points(anchors, *truth, **options)
            assert torch.equal(ops.assign_points(anchors.int(), *truth, **options).matches, expected.matches)


class TestErrors:
    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"anchors": [1]}, TypeError, "anchors must be a tensor or an AnchorGrid, got list"),
            ({"anchors": torch.zeros(6, 3)}, ValueError, r"anchors must have shape \[A, 4\] or \[N, A, 4\]"),
            ({"anchors": torch.zeros(3, 6, 4)}, ValueError, r"anchors must have shape \[A, 4\] or \[2, A, 4\]"),
            ({"gt_boxes": torch.zeros(2, 3)}, ValueError, r"gt_boxes must have shape \[N, M, 4\], got \[2, 3\]"),
            ({"gt_boxes": torch.zeros(2, 3, 4).int()}, TypeError, "gt_boxes must be float16, .* got torch.int32"),
            ({"gt_labels": torch.zeros(2, 2).int()}, ValueError, r"gt_labels must have shape \[2, 3\], got \[2, 2\]"),
            ({"gt_labels": torch.zeros(2, 3)}, TypeError, "gt_labels must be an integer tensor, got torch.float32"),
            ({"gt_count": torch.zeros(3).int()}, ValueError, r"gt_count must have shape \[2\], got \[3\]"),
            ({"gt_count": torch.zeros(2)}, TypeError, "gt_count must be an integer tensor, got torch.float32"),
            ({"gt_count": torch.zeros(2, device="meta").int()}, ValueError, "gt_count must be on gt_boxes's device"),
            ({"level_sizes": [2, 3]}, ValueError, r"level_sizes must add up to the 6 anchors, got \[2, 3\]"),
            ({"level_sizes": []}, ValueError, r"level_sizes must add up to the 6 anchors, got \[\]"),
            ({"level_sizes": [7, -1]}, ValueError, "level_sizes must not be negative, got -1"),
            ({"level_sizes": [6.0]}, TypeError, "level_sizes must be an integer, got 6.0"),
            ({"anchors": point_grid(), "level_sizes": [6]}, ValueError, "level_sizes must be None with an AnchorGrid"),
            ({"radius": -1.0}, ValueError, "radius must not be negative, got -1.0"),
            ({"radius": "1"}, TypeError, "radius must be a number, got '1'"),
            ({"distance_range": 4.0}, TypeError, "distance_range must be a pair of numbers, got 4.0"),
            ({"distance_range": (4.0, math.inf)}, ValueError, "distance_range must be finite, got inf"),
            ({"distance_range": (8.0, 4.0)}, ValueError, r"distance_range must be two ascending numbers from 0 on"),
            ({"distance_range": (-1.0, 4.0)}, ValueError, r"distance_range must be two ascending numbers from 0 on"),
        ],
    )
    def test_message_names_the_argument(self, change, error, message):
        arguments = {
            "anchors": torch.zeros(6, 4),
            "gt_boxes": torch.zeros(2, 3, 4),
            "gt_labels": torch.zeros(2, 3).int(),
            "gt_count": torch.zeros(2).int(),
        } | change
        with pytest.raises(error, match=f"assign_points: {message}"):
            ops.assign_points(**arguments)

    def test_direct_call_of_the_op(self, device):
        op = torch.ops.retinanet_ops.assign_points
        anchors, boxes = torch.zeros(6, 4, device=device), torch.zeros(2, 3, 4, device=device)
        labels = torch.zeros(2, 3, device=device, dtype=torch.int64)
        good = [anchors, [], [], [2, 4], boxes, labels, labels[:, 0], 1.5, 4.0, 8.0]
        op(*good)
        for index, value, message in (
            (0, anchors[:, :3], "anchors must have shape"),
            (0, anchors.double(), "anchors must be Float"),
            (0, anchors.expand(3, 6, 4), "anchors must have shape"),
            (3, [2, 3], "level_sizes must add up to the 6 anchors"),
            (3, [2, 5, -1], "level_sizes must add up to the 6 anchors"),
            (3, [-1, 7], "level_sizes must add up to the 6 anchors"),
            (4, boxes[0], "gt_boxes must have shape"),
            (5, labels[:, :2], "gt_labels must have shape"),
            (5, labels.int(), "gt_labels must be Long"),
            (6, labels[0], "gt_count must have shape"),
            (6, labels[:, 0].int(), "gt_count must be Long"),
        ):
            with pytest.raises(RuntimeError, match=f"assign_points: .*{message}"):
                op(*good[:index], value, *good[index + 1 :])
        grid = point_grid(device).arguments()
        with pytest.raises(RuntimeError, match="empty with a grid"):
            op(*grid, LEVEL_SIZES, *good[4:])


class TestCompile:
    def test_opcheck(self, device):
        truth = ground_truth(device, [9, 4], 9)
        for anchors in (point_grid(device).arguments(), (random_boxes(20).to(device), [], [])):
            sizes = [] if anchors[1] else [5, 15]
            opcheck(torch.ops.retinanet_ops.assign_points, (*anchors, sizes, *truth, 1.5, 4.0, 8.0))

    def test_compiles_in_one_graph(self, device):
        base = point_grid(device)

        def function(features, *truth):
            sizes = tuple((f.shape[-2], f.shape[-1]) for f in features)
            grid = AnchorGrid(base.base_anchors, base.anchors_per_cell, sizes, base.strides, base.offsets)
            level_sizes = [h * w for h, w in sizes]
            on_boxes = ops.assign_points(grid.boxes(), *truth, level_sizes=level_sizes, radius=2)
            return (*ops.assign_points(grid, *truth), *on_boxes)

        compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
        for scale in (1, 2):
            features = [torch.zeros(1, h * scale, w, device=device) for h, w in GRID_SIZES]
            truth = ground_truth(device, [5, 2], 5 + scale)
            for a, b in zip(compiled(features, *truth), function(features, *truth), strict=True):
                assert torch.equal(a, b)

    def test_results_have_no_gradient(self, device):
        boxes, labels, count = ground_truth(device, [9, 4], 9)
        targets = ops.assign_points(point_grid(device), boxes.requires_grad_(), labels, count)
        assert not any(t.requires_grad for t in targets)
