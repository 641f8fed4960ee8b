"""Training targets and detections at the edge of the network: checked, padded and unpadded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import retinanet_ops as ops


def image_sizes_of(images: Sequence[Tensor] | Tensor) -> list[tuple[int, int]]:
    """Height and width of each image `[3, H, W]`.

    Raises:
        TypeError: An image is no tensor.
        ValueError: There are no images, or one of another shape.
    """
    if not len(images):
        raise ValueError("images: expected at least one image, got none")
    for i, image in enumerate(images):
        if not isinstance(image, Tensor):
            raise TypeError(f"images[{i}]: expected a tensor, got {type(image).__name__}")
        if image.dim() != 3 or image.shape[0] != 3 or not image.numel():
            raise ValueError(f"images[{i}]: expected shape [3, H, W] with pixels in it, got {list(image.shape)}")
    return [(int(image.shape[1]), int(image.shape[2])) for image in images]


def check_targets(targets: Sequence[dict[str, Any]], num_images: int, num_classes: int) -> None:
    """Checks training targets, reading their values.

    Args:
        targets: One dict per image with `boxes`, `labels` and perhaps `crowd_boxes`.
        num_images: Number of images in the batch.
        num_classes: Labels must be below this.

    Raises:
        ValueError: The first thing that is wrong, with the image and the box.
    """
    if len(targets) != num_images:
        raise ValueError(f"targets: expected one dict for each of the {num_images} images, got {len(targets)}")
    for i, target in enumerate(targets):
        if not isinstance(target, Mapping):
            raise ValueError(f"targets[{i}]: expected a dict, got {type(target).__name__}")
        for key in ("boxes", "labels"):
            if not isinstance(target.get(key), Tensor):
                raise ValueError(f"targets[{i}]: expected a tensor {key!r}, got {type(target.get(key)).__name__}")
        labels = target["labels"]
        for key in ("boxes", "crowd_boxes"):
            if key in target:
                _check_boxes(target[key], f"targets[{i}]['{key}']")
        is_integer = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
        if not is_integer or list(labels.shape) != [len(target["boxes"])]:
            raise ValueError(
                f"targets[{i}]['labels']: expected integers of shape [{len(target['boxes'])}], "
                f"got {labels.dtype} of shape {list(labels.shape)}"
            )
        bad = (labels < 0) | (labels >= num_classes)
        if bad.any():
            row = int(bad.nonzero()[0])
            raise ValueError(
                f"targets[{i}]['labels']: expected class ids in 0..{num_classes - 1}, "
                f"got {int(labels[row])} at row {row}"
            )


def _check_boxes(boxes: Tensor, name: str) -> None:
    if boxes.dim() != 2 or boxes.shape[1] != 4 or not boxes.is_floating_point():
        raise ValueError(f"{name}: expected floating boxes of shape [M, 4], got {boxes.dtype} {list(boxes.shape)}")
    # Written so that NaN fails as well.
    bad = ~((boxes[:, 2:] > boxes[:, :2]) & boxes[:, :2].isfinite() & boxes[:, 2:].isfinite()).all(1)
    if bad.any():
        row = int(bad.nonzero()[0])
        raise ValueError(f"{name}: expected x1 < x2 and y1 < y2, finite, got {boxes[row].tolist()} at row {row}")


def pack_targets(targets: Sequence[dict[str, Tensor]]) -> tuple[ops.GroundTruth, ops.PaddedBoxes | None]:
    """Pads the targets of a batch.

    Args:
        targets: One dict per image with `boxes` `[M_i, 4]`, `labels` `[M_i]` and perhaps `crowd_boxes` `[C_i,
            4]`.

    Returns:
        Ground truth, and the crowd regions, or None if no image has any.
    """
    ground_truth = ops.pad_ground_truth([t["boxes"] for t in targets], [t["labels"] for t in targets])
    if not any(len(t["crowd_boxes"]) for t in targets if "crowd_boxes" in t):
        return ground_truth, None
    return ground_truth, ops.pad_boxes([t.get("crowd_boxes", t["boxes"][:0]) for t in targets])


def unpack_detections(found: ops.Detections) -> list[dict[str, Tensor]]:
    """One dict per image with `boxes` `[D, 4]`, `scores` `[D]` and `labels` `[D]`, from padded detections.

    The lengths depend on values: this is where the host waits for the device.
    """
    return [
        {"boxes": found.boxes[i, :n], "scores": found.scores[i, :n], "labels": found.labels[i, :n]}
        for i, n in enumerate(found.count.tolist())
    ]
