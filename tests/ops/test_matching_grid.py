"""Matching on an `AnchorGrid` gives the same matches as on its boxes, wherever its cells lie."""

import pytest
import torch
from matching_cases import assert_equals_reference, padded, small_grid

import retinanet_ops as ops
from retinanet_ops import AnchorGrid, MatchRule
from retinanet_ops.constants import LOW_QUALITY_RULES


@pytest.mark.parametrize("low_quality", LOW_QUALITY_RULES)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_equals_its_boxes(device, dtype, low_quality):
    grid = small_grid(device)
    gt_boxes, gt_count = (t.to(device) for t in padded([5, 30], 30, size=120.0, max_side=80.0))
    gt_boxes = gt_boxes.to(dtype)
    from_grid = ops.match_anchors(grid, gt_boxes, gt_count, rule=MatchRule(low_quality=low_quality))
    from_boxes = ops.match_anchors(grid.boxes(), gt_boxes, gt_count, rule=MatchRule(low_quality=low_quality))
    assert torch.equal(from_grid, from_boxes)
    assert_equals_reference(device, grid, gt_boxes, gt_count, rule=MatchRule(low_quality=low_quality))


@pytest.mark.parametrize("low_quality", LOW_QUALITY_RULES)
@pytest.mark.parametrize(
    "strides",
    ((0.0, 8.0), (8.0, 0.0), (-8.0, 8.0), (8.0, -8.0), (-1.3, 2.7), (2.7, -1.3), (1e-3, 8.0), (8.0, 4e5)),
)
def test_unusual_strides(device, strides, low_quality):
    # With fractional coordinates, rounding decides which of the anchors that contain a box has the best IoU.
    base = torch.tensor([[-8.3, -6.1, 8, 6], [-31, -29.7, 33.3, 29], [-1e-9, -5, 1e-9, 5], [-5, 2, 5, 2]])
    base = base.to(device)
    # With a negative stride, the first cell lies at the far end, so that the other cells still meet the boxes.
    offsets = tuple(90.0 if stride < 0 else 0.0 for stride in strides)
    grid = AnchorGrid(base, (4,), ((11, 13),), (strides,), (offsets,))
    gt_boxes, gt_count = (t.to(device) for t in padded([40, 9], 40, size=100.0, max_side=30.0))
    matches = assert_equals_reference(device, grid, gt_boxes, gt_count, rule=MatchRule(low_quality=low_quality))
    assert torch.equal(
        matches, ops.match_anchors(grid.boxes(), gt_boxes, gt_count, rule=MatchRule(low_quality=low_quality))
    )


@pytest.mark.parametrize("low_quality", LOW_QUALITY_RULES)
@pytest.mark.parametrize("scale", (2.0**-60, 2.0**-74, 2.0**-78, 2.0**20))
def test_areas_near_the_limits_of_float32(device, scale, low_quality):
    grid = small_grid(device)
    steps = [tuple((y * scale, x * scale) for y, x in rows) for rows in (grid.strides, grid.offsets)]
    scaled = AnchorGrid(grid.base_anchors * scale, grid.anchors_per_cell, grid.grid_sizes, *steps)
    gt_boxes, gt_count = (t.to(device) for t in padded([30, 5], 30, size=120.0, max_side=80.0))
    arguments = (gt_boxes * scale, gt_count)
    matches = ops.match_anchors(scaled, *arguments, rule=MatchRule(low_quality=low_quality))
    assert torch.equal(matches, ops.match_anchors(scaled.boxes(), *arguments, rule=MatchRule(low_quality=low_quality)))


