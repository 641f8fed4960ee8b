"""Checks of the targets of a batch.

Where torchvision's detectors have a check of their own, its message is the one that the user gets: these functions
report the target, and the caller passes the batch to torchvision's `forward`. Everything else raises here, with the
index of the target and the name of its entry.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Survey(NamedTuple):
    """What is known of the values in the targets of a batch, after one synchronisation with the device."""

    degenerate: bool  # whether torchvision raises for a box without area
    finite: bool  # whether all coordinates are finite
    lowest: int  # label, 0 without boxes
    highest: int


def check_boxes(targets: Any, images: Sequence[Tensor], *, training: bool) -> bool:
    """Check the number of targets and the kind and shape of their boxes.

    Returns:
        Whether the targets are right. False means that torchvision's own checks, which it makes in training only, name
        what is wrong.

    Raises:
        TypeError: The targets are no list, or one of them is no dict.
        ValueError: There are more targets than images in training, or fewer, or a target has no boxes.
    """
    if targets is None:
        return not training
    if not isinstance(targets, (list, tuple)):
        raise TypeError(f"targets must be a list with one dict per image, got {type(targets).__name__}")
    for i, target in enumerate(targets):
        if not isinstance(target, Mapping):
            raise TypeError(f"targets[{i}] must be a dict with 'boxes' and 'labels', got {type(target).__name__}")
        if "boxes" not in target:
            raise ValueError(f"targets[{i}] must have an entry 'boxes', got {_entries(target)}")
        boxes = target["boxes"]
        if not isinstance(boxes, Tensor) or boxes.dim() != 2 or boxes.shape[1] != 4:
            if training:
                return False
            got = list(boxes.shape) if isinstance(boxes, Tensor) else type(boxes).__name__
            raise ValueError(f"targets[{i}]['boxes'] must be a tensor of shape [M, 4], got {got}")
    if len(targets) < len(images) or (training and len(targets) > len(images)):
        raise ValueError(
            f"targets must have one dict per image, got {len(targets)} targets for {len(images)} images; "
            "pass the images and the targets of the same batch"
        )
    return True


def label_error(
    targets: Sequence[Mapping[str, Any]],  # of which `check_boxes` has returned True
    images: Sequence[Tensor],
) -> Exception | None:
    """Return the error for labels that cannot be used with the boxes, or for boxes or labels on a wrong device."""
    for i, (target, image) in enumerate(zip(targets, images, strict=True)):
        if "labels" not in target:
            return ValueError(f"targets[{i}] must have an entry 'labels', got {_entries(target)}")
        labels, count = target["labels"], len(target["boxes"])
        if not isinstance(labels, Tensor):
            return TypeError(f"targets[{i}]['labels'] must be a tensor of integers, got {type(labels).__name__}")
        if labels.is_floating_point() or labels.is_complex():
            return TypeError(
                f"targets[{i}]['labels'] must be a tensor of integers, got {labels.dtype}; convert with labels.long()"
            )
        if list(labels.shape) != [count]:
            return ValueError(
                f"targets[{i}]['labels'] must have shape [{count}], one label per box, got {list(labels.shape)}"
            )
        for name in ("boxes", "labels"):
            if target[name].device != image.device:
                return ValueError(
                    f"targets[{i}]['{name}'] must be on the device of the image, {image.device}, got "
                    f"{target[name].device}; move the targets to the device of the images"
                )
    return None


def survey(targets: Sequence[Mapping[str, Tensor]], *, labels: bool) -> Survey:
    """Return what torchvision checks in the values of the boxes, and with `labels` the range of the labels."""
    if not sum(len(t["boxes"]) for t in targets):
        return Survey(degenerate=False, finite=True, lowest=0, highest=0)
    boxes = torch.cat([t["boxes"] for t in targets])
    values = [(boxes[:, 2:] <= boxes[:, :2]).any(), boxes.isfinite().all()]
    if labels:
        values += torch.cat([t["labels"] for t in targets]).aminmax()
    degenerate, finite, *label_range = torch.stack([value.to(torch.int64) for value in values]).tolist()
    lowest, highest = label_range or (0, 0)
    return Survey(bool(degenerate), bool(finite), lowest, highest)


def check_label_range(targets: Sequence[Mapping[str, Tensor]], found: Survey, num_classes: int) -> None:
    """Raise ValueError if a label is not in 0..num_classes-1."""
    if found.lowest >= 0 and found.highest < num_classes:
        return
    for i, target in enumerate(targets):
        labels = target["labels"].to(torch.int64)
        wrong = labels[(labels < 0) | (labels >= num_classes)].tolist()
        if wrong:
            raise ValueError(f"targets[{i}]['labels'] must be class ids in 0..{num_classes - 1}, got {wrong[0]}")


def _entries(target: Mapping[Any, Any]) -> str:
    return f"the entries {', '.join(map(repr, target))}" if target else "an empty dict"
