"""Reference of the box losses that are computed from the outputs of a box head."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..anchors import AnchorGrid, as_boxes
from ..constants import MAX_LOG_RATIO
from ..types import compute_dtype
from ._overlaps import iou_like
from ._rows import rows_of
from .box_coding import decode_boxes, encode_boxes


def dense_box_loss(
    box_deltas: Sequence[Tensor],  # L tensors [N, A*4, H, W] floating
    anchors: Tensor | AnchorGrid,  # [A, 4] or [N, A, 4] floating
    gt_boxes: Tensor,  # [N, M, 4] floating
    matches: Tensor,  # [N, A] integer
    *,
    kind: str = "l1",
    beta: float = 1.0 / 9,
    coder_weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
    max_log_ratio: float | None = MAX_LOG_RATIO,
    offset: float = 0.0,
) -> Tensor:  # [N]
    """Return the box loss of each image; see `retinanet_ops.dense_box_loss`."""
    dtype = compute_dtype(box_deltas[0])
    deltas = rows_of(box_deltas, 4).to(dtype)  # [N, A, 4]
    positive = (matches >= 0)[..., None]
    anchor_boxes = as_boxes(anchors).to(dtype).expand_as(deltas)
    # The target and the prediction of an unmatched anchor are the anchor itself. A match of M or more selects the
    # appended row of NaN.
    padded = torch.cat([gt_boxes.to(dtype), gt_boxes.new_full((len(deltas), 1, 4), math.nan, dtype=dtype)], dim=1)
    index = matches.clamp(0, gt_boxes.shape[1]).long()[..., None].expand_as(deltas)
    target = torch.where(positive, padded.gather(1, index), anchor_boxes)
    deltas = torch.where(positive, deltas, 0.0)
    if kind in ("l1", "smooth_l1"):
        difference = torch.where(
            positive, deltas - encode_boxes(target, anchor_boxes, coder_weights=coder_weights, offset=offset), 0.0
        )
        terms = difference.abs()
        if kind == "smooth_l1":
            square = 0.5 * difference**2 / (beta or 1.0)
            terms = torch.where(terms < beta, square, terms - 0.5 * beta)
        return terms.sum((1, 2))
    predicted = decode_boxes(
        deltas, anchor_boxes, coder_weights=coder_weights, max_log_ratio=max_log_ratio, offset=offset
    )
    return torch.where(positive[..., 0], 1 - iou_like(predicted, target, kind), 0.0).sum(1)
