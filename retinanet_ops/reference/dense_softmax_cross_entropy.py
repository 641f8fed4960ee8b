"""Reference of the softmax cross-entropy that is computed from the outputs of a classification head."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..constants import IGNORED
from ..types import compute_dtype
from ._rows import rows_of


def dense_softmax_cross_entropy(
    cls_logits: Sequence[Tensor],  # L tensors [N, A*K, H, W] floating
    targets: Tensor,  # [N, sum A*H*W] integer
    num_classes: int,
) -> Tensor:  # [N, sum A*H*W]
    """Return the softmax cross-entropy of each anchor; see `retinanet_ops.dense_softmax_cross_entropy`."""
    targets = targets.to(torch.int64)
    ignored, is_class = targets == IGNORED, (targets >= 0) & (targets < num_classes)
    factor = torch.where(ignored | is_class, 1.0, math.nan)  # makes the loss and the gradient of other rows NaN
    x = rows_of(cls_logits, num_classes).to(compute_dtype(cls_logits[0]))  # [N, A, K]
    x = x.where(~ignored[..., None], 0.0) * factor[..., None]
    logit = x.gather(-1, targets.where(is_class, 0)[..., None])[..., 0]
    return (x.logsumexp(-1) - logit).where(~ignored, 0.0)
