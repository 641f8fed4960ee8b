"""Scores of all classes of chosen anchors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import reference
from ._checks import as_count, check_integer, check_same_device, check_shape
from ._fallback import with_fallback
from ._gradients import converted, detached
from ._heads import check_levels


@with_fallback(reference.gather_class_scores)
def gather_class_scores(
    cls_logits: Sequence[Tensor],  # L tensors [N, A*K, H, W] floating
    anchor_index: Tensor,  # [N, D] integer
    num_classes: int,
) -> Tensor:  # [N, D, K] float32
    """Return the scores of all classes of chosen anchors, such as those of `Detections.anchor_index`.

    Args:
        cls_logits: Outputs of the classification head, channel `a * K + k`; contiguous or channels_last.
        anchor_index: Rows of anchors. The scores of a row out of range, such as the -1 of an unused slot, are 0.
        num_classes: Number of classes K.

    Returns:
        Exact sigmoids of the logits of each anchor, rounded to float32.

    Raises:
        TypeError: An argument has a wrong dtype.
        ValueError: Shapes do not fit each other, `num_classes` is out of its range, or the devices differ.

    Empty input gives an empty result. The op is deterministic and not differentiable.
    """
    op = "gather_class_scores"
    check_levels(op, "cls_logits", cls_logits, "A*K")
    check_integer(op, "anchor_index", anchor_index)
    check_shape(op, "anchor_index", anchor_index, (cls_logits[0].shape[0], "D"))
    check_same_device(op, "anchor_index", anchor_index, "cls_logits[0]", cls_logits[0])
    num_classes = as_count(op, "num_classes", num_classes, least=1)
    for i, level in enumerate(cls_logits):
        if level.shape[1] % num_classes:
            raise ValueError(
                f"{op}: cls_logits[{i}] must have a multiple of {num_classes} channels, got {level.shape[1]}"
            )
    return _gather_class_scores(
        [detached(level) for level in cls_logits], converted(anchor_index, torch.int64), num_classes
    )


_gather_class_scores = torch.ops.retinanet_ops.gather_class_scores.default


@torch.library.register_fake("retinanet_ops::gather_class_scores")
def _(cls_logits: list[Tensor], anchor_index: Tensor, num_classes: int) -> Tensor:
    return anchor_index.new_empty((*anchor_index.shape, num_classes), dtype=torch.float32)
