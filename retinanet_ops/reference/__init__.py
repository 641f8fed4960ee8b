"""Every op in plain PyTorch: its specification, the oracle of its tests, a baseline, and the fallback.

Each function has the name and the signature of the op that it specifies. Floating results are computed in the dtype of
the arguments, or in float32 for half precision, so a call with float64 arguments gives the oracle. The functions are
simple rather than fast: matching builds the whole IoU matrix, and NMS is a loop.
"""

from .assign_points import assign_points
from .box_coding import clip_boxes, clip_boxes_to_image, decode_boxes, encode_boxes
from .box_iou import box_iou, complete_box_iou, distance_box_iou, generalized_box_iou
from .box_iou_loss import complete_box_iou_loss, distance_box_iou_loss, generalized_box_iou_loss
from .dense_box_loss import dense_box_loss
from .dense_focal_loss import dense_focal_loss
from .dense_softmax_cross_entropy import dense_softmax_cross_entropy
from .detect import candidates, detect
from .focal_loss import sigmoid_focal_loss
from .gather_class_scores import gather_class_scores
from .hard_negative_mask import hard_negative_mask
from .matching import assign_targets, match_anchors, match_statistics
from .nms import batched_nms, batched_nms_padded, nms
from .soft_nms import soft_nms, soft_nms_scores

__all__ = [
    "assign_points",
    "assign_targets",
    "batched_nms",
    "batched_nms_padded",
    "box_iou",
    "candidates",
    "clip_boxes",
    "clip_boxes_to_image",
    "complete_box_iou",
    "complete_box_iou_loss",
    "decode_boxes",
    "dense_box_loss",
    "dense_focal_loss",
    "dense_softmax_cross_entropy",
    "detect",
    "distance_box_iou",
    "distance_box_iou_loss",
    "encode_boxes",
    "gather_class_scores",
    "generalized_box_iou",
    "generalized_box_iou_loss",
    "hard_negative_mask",
    "match_anchors",
    "match_statistics",
    "nms",
    "sigmoid_focal_loss",
    "soft_nms",
    "soft_nms_scores",
]
