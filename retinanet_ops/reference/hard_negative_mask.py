"""Reference of hard negative mining: one sort per image."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..constants import BACKGROUND


def hard_negative_mask(
    loss: Tensor,  # [N, A]
    labels: Tensor,  # [N, A] integer
    *,
    ratio: float = 3.0,
    min_negatives: int = 0,
) -> Tensor:  # [N, A] bool
    """Mark the background anchors with the highest loss; see `retinanet_ops.hard_negative_mask`."""
    mask = torch.zeros_like(labels, dtype=torch.bool)
    for n in range(len(loss)):
        background = (labels[n] == BACKGROUND).nonzero()[:, 0]
        # A descending sort puts NaN first.
        order = torch.sort(loss[n, background].float(), descending=True, stable=True).indices
        num_negatives = max(math.ceil(min(ratio * int((labels[n] >= 0).sum()), len(order))), min_negatives)
        mask[n, background[order[:num_negatives]]] = True
    return mask
