"""Detection in one picture of any size: as a whole, or in overlapping tiles whose detections are merged."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import retinanet_ops as ops
from retinanet.data.tiling import Window, tile_windows
from retinanet.detection.views import with_views
from retinanet.model.detector import Detector
from retinanet.model.preprocessing import to_float
from retinanet.model.targets import ImageDetections


@torch.inference_mode()
def detect_image(
    model: Detector,
    image: Tensor,  # [3, H, W] uint8 or floating point in 0..1, RGB
    *,
    tile: int | None = None,
    overlap: int | None = None,
    score_threshold: float = 0.0,
    views: int = 1,
    after_pass: Callable[[], None] | None = None,
) -> ImageDetections:
    """Detect objects in one picture.

    With tiles, a detection is kept if its centre is nearer to the middle of its tile than to that of any neighbour. An
    object that the edge of a tile cuts is complete in the neighbouring tile if it is smaller than the overlap.
    Remaining duplicates are removed by NMS within each class, with the model's threshold.

    Args:
        model: The model, in evaluation mode.
        image: The picture.
        tile: Side of the tiles in pixels. None takes every picture as a whole. A picture that fits into one tile is
            taken as a whole, too.
        overlap: Pixels that neighbouring tiles share. None takes a quarter of the tile.
        score_threshold: Detections need a score above this and above the model's threshold.
        views: Number of mirrored views of the picture or of each tile: 1, 2 or 4; see `retinanet.detection.views`.
        after_pass: Called after each pass of the network, `count_passes` times, to show progress.

    Returns:
        The detections on the CPU: float32 boxes in pixels of the picture, float32 scores and int64 labels. The
        model's `max_detections` bounds the detections of each tile, not of the picture.

    Raises:
        ValueError: `tile`, `overlap` or `views` is out of range.
    """
    detector = with_views(model, views, after_pass)
    windows = _windows(image.shape[-2], image.shape[-1], tile, overlap)
    device = model.device
    parts: list[ImageDetections] = []
    for window in windows:
        pixels = image[:, window.y : window.y + window.height, window.x : window.x + window.width]
        (found,) = detector([to_float(pixels.to(device))])
        boxes, scores, labels = ImageDetections(**found)
        boxes = boxes + boxes.new_tensor([window.x, window.y, window.x, window.y])
        keep = (scores > score_threshold) & _in_core(boxes, window, windows)
        parts.append(ImageDetections(boxes[keep], scores[keep], labels[keep]))
        if after_pass is not None and views == 1:
            after_pass()
    boxes, scores, labels = (torch.cat(column) for column in zip(*parts, strict=True))
    if len(windows) > 1:
        kept = ops.batched_nms(boxes, scores, labels, model.config.nms_threshold)
        boxes, scores, labels = boxes[kept], scores[kept], labels[kept]
    return ImageDetections(boxes.float().cpu(), scores.float().cpu(), labels.cpu())


def count_passes(
    height: int, width: int, *, tile: int | None = None, overlap: int | None = None, views: int = 1
) -> int:
    """Return how often `detect_image` runs the network on a picture of this size: once for each tile and view."""
    return len(_windows(height, width, tile, overlap)) * views


def _windows(height: int, width: int, tile: int | None, overlap: int | None) -> list[Window]:
    if tile is None:
        return [Window(0, 0, height, width)]
    return tile_windows(height, width, tile, tile // 4 if overlap is None else overlap)


def _in_core(
    boxes: Tensor,  # [D, 4]
    window: Window,
    windows: list[Window],
) -> Tensor:  # [D] bool
    """Return whether the centre of each box is nearer to the middle of its window than to that of any neighbour."""
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
