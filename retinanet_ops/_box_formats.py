"""The formats in which `box_iou` takes boxes, those of torchvision, and their conversion to corners."""

from __future__ import annotations

import torch
from torch import Tensor

BOX_FORMATS = ("xyxy", "xywh", "cxcywh")


def check_format(fmt: str) -> None:
    """Raise ValueError unless `fmt` is the name of a format of boxes along the axes."""
    if fmt not in BOX_FORMATS:
        raise ValueError(
            f"box_iou: fmt must be one of {', '.join(BOX_FORMATS)}, got {fmt!r}; "
            "torchvision.ops.box_iou takes the formats of rotated boxes"
        )


def corners(
    boxes: Tensor,  # [..., 4] floating, in the format `fmt`
    fmt: str,
) -> Tensor:  # [..., 4], (x1, y1, x2, y2)
    """Return the corners of boxes."""
    check_format(fmt)
    if fmt == "xyxy":
        return boxes
    place, size = boxes[..., :2], boxes[..., 2:]
    if fmt == "cxcywh":
        place = place - size / 2
    return torch.cat((place, place + size), dim=-1)
