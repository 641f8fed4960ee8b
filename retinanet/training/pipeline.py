"""Pipelines of torchvision.transforms.v2 as augmentation, with boxes as tv_tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor
from torchvision import tv_tensors

from retinanet.common.errors import DataError

#: Takes an image and a dict with `boxes` (tv_tensors.BoundingBoxes) and `labels`, and returns both.
Pipeline = Callable[[tv_tensors.Image, dict[str, Any]], Any]

# Label of a crowd region while it goes through a pipeline with the other boxes.
_CROWD = -1


def apply_pipeline(
    pipeline: Pipeline,
    image: Tensor,  # [3, H, W] uint8, or floating point in 0..1
    target: dict[str, Any],
    rng: Generator,
) -> tuple[Tensor, dict[str, Any]]:
    """Apply a pipeline to a sample; afterwards, boxes are clipped, and those with a side below 1 pixel are left out.

    The pipeline draws from the global random generator, which is set for it and restored.

    Args:
        pipeline: The pipeline.
        image: The image, RGB.
        target: `boxes` `[M, 4]`, `labels` `[M]` and optionally `crowd_boxes` `[C, 4]`. A pipeline sees crowds as boxes
            with the label -1. Other keys are kept and not shown to the pipeline.
        rng: Generator that supplies the seed.

    Raises:
        DataError: The pipeline returns something else than an image and boxes with as many labels.
    """
    boxes, labels = target["boxes"], target["labels"]
    crowds = target.get("crowd_boxes", boxes[:0])
    joined = tv_tensors.BoundingBoxes(
        torch.cat([boxes, crowds]),
        format=tv_tensors.BoundingBoxFormat.XYXY,
        canvas_size=(image.shape[-2], image.shape[-1]),
    )
    shown = {"boxes": joined, "labels": torch.cat([labels, labels.new_full((len(crowds),), _CROWD)])}
    state = torch.get_rng_state()
    # torch.manual_seed would also seed the generators of GPUs.
    torch.default_generator.manual_seed(int(torch.randint(2**62, (1,), generator=rng)))
    try:
        result = pipeline(tv_tensors.Image(image), shown)
    finally:
        torch.set_rng_state(state)
    image, new_boxes, new_labels = _checked(result, target)
    height, width = image.shape[-2:]
    limits = torch.tensor([width, height, width, height])
    new_boxes = torch.minimum(new_boxes.clamp(min=0), limits)
    kept = ((new_boxes[:, 2:] - new_boxes[:, :2]) >= 1).all(1)
    objects, regions = kept & (new_labels != _CROWD), kept & (new_labels == _CROWD)
    result = {**target, "boxes": new_boxes[objects], "labels": new_labels[objects]}
    if "crowd_boxes" in target:
        result["crowd_boxes"] = new_boxes[regions]
    return image, result


def _checked(result: Any, target: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Return image, boxes and labels of a pipeline as ordinary tensors."""
    where = f"transform: image {target.get('image_id')}"
    if not isinstance(result, tuple) or len(result) != 2:
        raise DataError(f"{where}: expected the pipeline to return an image and a dict, got {type(result).__name__}")
    image, content = result
    if not isinstance(image, Tensor) or image.dim() != 3 or image.shape[0] != 3:
        shape = list(image.shape) if isinstance(image, Tensor) else type(image).__name__
        raise DataError(f"{where}: expected the pipeline to return an image tensor [3, H, W], got {shape}")
    boxes, labels = content["boxes"], content["labels"]
    if len(boxes) != len(labels):
        raise DataError(
            f"{where}: the pipeline returned {len(boxes)} boxes and {len(labels)} labels; SanitizeBoundingBoxes "
            "removes both together"
        )
    return image.as_subclass(Tensor), boxes.as_subclass(Tensor).float(), labels
