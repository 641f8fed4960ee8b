"""What every accelerated `forward` does before its heads, and what it does with padded detections."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor
from torchvision.models.detection.image_list import ImageList

from ._targets import Survey, label_error, survey


class Inputs(NamedTuple):
    """A batch after the transform of its model."""

    batch: ImageList
    targets: list[dict[str, Tensor]]  # in pixels of the batch; empty without targets
    found: Survey
    original_sizes: list[tuple[int, int]]  # height and width of each image before the transform


def transformed(model: Any, images: list[Tensor], targets: Any) -> Inputs | None:
    """Return the transformed batch of a call whose targets `check_boxes` has accepted, after one synchronisation.

    Returns:
        The batch. None means that torchvision's `forward` shall take the call, which raises for a box without area, and
        has losses of NaN for a box that is not finite.

    Raises:
        TypeError, ValueError: In training, labels cannot be used with their boxes; see `label_error`.
    """
    original_sizes = [(image.shape[-2], image.shape[-1]) for image in images]
    batch, scaled = model.transform(images, targets)
    wrong_labels = label_error(scaled, images) if model.training else None
    found = survey(scaled or [], labels=model.training and wrong_labels is None)
    if found.degenerate:
        return None
    if wrong_labels is not None:
        raise wrong_labels
    return Inputs(batch, scaled or [], found, original_sizes) if found.finite else None


def run_backbone(model: Any, batch: ImageList) -> dict[str, Tensor]:  # [N, C, H, W] by name of the level
    """Return the maps of the backbone. A single map has the name "0"."""
    features = model.backbone(batch.tensors)
    return {"0": features} if isinstance(features, Tensor) else features


def detection_dicts(
    boxes: Tensor,  # [N, D, 4]
    scores: Tensor,  # [N, D]
    labels: Tensor,  # [N, D]
    count: Tensor,  # [N]
) -> list[dict[str, Tensor]]:
    """Return a dict per image with `boxes` [D, 4], `scores` [D] and `labels` [D] of its detections."""
    scores = scores.to(boxes.dtype)
    return [
        {"boxes": boxes[i, :n], "scores": scores[i, :n], "labels": labels[i, :n]} for i, n in enumerate(count.tolist())
    ]
