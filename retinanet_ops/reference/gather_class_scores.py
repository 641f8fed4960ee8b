"""Reference of the class scores of chosen anchors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._rows import rows_of


def gather_class_scores(
    cls_logits: Sequence[Tensor],  # L tensors [N, A*K, H, W]
    anchor_index: Tensor,  # [N, D] integer
    num_classes: int,
) -> Tensor:  # [N, D, K] float32
    """Return the scores of all classes of chosen anchors; see `retinanet_ops.gather_class_scores`."""
    logits = rows_of(cls_logits, num_classes)  # [N, A, K]
    valid = (anchor_index >= 0) & (anchor_index < logits.shape[1])
    padded = torch.cat((logits, logits.new_full((len(logits), 1, num_classes), -torch.inf)), dim=1)
    row = torch.where(valid, anchor_index, logits.shape[1])
    return padded.gather(1, row[..., None].expand(-1, -1, num_classes)).double().sigmoid().float()
