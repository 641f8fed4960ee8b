"""Test-time augmentation: detection in an image and its mirrored copies, whose candidates are merged.

A network that was trained on mirrored images is about equally good in every view, but its errors differ from view to
view, so that merging the views cancels part of the errors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

import retinanet_ops as ops
from retinanet.model.detector import Detector
from retinanet.model.targets import ImageDetections

# Axes that each view mirrors, by the number of views.
_AXES: dict[int, tuple[tuple[int, ...], ...]] = {2: ((), (-1,)), 4: ((), (-1,), (-2,), (-2, -1))}
#: Possible numbers of views.
VIEWS = (1, *_AXES)
# A candidate contributes to a detection if their IoU is above both this and the threshold of NMS.
_SAME_OBJECT_IOU = 0.5


def with_views(
    model: Detector, views: int, after_view: Callable[[], None] | None = None
) -> Detector | MultiViewDetector:
    """Return the model itself for one view, or wrap it for several.

    Args:
        model: The model, in evaluation mode.
        views: 1 for the image as it is, 2 for the image and its left-right mirror image, 4 for both of these and their
            upside-down mirror images (for pictures without an upright position).
        after_view: As in `MultiViewDetector`; not called for one view.

    Raises:
        ValueError: `views` is another number.
    """
    if views not in VIEWS:
        raise ValueError(f"views: expected {', '.join(map(str, VIEWS))}, got {views}")
    return model if views == 1 else MultiViewDetector(model, views, after_view)


class MultiViewDetector(nn.Module):
    """A detector that looks at several mirrored views of each image; for evaluation and detection.

    NMS runs on the candidates of all views together. Each box that it keeps is then replaced by the mean of the
    candidates of its class whose IoU with it is above 0.5 and above the threshold of NMS, weighted by their squared
    scores (box voting, Gidaris and Komodakis 2015, arXiv:1505.01749). Scores are those of the boxes that were kept. The
    result is deterministic.

    Args:
        model: The model, which is shared and not copied.
        views: 2 or 4; see `with_views`.
        after_view: Called after each pass of the network, which is one view of a batch, to show progress.

    Raises:
        ValueError: `views` is another number.
    """

    def __init__(self, model: Detector, views: int, after_view: Callable[[], None] | None = None) -> None:
        """Keep the model."""
        super().__init__()
        if views not in _AXES:
            raise ValueError(f"views: expected {' or '.join(map(str, _AXES))}, got {views}")
        self.model = model
        self.views = _AXES[views]
        self.after_view = after_view

    def forward(
        self,
        images: Sequence[Tensor],  # N tensors [3, H_i, W_i] in 0..1, RGB
    ) -> list[dict[str, Tensor]]:
        """Return detections as the model does in evaluation mode. The model must be in evaluation mode."""
        candidates = [self._candidates(images, axes) for axes in self.views]
        return [self._merge(views)._asdict() for views in zip(*candidates, strict=True)]

    def _candidates(self, images: Sequence[Tensor], axes: tuple[int, ...]) -> list[ImageDetections]:
        """Return all candidates in one view of each image, in pixels of the image itself."""
        batch = self.model.prepare([image.flip(axes) if axes else image for image in images])
        candidates = self.model.candidates(batch.pixels, batch.size_tensor())
        if self.after_view is not None:
            self.after_view()
        return [
            image._replace(boxes=_mirror(image.boxes, size, axes))
            for image, size in zip(self.model.split(candidates, batch), batch.original_sizes, strict=True)
        ]

    def _merge(self, views: Sequence[ImageDetections]) -> ImageDetections:
        boxes, scores, labels = (torch.cat(column) for column in zip(*views, strict=True))
        config = self.model.config
        kept = ops.batched_nms(boxes, scores, labels, config.nms_threshold)[: config.max_detections]
        votes = ops.box_iou(boxes[kept], boxes) > max(_SAME_OBJECT_IOU, config.nms_threshold)
        votes &= labels[kept, None] == labels
        weights = torch.where(votes, scores.to(boxes.dtype).square(), 0.0)  # [D, C]
        total = weights.sum(1, keepdim=True)
        with torch.autocast(boxes.device.type, enabled=False):  # half precision would round coordinates
            mean = weights @ boxes / total
        # A box without area has IoU 0 even with itself, so it keeps its coordinates.
        return ImageDetections(torch.where(total > 0, mean, boxes[kept]), scores[kept], labels[kept])


def _mirror(
    boxes: Tensor,  # [C, 4]
    size: tuple[int, int],  # height, width of the image
    axes: tuple[int, ...],
) -> Tensor:  # [C, 4]
    x1, y1, x2, y2 = boxes.unbind(1)
    if -1 in axes:
        x1, x2 = size[1] - x2, size[1] - x1
    if -2 in axes:
        y1, y2 = size[0] - y2, size[0] - y1
    return torch.stack([x1, y1, x2, y2], dim=1)
