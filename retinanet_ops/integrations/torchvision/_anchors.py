"""Anchors of torchvision's generators, in the form that the ops take."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.image_list import ImageList

import retinanet_ops as ops
from retinanet_ops.types import compute_dtype

from ._own_code import is_own, runs_as_written


def anchors_of(
    generator: Any,
    batch: ImageList,
    features: list[Tensor],  # L tensors [N, C, H, W]
) -> Tensor | ops.AnchorGrid:  # [N, A, 4]
    """Return a grid for torchvision's `AnchorGenerator`, and the boxes themselves for any other generator."""
    is_grid = runs_as_written(generator, AnchorGenerator)
    is_grid &= all(is_own(generator, name, AnchorGenerator) for name in ("grid_anchors", "set_cell_anchors"))
    # torchvision raises for a wrong number of levels.
    if not is_grid or len(generator.cell_anchors) != len(features):
        return torch.stack(list(generator(batch, features)))
    generator.set_cell_anchors(generator.cell_anchors[0].dtype, features[0].device)
    height, width = batch.tensors.shape[-2:]
    return ops.AnchorGrid.from_base_anchors(
        [base.to(torch.float32) for base in generator.cell_anchors],
        [(level.shape[-2], level.shape[-1]) for level in features],
        image_size=(height, width),
    )


def default_boxes_of(
    generator: Any,
    batch: ImageList,
    features: list[Tensor],  # L tensors [N, C, H, W]
) -> Tensor:  # [A, 4], or [N, A, 4] for a generator that is not torchvision's
    """Return the boxes of SSD's generator. Those of torchvision's `DefaultBoxGenerator` are the same in all images."""
    is_shared = runs_as_written(generator, DefaultBoxGenerator)
    if not is_shared or not is_own(generator, "_grid_default_boxes", DefaultBoxGenerator):
        return torch.stack(list(generator(batch, features)))
    sizes = [level.shape[-2:] for level in features]
    height, width = batch.tensors.shape[-2:]
    # torchvision computes in the dtype of the features, which may be half precision.
    boxes = generator._grid_default_boxes(sizes, (height, width), dtype=compute_dtype(features[0]))
    centre, half = boxes[:, :2], 0.5 * boxes[:, 2:]
    corners = torch.cat((centre - half, centre + half), dim=1) * boxes.new_tensor([width, height] * 2)
    return corners.to(features[0].device, non_blocking=True)
