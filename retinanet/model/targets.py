"""The interface of the network: lists of images and targets become one batch, and detections become lists again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import retinanet_ops as ops


class Batch(NamedTuple):
    """Images as the network takes them, with their targets in the same pixels; see `Detector.prepare`."""

    pixels: Tensor  # [N, 3, H, W] normalised and padded
    image_sizes: list[tuple[int, int]]  # height, width of each image inside the padded batch
    ground_truth: ops.GroundTruth | None  # boxes [N, M, 4] in pixels of the batch, labels [N, M], count [N]
    crowds: ops.PaddedBoxes | None  # boxes [N, C, 4] in pixels of the batch, count [N]; None if no image has any
    original_sizes: list[tuple[int, int]]  # height, width of each image before resizing

    def size_tensor(self) -> Tensor:  # [N, 2] int64
        """Return `image_sizes` as a tensor on the device of the pixels."""
        return torch.tensor(self.image_sizes, device=self.pixels.device)


class ImageDetections(NamedTuple):
    """Detections in one image, best first."""

    boxes: Tensor  # [D, 4] xyxy in pixels
    scores: Tensor  # [D]
    labels: Tensor  # [D] int64, 0..K-1


def check_images(images: Sequence[Tensor] | Tensor) -> list[tuple[int, int]]:
    """Check the types and shapes of images.

    Args:
        images: Tensors `[3, H_i, W_i]`, or one tensor `[N, 3, H, W]`.

    Returns:
        Height and width of each image.

    Raises:
        TypeError: An image is not a tensor.
        ValueError: The list is empty, or an image has another shape.
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
    """Check training targets. The check reads their values, so it synchronises with their device.

    Args:
        targets: One dict per image with `boxes`, `labels` and optionally `crowd_boxes`; see `Detector.forward`.
        num_images: Number of images in the batch.
        num_classes: Number of classes K; labels must be in 0..K-1.

    Raises:
        ValueError: A target is malformed. The message names the image and, for a wrong value, the row.
    """
    if len(targets) != num_images:
        raise ValueError(f"targets: expected one dict for each of the {num_images} images, got {len(targets)}")
    for i, target in enumerate(targets):
        if not isinstance(target, Mapping):
            raise ValueError(f"targets[{i}]: expected a dict, got {type(target).__name__}")
        for key in ("boxes", "labels"):
            if not isinstance(target.get(key), Tensor):
                raise ValueError(f"targets[{i}]: expected a tensor {key!r}, got {type(target.get(key)).__name__}")
        for key in ("boxes", "crowd_boxes"):
            if key in target:
                _check_boxes(target[key], f"targets[{i}]['{key}']")
        labels, count = target["labels"], len(target["boxes"])
        is_integer = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
        if not is_integer or list(labels.shape) != [count]:
            raise ValueError(
                f"targets[{i}]['labels']: expected integers of shape [{count}], "
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
        raise ValueError(
            f"{name}: expected floating-point boxes of shape [M, 4], got {boxes.dtype} of shape {list(boxes.shape)}"
        )
    # A comparison with NaN is false, so the negation also catches boxes with NaN.
    bad = ~((boxes[:, 2:] > boxes[:, :2]) & boxes[:, :2].isfinite() & boxes[:, 2:].isfinite()).all(1)
    if bad.any():
        row = int(bad.nonzero()[0])
        raise ValueError(f"{name}: expected x1 < x2 and y1 < y2, finite, got {boxes[row].tolist()} at row {row}")


def pad_targets(targets: Sequence[Mapping[str, Tensor]]) -> tuple[ops.GroundTruth, ops.PaddedBoxes | None]:
    """Pad the targets of a batch on their device, without synchronising with it.

    Args:
        targets: One dict per image with `boxes` `[M_i, 4]`, `labels` `[M_i]` and optionally `crowd_boxes` `[C_i, 4]`.

    Returns:
        The ground truth, and the crowd regions or None if no image has any.
    """
    ground_truth = ops.pad_ground_truth([t["boxes"] for t in targets], [t["labels"] for t in targets])
    if not any(len(t["crowd_boxes"]) for t in targets if "crowd_boxes" in t):
        return ground_truth, None
    return ground_truth, ops.pad_boxes([t.get("crowd_boxes", t["boxes"][:0]) for t in targets])


def split_detections(padded: ops.Detections | ops.Candidates) -> list[ImageDetections]:
    """Split padded detections or candidates by image, without the unused slots.

    The lengths depend on values, so this function synchronises with the device.
    """
    counts = padded.count if isinstance(padded, ops.Detections) else (padded.anchor_index >= 0).sum(1)
    return [
        ImageDetections(padded.boxes[i, :count], padded.scores[i, :count], padded.labels[i, :count])
        for i, count in enumerate(counts.tolist())
    ]
