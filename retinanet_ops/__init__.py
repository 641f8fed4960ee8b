"""CPU and CUDA kernels for dense one-stage object detectors, registered with PyTorch's dispatcher.

Boxes are `(x1, y1, x2, y2)` in absolute pixels, continuous (width = x2 - x1). Class ids are 0..K-1, without a class for
background. The label of an anchor is a class id, -1 for background or -2 for ignored. Anchor rows are ordered by level,
y, x, and anchor of the cell.

Ops compute in float32, or in float64 for float64 inputs. Their results are bitwise repeatable. No op synchronises with
the device except `nms` and `batched_nms`, whose output size depends on the data.
"""

from importlib.metadata import PackageNotFoundError, version

from . import reference
from ._fallback import FallbackWarning
from ._library import build_info
from .anchors import AnchorGrid, base_anchors
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
from .types import (
    Candidates,
    Detections,
    GroundTruth,
    MatchRule,
    MatchStatistics,
    PaddedBoxes,
    Targets,
    pad_boxes,
    pad_ground_truth,
)

try:
    __version__ = version("retinanet-ops")
except PackageNotFoundError:  # the source tree is on sys.path, but the package is not installed
    __version__ = build_info()["version"]

__all__ = [
    "AnchorGrid",
    "Candidates",
    "Detections",
    "FallbackWarning",
    "GroundTruth",
    "MatchRule",
    "MatchStatistics",
    "PaddedBoxes",
    "Targets",
    "assign_points",
    "assign_targets",
    "base_anchors",
    "batched_nms",
    "batched_nms_padded",
    "box_iou",
    "build_info",
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
    "pad_boxes",
    "pad_ground_truth",
    "reference",
    "sigmoid_focal_loss",
    "soft_nms",
    "soft_nms_scores",
]
