"""Reference of the GIoU, DIoU and CIoU losses of pairs of boxes."""

from __future__ import annotations

from torch import Tensor

from .._reduction import reduced
from ..types import iou_dtypes
from ._overlaps import iou_like


def generalized_box_iou_loss(
    boxes1: Tensor,  # [..., 4]
    boxes2: Tensor,  # [..., 4]
    reduction: str = "none",
    eps: float = 0.0,
) -> Tensor:  # [...] or []
    """Return 1 minus the GIoU of each pair of boxes; see `retinanet_ops.generalized_box_iou_loss`."""
    return _loss("generalized_box_iou_loss", boxes1, boxes2, "giou", reduction, eps)


def distance_box_iou_loss(
    boxes1: Tensor,  # [..., 4]
    boxes2: Tensor,  # [..., 4]
    reduction: str = "none",
    eps: float = 0.0,
) -> Tensor:  # [...] or []
    """Return 1 minus the DIoU of each pair of boxes; see `retinanet_ops.distance_box_iou_loss`."""
    return _loss("distance_box_iou_loss", boxes1, boxes2, "diou", reduction, eps)


def complete_box_iou_loss(
    boxes1: Tensor,  # [..., 4]
    boxes2: Tensor,  # [..., 4]
    reduction: str = "none",
    eps: float = 0.0,
) -> Tensor:  # [...] or []
    """Return 1 minus the CIoU of each pair of boxes; see `retinanet_ops.complete_box_iou_loss`."""
    return _loss("complete_box_iou_loss", boxes1, boxes2, "ciou", reduction, eps)


def _loss(
    op: str,
    boxes1: Tensor,  # [..., 4]
    boxes2: Tensor,  # [..., 4]
    kind: str,
    reduction: str,
    eps: float,
) -> Tensor:  # [...] or []
    dtype, result = iou_dtypes(boxes1, boxes2)
    losses = 1 - iou_like(boxes1.to(dtype), boxes2.to(dtype), kind, eps, eps)
    return reduced(op, losses.to(result), reduction)
