"""Reference of FCOS's assignment of points: all pairs of an image at once."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..anchors import AnchorGrid, as_boxes
from ..constants import BACKGROUND
from ..types import Targets, compute_dtype


def assign_points(
    anchors: Tensor | AnchorGrid,  # [A, 4] or [N, A, 4]
    gt_boxes: Tensor,  # [N, M, 4]
    gt_labels: Tensor,  # [N, M] integer
    gt_count: Tensor,  # [N]
    *,
    level_sizes: Sequence[int] | None = None,
    radius: float | None = 1.5,
    distance_range: tuple[float, float] = (4.0, 8.0),
) -> Targets:
    """Assign points to ground truth; see `retinanet_ops.assign_points`."""
    boxes = as_boxes(anchors)
    dtype = compute_dtype(boxes, gt_boxes)
    boxes, gt_boxes = boxes.to(dtype), gt_boxes.to(dtype)
    if isinstance(anchors, AnchorGrid):
        level_sizes = [h * w * a for (h, w), a in zip(anchors.grid_sizes, anchors.anchors_per_cell, strict=True)]
    batch, num_gt = gt_boxes.shape[:2]
    count, device = boxes.shape[-2], boxes.device
    first, last = (level_sizes[0], level_sizes[-1]) if level_sizes else (count, count)
    reach, low, high = torch.tensor(
        [math.inf if radius is None else radius, *distance_range], dtype=dtype, device=device
    )
    matches = torch.full((batch, count), BACKGROUND, dtype=torch.int32, device=device)
    labels = matches.clone()
    for n in range(batch):
        image_anchors = boxes[n] if boxes.dim() == 3 else boxes
        points = (image_anchors[:, None, :2] + image_anchors[:, None, 2:]) / 2  # [A, 1, 2]
        width = image_anchors[:, 2] - image_anchors[:, 0]  # [A]
        lower, upper = width * low, width * high
        lower[:first] = 0
        upper[count - last :] = math.inf
        truth = gt_boxes[n]  # [M, 4]
        sides = truth[:, 2:] - truth[:, :2]
        rank = 1e8 - sides[:, 0] * sides[:, 1]  # [M]
        valid = ((sides > 0) & (sides < math.inf)).all(-1) & (torch.arange(num_gt, device=device) < gt_count[n])
        centres = (truth[:, :2] + truth[:, 2:]) / 2
        sampled = ((points - centres).abs() < (reach * width)[:, None, None]).all(-1)  # [A, M]
        distances = torch.cat((points - truth[:, :2], truth[:, 2:] - points), dim=-1)  # [A, M, 4]
        largest = distances.amax(-1)
        passes = sampled & (distances > 0).all(-1) & (largest > lower[:, None]) & (largest < upper[:, None])
        passes &= valid & (rank >= 1e-5)
        # An extra column keeps max() defined without ground truth.
        best, index = torch.nn.functional.pad(torch.where(passes, rank, 0.0), (0, 1)).max(dim=1)
        matches[n] = torch.where(best > 0, index, BACKGROUND)
        of_match = torch.nn.functional.pad(gt_labels[n], (0, 1))[index].to(torch.int32)
        labels[n] = torch.where(best > 0, of_match, BACKGROUND)
    return Targets(matches, labels, (matches >= 0).sum(1, dtype=torch.int32))
