"""The codes, choices and default values that several modules share, each defined once."""

from __future__ import annotations

import math

#: Label and match of an anchor that belongs to no object.
BACKGROUND = -1
#: Label of an anchor that takes no part in the loss, and match of an anchor between the two IoU thresholds.
IGNORED = -2

#: Rules by which a ground truth without a match gets its best anchors; see `MatchRule`.
LOW_QUALITY_RULES = ("torchvision", "mmdet", "off")
#: Kinds of box loss; see `dense_box_loss`.
BOX_LOSS_KINDS = ("l1", "smooth_l1", "giou", "diou", "ciou")
#: Default upper bound of a decoded log size ratio: a box is at most 62.5 times as wide or high as its anchor.
MAX_LOG_RATIO = math.log(1000.0 / 16)

#: Largest number of classes of the dense focal loss. A CUDA tile numbers the logits of its 256 anchors with 31 bits.
MAX_CLASSES = 2**23
#: Largest number of pyramid levels that one kernel launch has room for.
MAX_LEVELS = 16
#: Projects whose rules for placing anchors are available; see `base_anchors`.
ANCHOR_PROFILES = ("torchvision", "detectron2", "mmdet", "yhenon", "odtk")
#: RetinaNet's strides of P3 to P7, in pixels.
ANCHOR_STRIDES: tuple[int, ...] = (8, 16, 32, 64, 128)
#: RetinaNet's anchor sizes (square root of the area, pixels) on P3 to P7: three per octave, from four strides on.
ANCHOR_SIZES: tuple[tuple[float, ...], ...] = tuple(
    (4.0 * stride, 4.0 * stride * 2 ** (1 / 3), 4.0 * stride * 2 ** (2 / 3)) for stride in ANCHOR_STRIDES
)
#: The same sizes truncated to whole pixels, as torchvision has them.
TORCHVISION_ANCHOR_SIZES: tuple[tuple[int, ...], ...] = tuple(tuple(int(s) for s in level) for level in ANCHOR_SIZES)
#: RetinaNet's ratios of height to width.
ANCHOR_ASPECT_RATIOS: tuple[float, ...] = (0.5, 1.0, 2.0)
