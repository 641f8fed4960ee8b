"""Areas and IoU-like measures of pairs of boxes that broadcast, shared by several references."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def areas(boxes: Tensor) -> Tensor:  # [..., 4] -> [...]
    """Return the areas of boxes."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def intersection_and_union(
    boxes1: Tensor,  # [..., 4]
    boxes2: Tensor,  # [..., 4]
) -> tuple[Tensor, Tensor]:
    """Return the areas of intersection and union of pairs of boxes."""
    top_left = torch.maximum(boxes1[..., :2], boxes2[..., :2])
    bottom_right = torch.minimum(boxes1[..., 2:], boxes2[..., 2:])
    width, height = (bottom_right - top_left).clamp(min=0).unbind(-1)
    inter = width * height
    return inter, (areas(boxes1) + areas(boxes2)) - inter


def iou_like(
    boxes: Tensor,  # [..., 4]
    gt_boxes: Tensor,  # [..., 4]
    kind: str,
    eps: float = 0.0,
    iou_eps: float = 0.0,
) -> Tensor:  # [...]
    """Return the GIoU, DIoU or CIoU of pairs of boxes.

    `eps` is added to the denominators of the penalties, and `iou_eps` to that of the IoU.
    """
    (x1, y1, x2, y2), (gx1, gy1, gx2, gy2) = boxes.unbind(-1), gt_boxes.unbind(-1)
    zero = torch.zeros_like(x1)
    width = torch.maximum(torch.minimum(x2, gx2) - torch.maximum(x1, gx1), zero)
    height = torch.maximum(torch.minimum(y2, gy2) - torch.maximum(y1, gy1), zero)
    inter = width * height
    union = (x2 - x1) * (y2 - y1) + (gx2 - gx1) * (gy2 - gy1) - inter
    same = (boxes == gt_boxes).all(-1) & (union + iou_eps == 0)
    iou = torch.where(same, 1.0, _ratio(inter, union + iou_eps))
    around_width = torch.maximum(x2, gx2) - torch.minimum(x1, gx1)
    around_height = torch.maximum(y2, gy2) - torch.minimum(y1, gy1)
    if kind == "giou":
        around = around_width * around_height
        return iou - _ratio(around - union, around + eps)
    distance = ((x1 + x2 - gx1 - gx2) / 2) ** 2 + ((y1 + y2 - gy1 - gy2) / 2) ** 2
    value = iou - _ratio(distance, around_width**2 + around_height**2 + eps)
    if kind == "diou":
        return value
    turn = _diagonal(gx2 - gx1, gy2 - gy1) - _diagonal(x2 - x1, y2 - y1)
    v = 4 / math.pi**2 * turn**2
    alpha = _ratio(v, 1 - iou + v + eps).detach()
    return value - alpha * v


def _ratio(a: Tensor, b: Tensor) -> Tensor:  # [...] x [...] -> [...]
    """Return the quotient, or 0 with zero derivatives where the denominator is 0."""
    return torch.where(b == 0, 0.0, a / torch.where(b == 0, 1.0, b))


def _diagonal(width: Tensor, height: Tensor) -> Tensor:  # [...] x [...] -> [...]
    """Return the angle of a box's diagonal, or 0 with zero derivatives where both sides are 0."""
    point = (width == 0) & (height == 0)
    return torch.where(point, 0.0, torch.atan2(width, torch.where(point, 1.0, height)))
