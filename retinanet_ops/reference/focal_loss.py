"""Reference of the sigmoid focal loss, and its terms for class ids."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .._reduction import check_reduction
from ..constants import IGNORED
from ..types import compute_dtype


def sigmoid_focal_loss(
    inputs: Tensor,  # [...] floating
    targets: Tensor,  # same shape as inputs, or integer [...] without the last dimension
    alpha: float = 0.25,
    gamma: float = 2.0,
    reduction: str = "none",
    *,
    pos_weight: Tensor | float | None = None,  # [K], [K, 1, ..., 1] or one number
    ignore_value: float | None = None,
) -> Tensor:  # inputs' shape, or [] for "sum" and "mean"
    """Return the focal loss of independent logits; see `retinanet_ops.sigmoid_focal_loss`."""
    check_reduction("sigmoid_focal_loss", reduction)
    dtype = compute_dtype(inputs)
    x = inputs.to(dtype)
    dense = targets.shape == inputs.shape
    t = targets.to(dtype) if dense else (targets[..., None] == torch.arange(x.shape[-1], device=x.device)).to(dtype)
    left_out = torch.zeros_like(t, dtype=torch.bool)  # elements whose loss and gradient are 0
    if dense and ignore_value is not None:
        # The ignored value is rounded to the dtype of the targets, as the targets are.
        value = torch.tensor(ignore_value, dtype=targets.dtype if targets.is_floating_point() else dtype)
        left_out = t == value.to(dtype)
    factor = None
    if pos_weight is not None:
        positive = torch.as_tensor(pos_weight, dtype=dtype, device=x.device)
        factor = torch.where(t == 0, 1.0, torch.where(t == 1, positive, 1 + (positive - 1) * t))
        left_out = left_out | ((factor == 0) & ~x.isfinite())  # 0 times a finite loss is 0, and has a gradient
    x = torch.where(left_out, 0.0, x)
    if dense:
        loss = _focal_terms(x, torch.where(left_out, 0.0, t), alpha, gamma)
    else:
        loss = class_focal_terms(x, targets, alpha, gamma, 0.0)
    loss = torch.where(left_out, 0.0, loss if factor is None else loss * factor)
    if reduction == "sum":
        return loss.sum()
    if reduction == "mean":
        return loss.mean()
    return loss.to(inputs.dtype)


def class_focal_terms(
    x: Tensor,  # [..., K]
    labels: Tensor,  # [...]
    alpha: float,
    gamma: float,
    smoothing: float,
) -> Tensor:  # [..., K]
    """Return the loss of each logit for targets that are class ids, background or ignored."""
    num_classes = x.shape[-1]
    labels = labels.to(torch.int64)[..., None]
    ignored = labels == IGNORED
    invalid = (labels < IGNORED) | (labels >= num_classes)
    targets = (labels == torch.arange(num_classes, device=x.device)).to(x.dtype)
    if smoothing:
        targets = targets * (1 - smoothing) + smoothing / 2
    x = torch.where(ignored, 0.0, torch.where(invalid, math.nan, x))
    return torch.where(ignored, 0.0, _focal_terms(x, targets, alpha, gamma))


def _focal_terms(
    x: Tensor,  # [...]
    t: Tensor,  # [...]
    alpha: float,
    gamma: float,
) -> Tensor:  # [...]
    # softplus(x) is written as -logsigmoid(-x), because torch's softplus is linear above 20 and loses float64 digits.
    alpha_t = alpha * t + (1 - alpha) * (1 - t) if alpha >= 0 else torch.ones_like(t)
    hard = (t == 0) | (t == 1)
    z = torch.where(t == 1, -x, x)
    # For a target of 0 or 1, 1 - p_t is sigmoid(z) and the cross-entropy is softplus(z).
    cross_entropy = -F.logsigmoid(-z)
    modulator = torch.exp(gamma * F.logsigmoid(z)) if gamma != 0 else torch.ones_like(z)
    hard_terms = modulator * cross_entropy
    soft_t = torch.where(hard, 0.5, t)
    one_minus_pt = torch.sigmoid(x) * (1 - soft_t) + torch.sigmoid(-x) * soft_t
    soft_terms = one_minus_pt**gamma * -(soft_t * F.logsigmoid(x) + (1 - soft_t) * F.logsigmoid(-x))
    terms = torch.where(hard, hard_terms, soft_terms)
    return alpha_t * torch.where((alpha_t == 0) & (terms == math.inf), 0.0, terms)
