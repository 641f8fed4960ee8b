"""Hard negative mining among the anchors of SSD and of RetinaNet."""

import pytest
import torch
from torch import Tensor

import retinanet_ops as ops
from retinanet_ops import reference


def two_sorts(loss: Tensor, labels: Tensor) -> Tensor:
    """Select the hard negatives as torchvision's SSD does, with ranks from two sorts."""
    positive = labels >= 0
    rank = torch.where(positive, -torch.inf, loss).argsort(1, descending=True).argsort(1)
    return rank < 3 * positive.sum(1, keepdim=True)


@pytest.mark.parametrize("row", ("ours", "two sorts", "two sorts compiled"))
@pytest.mark.parametrize(("images", "anchors"), ((16, 8732), (2, 201_600)))
def test_hard_negative_mask(compare, device, images, anchors, row):
    loss = (torch.randperm(images * anchors).view(images, anchors) / (images * anchors)).to(device)
    labels = torch.where(torch.rand(images, anchors) < 0.005, 0, -1).to(device)
    function = {
        "ours": ops.hard_negative_mask,
        "two sorts": two_sorts,
        "two sorts compiled": torch.compile(two_sorts),
    }[row]
    compare(
        row,
        lambda: function(loss, labels),
        reference.hard_negative_mask(loss, labels),
        bytes_moved=loss.numel() * (4 + 8 + 1),
        group=f"hard negatives, {images} x {anchors:,} anchors, float32",
    )
