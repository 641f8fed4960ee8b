"""Hard negative mining: which background anchors count in a loss that would drown in them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import reference
from ._options import as_count, as_number
from ._wrapping import check_floating, check_integer, check_same_device, check_shape, with_fallback


@with_fallback(reference.hard_negative_mask)
def hard_negative_mask(
    loss: Tensor,  # [N, A] floating
    labels: Tensor,  # [N, A] integer
    *,
    ratio: float = 3.0,
    min_negatives: int = 0,
) -> Tensor:  # [N, A] bool
    """The background anchors of greatest loss, `ratio` of them for each positive anchor of their image.

    Args:
        loss: Classification loss of each anchor.
        labels: As of `assign_targets`: a class id, -1 for background, -2 for ignored.
        ratio: Negatives per positive; their product is rounded up.
        min_negatives: Negatives of an image that has few positives or none.

    Returns:
        True for the hard negatives; positive and ignored anchors are False: `loss[mask | (labels >= 0)]` are those that
        count.

    Raises:
        TypeError: An argument has a wrong dtype.
        ValueError: Shapes do not fit each other, an option is negative or infinite, or the devices differ.

    Losses rank as float32; ties go to the lower anchor; NaN ranks first.  An image has at most as many negatives as
    background anchors.  Deterministic, and the same on every backend.  Empty input: empty.  Not differentiable.
    Source: SSD (Liu et al. 2016), with torchvision's ratio of 3.
    """
    op = "hard_negative_mask"
    check_floating(op, "loss", loss)
    check_integer(op, "labels", labels)
    check_shape(op, "loss", loss, ["N", "A"])
    check_shape(op, "labels", labels, list(loss.shape))
    check_same_device(op, "labels", labels, "loss", loss)
    ratio, min_negatives = as_number(op, "ratio", ratio), as_count(op, "min_negatives", min_negatives)
    if not 0 <= ratio < math.inf:
        raise ValueError(f"{op}: ratio must be finite and not negative, got {ratio}")
    if labels.dtype == torch.int64:
        labels = labels.clamp(-2, 0)  # which of the three kinds is all that counts, and survives the conversion
    return torch.ops.retinanet_ops.hard_negative_mask(
        loss.detach().float(), labels.to(torch.int32), ratio, min_negatives
    )


@torch.library.register_fake("retinanet_ops::hard_negative_mask")
def _(loss: Tensor, labels: Tensor, ratio: float, min_negatives: int) -> Tensor:
    return loss.new_empty(loss.shape, dtype=torch.bool)
