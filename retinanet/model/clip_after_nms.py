"""Post-processing in another order than that of `retinanet_ops.detect`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import retinanet_ops as ops
from retinanet.model.config import RetinaNetConfig


def suppress_unclipped(
    candidates: ops.Detections,  # C slots for each image
    box_deltas: Sequence[Tensor],  # L tensors [N, A*4, H, W]
    anchors: ops.AnchorGrid,
    image_sizes: Tensor,  # [N, 2] (height, width)
    config: RetinaNetConfig,
) -> ops.Detections:  # D = config.max_detections slots for each image
    """NMS of candidates on their boxes before clipping, then clipping: detectron2's order.

    Boxes that reach out of the image overlap less than what is left of them inside.

    Args:
        candidates: Of `ops.detect` without suppression; their boxes are clipped, so they are decoded again.
        box_deltas: Outputs of the box head.
        anchors: The anchors that these belong to.
        image_sizes: Height and width in pixels to which boxes are clipped in the end.
        config: Gives the coder, the threshold and the number of slots.
    """
    rows = torch.cat([_rows(level) for level in box_deltas], dim=1)  # [N, anchors, 4]
    anchor = candidates.anchor_index.clamp(min=0)  # that of an unused slot is -1
    boxes = ops.decode_boxes(
        rows.gather(1, anchor[..., None].expand(-1, -1, 4)),
        anchors.boxes()[anchor],
        coder_weights=config.box_weights,
        max_log_ratio=config.max_log_ratio,
        min_log_ratio=config.compat.min_log_ratio,
    )
    slots = config.max_detections
    index, count = ops.batched_nms_padded(
        boxes,
        candidates.scores,
        candidates.labels,
        iou_threshold=config.nms_threshold,
        max_detections=slots + 1,  # one more tells whether there were too many
        counts=candidates.count,
    )
    index, unused = index[:, :slots].clamp(min=0), index[:, :slots] < 0
    kept = ops.clip_boxes(boxes.gather(1, index[..., None].expand(-1, -1, 4)), image_sizes)
    return ops.Detections(
        boxes=kept.masked_fill(unused[..., None], 0),
        scores=candidates.scores.gather(1, index).masked_fill(unused, 0),
        labels=candidates.labels.gather(1, index).masked_fill(unused, -1),
        count=count.clamp(max=slots),
        anchor_index=candidates.anchor_index.gather(1, index).masked_fill(unused, -1),
        truncated=candidates.truncated | (count > slots),
    )


def _rows(level: Tensor) -> Tensor:  # [N, A*4, H, W] -> [N, H*W*A, 4]
    return level.unflatten(1, (-1, 4)).permute(0, 3, 4, 1, 2).flatten(1, 3)
