"""Codes, choices and default values that several modules share."""

from __future__ import annotations

import math

#: Label and match of an anchor that belongs to no object.
BACKGROUND = -1
#: Label and match of an anchor that takes no part in the loss: its IoU is between the thresholds, or a crowd covers it.
IGNORED = -2

#: Rules by which a ground truth is matched to its best anchors, even below the IoU threshold; see `MatchRule`.
LOW_QUALITY_RULES = ("torchvision", "mmdet", "ssd", "off")
#: Kinds of box loss; see `dense_box_loss`.
BOX_LOSS_KINDS = ("l1", "smooth_l1", "giou", "diou", "ciou")
#: Default upper bound of a decoded log size ratio, by which a box is at most 62.5 times as wide or high as its anchor.
MAX_LOG_RATIO = math.log(1000.0 / 16)

#: Largest number of classes of the dense focal loss. A CUDA tile numbers the logits of its 256 anchors with 31 bits.
MAX_CLASSES = 2**23
#: Largest number of pyramid levels that one kernel launch has room for.
MAX_LEVELS = 16
#: Projects whose rules for placing anchors are available; see `base_anchors`.
ANCHOR_PROFILES = ("torchvision", "detectron2", "mmdet", "yhenon", "odtk")
#: RetinaNet's strides of P3 to P7, in pixels.
ANCHOR_STRIDES: tuple[int, ...] = (8, 16, 32, 64, 128)
#: RetinaNet's anchor sizes (square root of the area, pixels) on P3 to P7: three per octave, starting at four strides.
ANCHOR_SIZES: tuple[tuple[float, ...], ...] = tuple(
    (4.0 * stride, 4.0 * stride * 2 ** (1 / 3), 4.0 * stride * 2 ** (2 / 3)) for stride in ANCHOR_STRIDES
)
#: The same sizes truncated to whole pixels, as in torchvision.
TORCHVISION_ANCHOR_SIZES: tuple[tuple[int, ...], ...] = tuple(tuple(int(s) for s in level) for level in ANCHOR_SIZES)
#: RetinaNet's ratios of height to width.
ANCHOR_ASPECT_RATIOS: tuple[float, ...] = (0.5, 1.0, 2.0)
