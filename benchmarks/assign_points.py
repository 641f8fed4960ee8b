"""Assignment of the points of one COCO image to ground truth, as in FCOS."""

from types import SimpleNamespace

import pytest
import torch
from harness import COCO_GRIDS, COCO_SIZE, ground_truth

import retinanet_ops as ops
from retinanet_ops import AnchorGrid, reference

STRIDES = (8, 16, 32, 64, 128)


@pytest.mark.parametrize("row", ("ours", "ours, explicit anchors", "torchvision", "torch.compile"))
@pytest.mark.parametrize("num_gt", (7, 100, 300))
def test_assign_points(compare, device, num_gt, row):
    sizes = tuple((float(stride),) for stride in STRIDES)
    grid = AnchorGrid.torchvision(COCO_GRIDS, COCO_SIZE, sizes, ((1.0,),) * len(sizes), device=device)
    anchors, level_sizes = grid.boxes(), [h * w for h, w in COCO_GRIDS]
    boxes, count = ground_truth(num_gt, device)[None], torch.tensor([num_gt], device=device)
    labels = torch.zeros(1, num_gt, dtype=torch.int64, device=device)
    compiled = torch.compile(reference.assign_points) if row == "torch.compile" else None

    def torchvision_assignment() -> torch.Tensor:
        from torchvision.models.detection import FCOS

        # A head that returns the assignment instead of losses, and the model that `compute_loss` expects.
        head = SimpleNamespace(compute_loss=lambda targets, head_outputs, anchors, matched_idxs: matched_idxs)
        model = SimpleNamespace(head=head, center_sampling_radius=1.5)
        return FCOS.compute_loss(model, [{"boxes": boxes[0]}], None, [anchors], level_sizes)[0][None]

    if row == "torchvision":
        pytest.importorskip("torchvision")
    function = {
        "ours": lambda: ops.assign_points(grid, boxes, labels, count).matches,
        "ours, explicit anchors": lambda: (
            ops.assign_points(anchors, boxes, labels, count, level_sizes=level_sizes).matches
        ),
        "torchvision": torchvision_assignment,
        "torch.compile": lambda: compiled(grid, boxes, labels, count).matches,
    }[row]

    def check(actual: torch.Tensor, expected: torch.Tensor) -> None:
        assert torch.equal(actual.int(), expected)

    compare(
        row,
        function,
        reference.assign_points(grid, boxes, labels, count).matches,
        check=check,
        # 4 bytes per match and per label written, and 16 per explicit anchor read.
        bytes_moved=(8 if row == "ours" else 24) * grid.num_anchors,
        group=f"assignment of {grid.num_anchors:,} points, {num_gt} ground truths, float32",
    )
