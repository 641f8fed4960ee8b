"""Detection in one picture of any size: whole, or in overlapping tiles whose detections are merged."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import retinanet_ops as ops
from retinanet.data.tiling import Window, tile_windows
from retinanet.detection.views import with_views
from retinanet.model.network import RetinaNet
from retinanet.model.preprocessing import to_float


@dataclass(frozen=True)
class ImageDetections:
    """What was found in one picture, best first, on the CPU.

    Attributes:
        boxes: float32 `[D, 4]`, xyxy in pixels of the picture.
        scores: float32 `[D]`.
        labels: int64 `[D]`, 0..K-1.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor


@torch.inference_mode()
def detect_image(
    model: RetinaNet,
    image: Tensor,  # [3, H, W] uint8 or floating point in 0..1, RGB
    *,
    tile: int | None = None,
    overlap: int | None = None,
    score_threshold: float = 0.0,
    views: int = 1,
) -> ImageDetections:
    """Detects objects in one picture.

    With tiles, a detection counts if its centre is nearer to the middle of its tile than to that of a
    neighbour: what a tile's edge cuts is whole in the neighbour, as long as it is smaller than the overlap.
    What is left twice is removed by NMS of each class at the model's threshold.

    Args:
        model: In evaluation mode.
        image: The picture.
        tile: Side of the tiles in pixels; None, or a picture that fits into one tile, takes the picture
            whole.
        overlap: Pixels that neighbouring tiles share; None is a quarter of the tile.
        score_threshold: Only detections with scores above this; the model's own threshold applies as well.
        views: How often to look at the picture, or each tile: 1, 2 or 4 times, see `retinanet.detection.views`.

    Returns:
        The detections. The model's `max_detections` bounds those of each tile, not of the picture.

    Raises:
        ValueError: `tile`, `overlap` or `views` is out of range.
    """
    detector = with_views(model, views)
    height, width = image.shape[-2:]
    if tile is None:
        windows = [Window(0, 0, height, width)]
    else:
        windows = tile_windows(height, width, tile, tile // 4 if overlap is None else overlap)
    device = model.base_anchors.device
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for window in windows:
        pixels = image[:, window.y : window.y + window.height, window.x : window.x + window.width]
        found = detector([to_float(pixels.to(device))])[0]
        corner = found["boxes"].new_tensor([window.x, window.y, window.x, window.y])
        boxes, scores, labels = found["boxes"] + corner, found["scores"], found["labels"]
        keep = (scores > score_threshold) & _in_core(boxes, window, windows)
        parts.append((boxes[keep], scores[keep], labels[keep]))
    boxes, scores, labels = (torch.cat(column) for column in zip(*parts, strict=True))
    if len(windows) > 1:
        kept = ops.batched_nms(boxes, scores, labels, model.config.nms_threshold)
        boxes, scores, labels = boxes[kept], scores[kept], labels[kept]
    return ImageDetections(boxes.float().cpu(), scores.float().cpu(), labels.cpu())


def _in_core(
    boxes: Tensor,  # [D, 4]
    window: Window,
    windows: list[Window],
) -> Tensor:  # [D] bool
    """Whether a box's centre is in the part of its window that no neighbour has a better view of."""
    low_x, high_x = _core(window.x, window.width, {other.x for other in windows})
    low_y, high_y = _core(window.y, window.height, {other.y for other in windows})
    x, y = (boxes[:, 0] + boxes[:, 2]) / 2, (boxes[:, 1] + boxes[:, 3]) / 2
    return (x >= low_x) & (x < high_x) & (y >= low_y) & (y < high_y)


def _core(start: int, length: int, starts: set[int]) -> tuple[float, float]:
    before = [other for other in starts if other < start]
    after = [other for other in starts if other > start]
    low = (start + max(before) + length) / 2 if before else -float("inf")
    high = (start + length + min(after)) / 2 if after else float("inf")
    return low, high
