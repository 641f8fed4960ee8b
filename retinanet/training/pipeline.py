"""Pipelines of torchvision.transforms.v2 as augmentation, with boxes as tv_tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from retinanet.common.errors import DataError
from retinanet.training.seeding import seeded

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
        DataError: The pipeline returns something else than an image with values in its range, boxes, and as many
            labels.
    """
    boxes, labels = target["boxes"], target["labels"]
    crowds = target.get("crowd_boxes", boxes[:0])
    joined = tv_tensors.BoundingBoxes(
        torch.cat([boxes, crowds]),
        format=tv_tensors.BoundingBoxFormat.XYXY,
        canvas_size=(image.shape[-2], image.shape[-1]),
    )
    shown = {"boxes": joined, "labels": torch.cat([labels, labels.new_full((len(crowds),), _CROWD)])}
    with seeded(int(torch.randint(2**62, (1,), generator=rng))):
        result = pipeline(tv_tensors.Image(image), shown)
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
    """Return image, xyxy boxes and labels of a pipeline as ordinary tensors.

    Raises:
        DataError: The pipeline returned something else than a valid image, boxes and as many labels.
    """
    where = f"transform: image {target.get('image_id')}: expected the pipeline to return"
    if not isinstance(result, tuple) or len(result) != 2:
        raise DataError(f"{where} an image and a dict, got {type(result).__name__}")
    image, content = result
    if not isinstance(image, Tensor) or image.dim() != 3 or image.shape[0] != 3:
        shape = list(image.shape) if isinstance(image, Tensor) else type(image).__name__
        raise DataError(f"{where} an image tensor [3, H, W], got {shape}")
    _check_values(image, where)
    if not isinstance(content, dict) or not {"boxes", "labels"} <= content.keys():
        got = sorted(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise DataError(f"{where} a dict with `boxes` and `labels`, got {got}")
    boxes, labels = content["boxes"], content["labels"]
    if not isinstance(boxes, Tensor) or boxes.dim() != 2 or boxes.shape[1] != 4 or not isinstance(labels, Tensor):
        shape = list(boxes.shape) if isinstance(boxes, Tensor) else type(boxes).__name__
        raise DataError(f"{where} `boxes` [M, 4] and `labels` [M] as tensors, got {shape}, {type(labels).__name__}")
    if len(boxes) != len(labels):
        raise DataError(
            f"{where} as many labels as boxes, got {len(boxes)} boxes and {len(labels)} labels; SanitizeBoundingBoxes "
            "removes both together"
        )
    if isinstance(boxes, tv_tensors.BoundingBoxes):
        boxes = v2.functional.convert_bounding_box_format(boxes, new_format=tv_tensors.BoundingBoxFormat.XYXY)
    return image.as_subclass(Tensor), boxes.as_subclass(Tensor).float(), labels


def _check_values(image: Tensor, where: str) -> None:
    """Raise DataError unless the image is uint8, or floating point in 0..1."""
    if image.dtype == torch.uint8:
        return
    if not image.is_floating_point():
        raise DataError(f"{where} an image of dtype uint8 or floating point, got {image.dtype}")
    low, high = image.aminmax()
    # Interpolation may leave the range by rounding.
    if not (low >= -0.01 and high <= 1.01):
        raise DataError(
            f"{where} an image with values in 0..1, got {low:.3g} to {high:.3g}; leave Normalize out, because the "
            "model normalises its images"
        )
