"""Reference of the softmax cross-entropy."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..constants import IGNORED
from ..types import compute_dtype


def softmax_cross_entropy(
    inputs: Tensor,  # [..., K] floating
    targets: Tensor,  # [...] integer
) -> Tensor:  # [...]
    """Return the softmax cross-entropy of each row; see `retinanet_ops.softmax_cross_entropy`."""
    targets = targets.to(torch.int64)
    ignored, is_class = targets == IGNORED, (targets >= 0) & (targets < inputs.shape[-1])
    factor = torch.where(ignored | is_class, 1.0, math.nan)  # makes the loss and the gradient of other rows NaN
    x = inputs.to(compute_dtype(inputs)).where(~ignored[..., None], 0.0) * factor[..., None]
    logit = x.gather(-1, targets.where(is_class, 0)[..., None])[..., 0]
    return (x.logsumexp(-1) - logit).where(~ignored, 0.0)