@pytest.mark.parametrize("width", (17, 16, 257))
@pytest.mark.parametrize("low_quality", LOW_QUALITY_RULES)
def test_levels_of_one_block_of_anchors_or_one_fewer_or_more(device, width, low_quality):
    # The CUDA kernels take 256 anchors of a level at a time. A ground truth lies where one more row would begin.
    height = 257 // width
    base = torch.tensor([[-4.0, -4, 4, 4], [-16, -16, 16, 16]], device=device)
    grid = AnchorGrid(base, (1, 1), ((height, width), (3, 5)), ((8.0, 8.0), (32.0, 32.0)), ((0.0, 0.0),) * 2)
    gt_boxes, gt_count = (t.to(device) for t in padded([12], 12, size=8.0 * width, max_side=30.0))
    gt_boxes[0, 3] = torch.tensor([-4.0, 8 * height - 4, 4, 8 * height + 4])
    labels = torch.zeros(1, 12, dtype=torch.int64, device=device)
    rule = MatchRule(low_quality=low_quality)
    from_grid = ops.assign_targets(grid, gt_boxes, labels, gt_count, rule=rule)
    from_boxes = ops.assign_targets(grid.boxes(), gt_boxes, labels, gt_count, rule=rule)
    assert torch.equal(from_grid.matches, from_boxes.matches)
    assert from_grid.num_positive.item() == from_boxes.num_positive.item() == (from_grid.matches >= 0).sum()
    assert_equals_reference(device, grid, gt_boxes, gt_count, rule=rule)


@pytest.mark.parametrize("empty", ((0, 5), (5, 0), (0, 0)))
def test_empty_levels_hold_no_best_anchor(device, empty):
    # An anchor one cell before the first cell of the empty level would equal the ground truth.
    base = torch.tensor([[-8.0, -8, 8, 8], [-11, -8, 5, 8]], device=device)
    grid = AnchorGrid(base, (1, 1), (empty, (2, 2)), ((8.0, 8.0),) * 2, ((8.0, 8.0),) * 2)
    gt_boxes = torch.tensor([[[-8.0, -8, 8, 8]], [[-8, 0, 8, 16]], [[0, -8, 16, 8]]], device=device)
    count = torch.ones(3, dtype=torch.int64, device=device)
    matches = ops.match_anchors(grid, gt_boxes, count)
    assert torch.equal(matches, ops.match_anchors(grid.boxes(), gt_boxes, count))
    assert (matches == 0).any(1).all()


@pytest.mark.parametrize("low_quality", LOW_QUALITY_RULES)
@pytest.mark.parametrize("shapes", (((1, 1), (1, 255)), ((256, 1), (0, 3), (1, 257)), ((19, 27), (3, 171), (16, 48))))
def test_levels_of_any_size_beside_a_block(device, shapes, low_quality):
    # A CUDA block takes up to 256 anchors of one level. Here it holds a whole level, a part of a row, or many rows.
    base = torch.tensor([[-9.0, -5, 8, 6], [-3, -7, 4.5, 9]]).to(device)
    for per_cell in (1, 2):
        levels = len(shapes)
        bases = (
            base[:per_cell].repeat(levels, 1)
            * torch.arange(1, levels + 1, device=device).repeat_interleave(per_cell)[:, None]
        )
        grid = AnchorGrid(bases, (per_cell,) * levels, shapes, ((3.0, 2.5),) * levels, ((-1.0, 2.0),) * levels)
        near_anchors = grid.boxes()[torch.randint(0, grid.num_anchors, (2, 150), device=device)]
        gt_boxes = near_anchors + 6 * torch.rand(2, 150, 4, device=device)
        gt_count = torch.tensor([150, 30], device=device)
        rule = MatchRule(0.6, 0.3, low_quality=low_quality)
        matches = assert_equals_reference(device, grid, gt_boxes, gt_count, rule=rule)
        assert torch.equal(matches, ops.match_anchors(grid.boxes(), gt_boxes, gt_count, rule=rule))
        assert (matches >= 0).any() and (matches == -2).any()


@pytest.mark.parametrize("low_quality", LOW_QUALITY_RULES[:2])
@pytest.mark.parametrize(("best", "count"), ((0, 40), (31, 40), (32, 40), (39, 40), (32, 33)))
def test_any_of_many_base_anchors_may_be_the_best(device, best, count, low_quality):
    # The others, which are tiny, have lower IoUs. All are below the thresholds, so that only the best promotes anchors.
    base = torch.tensor([[-2.0, -2, 2, 2]]).repeat(count, 1)
    base[best] = torch.tensor([-15.0, -15, 15, 15])
    grid = AnchorGrid(base.to(device), (17, count - 17), ((6, 7), (6, 7)), ((8.0, 8.0),) * 2, ((4.0, 4.0),) * 2)
    gt_boxes = torch.tensor([[[6.0, 6, 50, 40]]], device=device)
    rule = MatchRule(low_quality=low_quality)
    matches = assert_equals_reference(device, grid, gt_boxes, torch.tensor([1], device=device), rule=rule)
    level, place = (matches[:, : 17 * 42].view(42, 17), best) if best < 17 else (matches[:, 17 * 42 :], best - 17)
    promoted = level.reshape(42, -1) >= 0
    assert promoted[:, place].any() and promoted.sum() == (matches >= 0).sum() == promoted[:, place].sum()


