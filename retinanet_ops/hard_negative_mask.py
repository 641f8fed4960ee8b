"""SSD's hard negative mining: keep the background anchors with the highest loss."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import reference
from ._checks import as_count, as_number, check_floating, check_integer, check_same_device, check_shape
from ._fallback import with_fallback
from ._gradients import converted, detached


@with_fallback(reference.hard_negative_mask)
def hard_negative_mask(
    loss: Tensor,  # [N, A] floating
    labels: Tensor,  # [N, A] integer
    *,
    ratio: float = 3.0,
    min_negatives: int = 0,
) -> Tensor:  # [N, A] bool
    """Mark the background anchors with the highest loss, `ratio` of them per positive anchor of their image.

    Args:
        loss: Classification loss of each anchor.
        labels: Labels as `assign_targets` returns them: a class id, -1 for background, -2 for ignored.
        ratio: Number of negatives per positive. The product with the number of positives is rounded up.
        min_negatives: Lowest number of negatives of an image, for images with few or no positives.

    Returns:
        True for the hard negatives. Positive and ignored anchors are False, so `loss[mask | (labels >= 0)]` holds the
        losses that count.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: The shapes or devices differ, or an option is negative or infinite.

    Losses are compared as float32. Ties go to the anchor with the lower index, and NaN ranks first. An image never has
    more negatives than background anchors. Empty input gives an empty mask. The op is deterministic and not
    differentiable. Its result is the same on every backend.

    Source: Liu et al., "SSD: Single Shot MultiBox Detector", 2016, with torchvision's ratio of 3.
    """
    op = "hard_negative_mask"
    check_floating(op, "loss", loss)
    check_integer(op, "labels", labels)
    check_shape(op, "loss", loss, ("N", "A"))
    check_shape(op, "labels", labels, loss.shape)
    check_same_device(op, "labels", labels, "loss", loss)
    ratio, min_negatives = as_number(op, "ratio", ratio), as_count(op, "min_negatives", min_negatives)
    if not 0 <= ratio < math.inf:
        raise ValueError(f"{op}: ratio must be finite and not negative, got {ratio}")
    if labels.dtype == torch.int64:
        labels = labels.clamp(-2, 0)  # keeps the kind of label (class, background, ignored) when int32 cannot hold it
    return _hard_negative_mask(
        converted(detached(loss), torch.float32), converted(labels, torch.int32), ratio, min_negatives
    )


_hard_negative_mask = torch.ops.retinanet_ops.hard_negative_mask.default


@torch.library.register_fake("retinanet_ops::hard_negative_mask")
def _(loss: Tensor, labels: Tensor, ratio: float, min_negatives: int) -> Tensor:
    return loss.new_empty(loss.shape, dtype=torch.bool)
