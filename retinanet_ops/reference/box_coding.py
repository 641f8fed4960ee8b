"""Reference of the conversion of boxes to deltas and back, and of clipping."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._image_sizes import ImageSizes, as_image_sizes
from ..anchors import AnchorGrid, as_boxes
from ..constants import MAX_LOG_RATIO
from ..types import compute_dtype


def encode_boxes(
    boxes: Tensor,  # [A, 4] or [N, A, 4]
    anchors: Tensor | AnchorGrid,  # [A, 4] or [N, A, 4]
    *,
    coder_weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
    offset: float = 0.0,
) -> Tensor:  # [A, 4] or [N, A, 4]
    """Return the deltas from anchors to boxes; see `retinanet_ops.encode_boxes`."""
    reference = as_boxes(anchors)
    dtype = compute_dtype(boxes, reference)
    centre, size = _centre_and_size(boxes.to(dtype), offset)
    anchor_centre, anchor_size = _centre_and_size(reference.to(dtype), offset)
    scale = torch.tensor(coder_weights, dtype=dtype, device=boxes.device)
    return torch.cat(((centre - anchor_centre) / anchor_size, torch.log(size / anchor_size)), dim=-1) * scale


def decode_boxes(
    deltas: Tensor,  # [A, 4] or [N, A, 4]
    anchors: Tensor | AnchorGrid,  # [A, 4] or [N, A, 4]
    *,
    coder_weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
    max_log_ratio: float | None = MAX_LOG_RATIO,
    min_log_ratio: float | None = None,
    image_sizes: ImageSizes | None = None,  # [N, 2] (height, width), or one pair for all
    offset: float = 0.0,
) -> Tensor:  # [A, 4] or [N, A, 4]
    """Return the boxes that deltas describe; see `retinanet_ops.decode_boxes`."""
    reference = as_boxes(anchors)
    dtype = compute_dtype(deltas, reference)
    anchor_centre, anchor_size = _centre_and_size(reference.to(dtype), offset)
    deltas = deltas.to(dtype) / torch.tensor(coder_weights, dtype=dtype, device=deltas.device)
    centre = deltas[..., :2] * anchor_size + anchor_centre
    log_ratio = _clamp(deltas[..., 2:], min_log_ratio, max_log_ratio)
    half = torch.exp(log_ratio) * anchor_size * 0.5
    boxes = torch.cat((centre - half, centre + half - offset), dim=-1)
    return boxes if image_sizes is None else clip_boxes(boxes, image_sizes)


def _centre_and_size(
    boxes: Tensor,  # [..., 4]
    offset: float,
) -> tuple[Tensor, Tensor]:  # two [..., 2]
    """Return the centres and the sides of boxes, as (x, y)."""
    size = boxes[..., 2:] - boxes[..., :2] + offset
    return boxes[..., :2] + 0.5 * size, size


def clip_boxes(
    boxes: Tensor,  # [..., 4] or [0]
    image_sizes: ImageSizes,  # [N, 2] (height, width), or one pair for all
) -> Tensor:  # shape and dtype of boxes
    """Return the boxes clipped to their images; see `retinanet_ops.clip_boxes`."""
    dtype = compute_dtype(boxes) if boxes.is_floating_point() else torch.float64
    images = len(boxes) if boxes.dim() > 2 else 1
    sizes = as_image_sizes("clip_boxes", "image_sizes", image_sizes, images, dtype, boxes)
    limit = sizes.flip(-1).repeat(1, 2)  # [N, 4] (width, height, width, height)
    rows = boxes.to(dtype) if boxes.dim() > 1 else boxes.to(dtype).reshape(-1, 4)
    limit = limit.reshape(-1, *[1] * (rows.dim() - 2), 4)
    return _clamp(rows, 0.0, limit).to(boxes.dtype).reshape(boxes.shape)


def clip_boxes_to_image(
    boxes: Tensor,  # [..., 4] or [0]
    size: Tensor | Sequence[float],  # (height, width)
) -> Tensor:  # shape and dtype of boxes
    """Return the boxes clipped to one image; see `retinanet_ops.clip_boxes_to_image`."""
    return clip_boxes(boxes, size)


def _clamp(
    values: Tensor,  # [...]
    low: float | None,
    high: Tensor | float | None,
) -> Tensor:  # [...]
    """Return the values clamped to bounds; a value on a bound passes its gradient.

    `torch.clamp` is not used, because its gradient on a bound is 0, 1/2 or 1, depending on the version and on whether
    the bounds are tensors.
    """
    if low is not None:
        values = torch.where(values < low, low, values)
    return values if high is None else torch.where(values > high, high, values)
