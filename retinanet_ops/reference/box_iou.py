"""Reference of the pairwise IoU, GIoU, DIoU and CIoU of two sets of boxes."""

from __future__ import annotations

import torch
from torch import Tensor

from .._box_formats import corners
from ..types import iou_dtypes
from ._overlaps import intersection_and_union, iou_like


def box_iou(
    boxes1: Tensor,  # [..., M, 4]
    boxes2: Tensor,  # [..., N, 4]
    fmt: str = "xyxy",
) -> Tensor:  # [..., M, N]
    """Return the IoU of every pair of boxes; see `retinanet_ops.box_iou`."""
    dtype, result = iou_dtypes(boxes1, boxes2)
    boxes1, boxes2 = corners(boxes1.to(dtype), fmt), corners(boxes2.to(dtype), fmt)
    inter, union = intersection_and_union(boxes1[..., None, :], boxes2[..., None, :, :])
    return torch.where(inter > 0, inter / torch.where(inter > 0, union, 1.0), 0.0).nan_to_num(nan=0.0).to(result)


def generalized_box_iou(
    boxes1: Tensor,  # [..., M, 4]
    boxes2: Tensor,  # [..., N, 4]
) -> Tensor:  # [..., M, N]
    """Return the GIoU of every pair of boxes; see `retinanet_ops.generalized_box_iou`."""
    return _pairwise(boxes1, boxes2, "giou")


def distance_box_iou(
    boxes1: Tensor,  # [..., M, 4]
    boxes2: Tensor,  # [..., N, 4]
    eps: float = 0.0,
) -> Tensor:  # [..., M, N]
    """Return the DIoU of every pair of boxes; see `retinanet_ops.distance_box_iou`."""
    return _pairwise(boxes1, boxes2, "diou", eps)


def complete_box_iou(
    boxes1: Tensor,  # [..., M, 4]
    boxes2: Tensor,  # [..., N, 4]
    eps: float = 0.0,
) -> Tensor:  # [..., M, N]
    """Return the CIoU of every pair of boxes; see `retinanet_ops.complete_box_iou`."""
    return _pairwise(boxes1, boxes2, "ciou", eps)


def _pairwise(
    boxes1: Tensor,  # [..., M, 4]
    boxes2: Tensor,  # [..., N, 4]
    kind: str,
    eps: float = 0.0,
) -> Tensor:  # [..., M, N]
    """Return an IoU-like measure of every pair of boxes in the compute dtype."""
    dtype, result = iou_dtypes(boxes1, boxes2)
    return iou_like(boxes1.to(dtype)[..., None, :], boxes2.to(dtype)[..., None, :, :], kind, eps).to(result)
