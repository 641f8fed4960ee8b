"""Detection in several mirrored views of an image, merged: test-time augmentation.

A network that was trained on mirrored images sees the views about equally well, but errs differently in each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

import retinanet_ops as ops
from retinanet.model.network import RetinaNet
from retinanet.model.targets import image_sizes_of, unpack_detections

# Axes that each view mirrors.
_AXES: dict[int, tuple[tuple[int, ...], ...]] = {2: ((), (-1,)), 4: ((), (-1,), (-2,), (-2, -1))}
#: Numbers of views that there are.
VIEWS = (1, *_AXES)
# Candidates that overlap a detection by more are about the same object, unless NMS would let both stand.
_SAME_OBJECT_IOU = 0.5


class _Candidates(NamedTuple):
    boxes: Tensor  # [C, 4]
    scores: Tensor  # [C]
    labels: Tensor  # [C]


def with_views(model: RetinaNet, views: int) -> RetinaNet | MultiViewRetinaNet:
    """The model itself for one view, or the model made to look in several.

    Args:
        model: In evaluation mode.
        views: 1: the image as it is; 2: and mirrored left to right; 4: and both upside down, for pictures without an
            upright position.

    Raises:
        ValueError: `views` is none of these.
    """
    if views not in VIEWS:
        raise ValueError(f"views: expected {', '.join(map(str, VIEWS))}, got {views}")
    return model if views == 1 else MultiViewRetinaNet(model, views)


class MultiViewRetinaNet(nn.Module):
    """A RetinaNet that looks at each image in several mirrored views; for evaluation and detection.

    NMS runs on the candidates of all views together. Each box that it keeps is then replaced by the mean of the
    candidates of its class that overlap it by more than IoU 0.5, and by more than NMS allows, weighted by their
    squared scores (box voting, Gidaris and Komodakis 2015, arXiv:1505.01749). Scores are those of the boxes kept.
    Deterministic.

    Args:
        model: The network; shared, not copied.
        views: 2 (the image, and it mirrored left to right) or 4 (and both upside down).

    Raises:
        ValueError: `views` is neither.
    """

    def __init__(self, model: RetinaNet, views: int) -> None:
        """Keeps the model."""
        super().__init__()
        if views not in _AXES:
            raise ValueError(f"views: expected {' or '.join(map(str, _AXES))}, got {views}")
        self.model = model
        self.views = _AXES[views]

    def forward(
        self,
        images: Sequence[Tensor],  # N tensors [3, H_i, W_i] in 0..1, RGB
    ) -> list[dict[str, Tensor]]:
        """Detections, as `RetinaNet` returns them in evaluation mode, in which it must be."""
        seen = [self._candidates(images, axes) for axes in self.views]
        return [self._merge(views) for views in zip(*seen, strict=True)]

    def _candidates(self, images: Sequence[Tensor], axes: tuple[int, ...]) -> list[_Candidates]:
        """All candidates in one view of each image, in pixels of the image itself."""
        transform = self.model.transform
        sizes = image_sizes_of(images)
        batch, _ = transform([image.flip(axes) if axes else image for image in images])
        image_sizes = torch.tensor(batch.image_sizes, device=batch.tensors.device)
        found = unpack_detections(self.model.detections(batch.tensors, image_sizes, suppress=False))
        found = transform.postprocess(found, batch.image_sizes, sizes)
        return [
            _Candidates(_mirror(each["boxes"], size, axes), each["scores"], each["labels"])
            for each, size in zip(found, sizes, strict=True)
        ]

    def _merge(self, views: Sequence[_Candidates]) -> dict[str, Tensor]:
        boxes, scores, labels = (torch.cat(column) for column in zip(*views, strict=True))
        config = self.model.config
        kept = ops.batched_nms(boxes, scores, labels, config.nms_threshold)[: config.max_detections]
        votes = ops.box_iou(boxes[kept], boxes) > max(_SAME_OBJECT_IOU, config.nms_threshold)
        votes &= labels[kept, None] == labels
        weights = torch.where(votes, scores.to(boxes.dtype).square(), 0.0)  # [D, C]
        total = weights.sum(1, keepdim=True)
        with torch.autocast(boxes.device.type, enabled=False):  # half precision would round coordinates
            mean = weights @ boxes / total
        # A box without area overlaps nothing, not even itself.
        return {"boxes": torch.where(total > 0, mean, boxes[kept]), "scores": scores[kept], "labels": labels[kept]}


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
