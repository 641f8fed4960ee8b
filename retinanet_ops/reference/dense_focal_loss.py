"""Reference of the focal loss that is computed from the outputs of a classification head."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..constants import IGNORED
from ..types import compute_dtype
from ._rows import rows_of
from .focal_loss import class_focal_terms


def dense_focal_loss(
    cls_logits: Sequence[Tensor],  # L tensors [N, A*K, H, W] floating
    labels: Tensor,  # [N, sum A*H*W] integer
    num_classes: int,
    *,
    alpha: float = 0.25,
    gamma: float = 2.0,
    anchor_weight: Tensor | None = None,  # [N, sum A*H*W] floating
    label_smoothing: float = 0.0,
) -> Tensor:  # [N]
    """Return the focal loss of each image; see `retinanet_ops.dense_focal_loss`."""
    dtype = compute_dtype(cls_logits[0])
    x = rows_of(cls_logits, num_classes).to(dtype)  # [N, A, K]
    terms = class_focal_terms(x, labels, alpha, gamma, label_smoothing)
    if anchor_weight is not None:
        # The loss of an ignored anchor is 0 whatever its weight, and that of an anchor of weight 0 whatever its logits.
        factor = torch.where(labels == IGNORED, 0.0, anchor_weight.to(dtype))[..., None]
        terms = torch.where((factor == 0) & ~terms.isfinite(), 0.0, terms) * factor
    return terms.sum((1, 2))
