"""GIoU and CIoU losses of pairs of boxes, with gradients of the predictions: a batch's positives, and a million."""

import pytest
import torch
from focal_loss import with_gradients
from harness import ground_truth

import retinanet_ops as ops
from retinanet_ops import reference


@pytest.mark.parametrize("row", ("ours", "torchvision", "torch.compile"))
@pytest.mark.parametrize("name", ("generalized_box_iou_loss", "complete_box_iou_loss"))
@pytest.mark.parametrize("count", (2_000, pytest.param(1_000_000, marks=pytest.mark.full)))
def test_box_iou_loss(compare, device, count, name, row):
    gt = ground_truth(count, device)
    # Moved and enlarged, so that no prediction is inverted.
    boxes = gt + (torch.randn(count, 2) * 4).repeat(1, 2).to(device)
    boxes = boxes + torch.rand_like(gt) * torch.tensor((-4.0, -4.0, 4.0, 4.0), device=device)
    if row == "torchvision":
        torchvision = pytest.importorskip("torchvision")
    loss = getattr(torchvision.ops if row == "torchvision" else ops if row == "ours" else reference, name)

    def summed(boxes):
        return loss(boxes, gt, reduction="sum")

    if row == "torch.compile":
        summed = torch.compile(summed)
    compare(
        row,
        lambda: with_gradients(summed, [boxes]),
        with_gradients(lambda boxes: getattr(reference, name)(boxes, gt, "sum"), [boxes]),
        check=lambda actual, expected: torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-5),
        # The boxes are read twice, and each loss and each gradient is written once.
        bytes_moved=(4 * 16 + 4 + 16) * count,
        group=f"{name}, forward + backward, {count:,} pairs, float32",
    )