@pytest.mark.parametrize("low_quality", LOW_QUALITY_RULES[:2])
@pytest.mark.parametrize("shape", ((70.0, 28.0), (28.0, 70.0), (75.0, 75.0)), ids=("one row", "one column", "several"))
@pytest.mark.parametrize("count", (3, 33))
def test_rounding_decides_which_cell_is_best(device, count, shape, low_quality):
    # Each ground truth contains the anchors of several cells of the last base anchor along one axis or both. Their IoUs
    # differ by roundings, and the best anchor need not be the one whose centre is nearest.
    base = torch.tensor([[-2.0, -2, 2, 2]]).repeat(count, 1)
    base[-1] = torch.tensor([-13.3, -13.7, 13.1, 13.9])
    grid = AnchorGrid(base.to(device), (count,), ((11, 12),), ((8.3, 8.7),), ((4.1, 3.7),))
    corner = torch.rand(1, 40, 2) * torch.tensor([30.0, 25.0])
    gt_boxes = torch.cat((corner, corner + torch.tensor(shape) + torch.rand(1, 40, 2)), dim=2).to(device)
    gt_count = torch.tensor([40], device=device)
    rule = MatchRule(low_quality=low_quality)
    matches = assert_equals_reference(device, grid, gt_boxes, gt_count, rule=rule)
    boxes, ious = grid.boxes(), ops.box_iou(gt_boxes[0], grid.boxes())
    best = ious.argmax(dim=1)
    nearest = (boxes[:, :2] + boxes[:, 2:] - (gt_boxes[0, :, None, :2] + gt_boxes[0, :, None, 2:])).norm(dim=2)
    nearest[:, torch.arange(len(boxes), device=device) % count != count - 1] = torch.inf
    assert (best % count == count - 1).all() and (ious.gather(1, nearest.argmin(1)[:, None])[:, 0] < ious.amax(1)).any()
    assert (matches >= 0).any()


@pytest.mark.parametrize("transposed", (False, True))
def test_rounding_gives_a_negative_number_of_cells(device, transposed):
    # Along one axis, the first base anchor has the size of the ground truth, and the IoU of the second is the largest
    # that the first could just reach. The bounds of the cells in which it might reach this IoU are rounded past each
    # other, so that a row or a column has -1 of them.
    base = torch.tensor(
        [
            [-12.786998748779297, -15.95279598236084, 12.786998748779297, 15.95279598236084],
            [-10.815605163574219, -15.015674591064453, 6.425955772399902, 15.015674591064453],
        ],
    )
    gt_boxes = torch.tensor([[[23.720529556274414, 20.14720344543457, 44.089820861816406, 52.05279541015625]]])
    if transposed:
        base, gt_boxes = base[:, [1, 0, 3, 2]], gt_boxes[:, :, [1, 0, 3, 2]]
    grid = AnchorGrid(base.to(device), (2,), ((16, 16),), ((8.0, 8.0),), ((4.1, 4.1),))
    count = torch.tensor([1], device=device)
    matches = assert_equals_reference(device, grid, gt_boxes.to(device), count, rule=MatchRule(0.9, 0.9))
    assert (matches >= 0).sum() == 1


@pytest.mark.parametrize("bad", (torch.inf, -torch.inf, torch.nan))
def test_base_anchors_that_are_not_finite_leave_the_others(device, bad):
    base = torch.tensor([[-8.0, -8, 8, 8]]).repeat(5, 1)
    base[range(1, 5), range(4)] = bad
    grid = AnchorGrid(base.to(device), (5,), ((9, 11),), ((8.0, 8.0),), ((0.0, 0.0),))
    gt_boxes, gt_count = (t.to(device) for t in padded([20, 20], 20, size=80.0, max_side=30.0))
    matches = assert_equals_reference(device, grid, gt_boxes, gt_count)
    assert (matches.view(2, 99, 5)[..., 0] >= 0).any() and (matches.view(2, 99, 5)[..., 1:] == -1).all()
