"""Everything that defines a RetinaNet: one dataclass, stored in its checkpoint, never passed a second time.

The defaults are those of torchvision's `retinanet_resnet50_fpn` with a pretrained backbone: ResNet-50 with
frozen batch normalisation, FPN P3-P7 with P6 made from P5, nine anchors per cell, focal and L1 loss, 91 COCO
classes.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any

from torchvision.models.detection import RetinaNet_ResNet50_FPN_Weights

from retinanet_ops.constants import (
    ANCHOR_ASPECT_RATIOS,
    ANCHOR_PROFILES,
    BOX_LOSS_KINDS,
    LOW_QUALITY_RULES,
    MAX_LOG_RATIO,
    TORCHVISION_ANCHOR_SIZES,
)

#: Networks of torchvision whose stages have residual blocks of two convolutions, or of three.
BASIC_RESNETS = ("resnet18", "resnet34")
BOTTLENECK_RESNETS = (
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "wide_resnet50_2",
    "wide_resnet101_2",
)
MOBILENETS = ("mobilenet_v2", "mobilenet_v3_large", "mobilenet_v3_small")
#: Number of stages whose training can be switched off, by backbone.
BACKBONE_STAGES = dict.fromkeys(BASIC_RESNETS + BOTTLENECK_RESNETS, 5) | dict.fromkeys(MOBILENETS, 6)
#: A backbone that is a module of the caller's; see `RetinaNet`.
CUSTOM = "custom"
BACKBONE_NORMS = ("frozen", "eval", "batch", "sync")
LOSS_NORMALISERS = ("per_image", "batch", "ema")


class ConfigError(ValueError):
    """A value of the configuration is wrong; the message names the field, what it expects and what came."""


def _coco_91_names() -> tuple[str, ...]:
    # torchvision's 91 rows are indexed by COCO category id; the ids that COCO never used are all called
    # "N/A".
    names = RetinaNet_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    return tuple(f"N/A {i}" if name == "N/A" else name for i, name in enumerate(names))


@dataclass(frozen=True)
class RetinaNetConfig:
    """Classes, network, anchors, matching, losses, post-processing and preprocessing of a RetinaNet.

    Sequences may be given as lists; they are stored as tuples. `to_json` and `from_json` round-trip.

    Attributes:
        class_names: Name of each foreground class; label `k` of targets and detections is `class_names[k]`.
        category_ids: Id of each class in the dataset that the model was trained on (COCO json), same order.
            Empty gives 0, 1, 2 ...
        backbone: A network of torchvision's ResNet family (`resnet18` to `resnet152`, `resnext50_32x4d`,
            `resnext101_32x8d`, `resnext101_64x4d`, `wide_resnet50_2`, `wide_resnet101_2`), `mobilenet_v2`,
            `mobilenet_v3_large`, `mobilenet_v3_small`, or `custom`: a module that is given to `RetinaNet`.
        backbone_norm: `frozen` (statistics and affine parameters are constants; for pretrained weights), `eval`
            (statistics are constants, affine parameters are trained; for pretrained weights and small batches),
            `batch` (ordinary batch normalisation; for training from scratch) or `sync` (the same, over the images of
            all processes).
        backbone_norm_eps: What that normalisation adds to variances; None is the network's own (1e-5; 1e-3 for
            MobileNetV3). torchvision's COCO weights of version 1 were trained with 1e-5 and are used with 0.
        stride_in_1x1: Stages of residual blocks of three convolutions halve the resolution in the first of them (MSRA's
            and Caffe's weights), not in the second (torchvision's).
        trainable_backbone_layers: Number of backbone stages, counted from the last, that are trained: 0 to 5
            for ResNets, 0 to 6 for MobileNets. None trains all.
        fpn_levels: Consecutive pyramid levels, from P2..P5 up to at most P7; level `n` has stride `2**n`.
        fpn_channels: Channels of every pyramid level and of the heads' convolutions.
        p6_source: `p5` (torchvision v1) or `c5` (torchvision v2): the map that P6 is made of.
        p7_relu: P7 is made of relu(P6), not of P6 itself.
        head_depth: Number of 3x3 convolutions in each head before its output layer.
        head_norm: `none` or `group` (GroupNorm after each convolution of the heads).
        head_norm_groups: Groups of that GroupNorm.
        head_norm_bias: The heads' convolutions have biases before that GroupNorm, too (detectron2).
        prior_probability: Foreground probability that the classification bias starts from.
        anchor_sizes: Sizes (square root of the area, pixels) of the anchors of each level.
        aspect_ratios: Height / width of the anchors, the same on each level.
        anchor_profile: Whose rules place them. `torchvision`: coordinates rounded to pixels, strides
            `image // map` per axis. `detectron2`, `mmdet`: not rounded, strides `2**n`. `yhenon`, `odtk`: the same,
            centred half a stride further. Slot `a` of a position is `ratio * sizes + size` in each.
        box_weights: Factors of (dx, dy, dw, dh) in the box coding.
        max_log_ratio: Upper bound of the coded dw and dh when boxes are decoded.
        min_log_ratio: Lower bound; None is unbounded.
        box_offset: 1 for models that were trained with boxes of the width `x2 - x1 + 1` (ODTK), else 0. Their anchors
            reach that much further, and with them the coding, matching and NMS of ordinary boxes are those of theirs.
        fg_iou_threshold: An anchor with at least this IoU with a ground-truth box is foreground.
        bg_iou_threshold: An anchor with less than this IoU with every ground-truth box is background.
        low_quality: Rule by which a ground-truth box without such an anchor gets its best one:
            `torchvision`, `mmdet` or `off`.
        focal_alpha: Weight of foreground in the focal loss; negative switches weighting off.
        focal_gamma: Focusing exponent of the focal loss.
        label_smoothing: The targets 1 and 0 of the focal loss become `1 - s / 2` and `s / 2`.
        box_loss: `l1`, `smooth_l1`, `giou`, `diou` or `ciou`.
        loss_normaliser: What an image's loss sums are divided by: `per_image` (its number of foreground anchors,
            at least 1; torchvision), `batch` (the mean of that number over the images of all processes, at least 1),
            under which an image with few objects does not outweigh the others, or `ema` (the moving average of that
            mean over the steps of training, at least 1).
        loss_ema_decay: Of that moving average, which starts with the mean of the first step.
        smooth_l1_beta: Point where smooth-L1 turns from quadratic to linear.
        score_threshold: Detections need a score above this.
        topk: Candidates kept of each level before NMS.
        nms_threshold: A detection that overlaps a better one of its class by more IoU than this is dropped.
        max_detections: Detections kept of each image.
        clip_after_nms: Boxes are clipped to the image after NMS (detectron2), not before it (torchvision).
        min_size: Length in pixels to which the shorter image side is resized; one of several is drawn at
            random in training, the last is used otherwise. None leaves images at their own size.
        max_size: Bound in pixels on the longer side after resizing.
        image_mean: Mean of each RGB channel, in 0..1, that is subtracted.
        image_std: Standard deviation of each RGB channel that is divided by.
        size_divisible: Batches are padded to a multiple of this many pixels.

    Raises:
        ConfigError: A value is out of its range; the message names the field.
    """

    class_names: tuple[str, ...] = dataclasses.field(default_factory=_coco_91_names)
    category_ids: tuple[int, ...] = ()

    backbone: str = "resnet50"
    backbone_norm: str = "frozen"
    backbone_norm_eps: float | None = None
    stride_in_1x1: bool = False
    trainable_backbone_layers: int | None = 3
    fpn_levels: tuple[int, ...] = (3, 4, 5, 6, 7)
    fpn_channels: int = 256
    p6_source: str = "p5"
    p7_relu: bool = True
    head_depth: int = 4
    head_norm: str = "none"
    head_norm_groups: int = 32
    head_norm_bias: bool = False
    prior_probability: float = 0.01

    anchor_sizes: tuple[tuple[float, ...], ...] = TORCHVISION_ANCHOR_SIZES
    aspect_ratios: tuple[float, ...] = ANCHOR_ASPECT_RATIOS
    anchor_profile: str = "torchvision"
    box_weights: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0)
    max_log_ratio: float = MAX_LOG_RATIO
    min_log_ratio: float | None = None
    box_offset: float = 0.0

    fg_iou_threshold: float = 0.5
    bg_iou_threshold: float = 0.4
    low_quality: str = "torchvision"
    focal_alpha: float = 0.25
    focal_gamma: float = 2.0
    label_smoothing: float = 0.0
    box_loss: str = "l1"
    loss_normaliser: str = "per_image"
    loss_ema_decay: float = 0.9
    smooth_l1_beta: float = 1 / 9

    score_threshold: float = 0.05
    topk: int = 1000
    nms_threshold: float = 0.5
    max_detections: int = 300
    clip_after_nms: bool = False

    min_size: tuple[int, ...] | None = (800,)
    max_size: int = 1333
    image_mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    image_std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    size_divisible: int = 32

    @property
    def num_classes(self) -> int:
        """Number of foreground classes, which is the number of class logits of an anchor."""
        return len(self.class_names)

    @property
    def anchors_per_cell(self) -> int:
        """Number of anchors at each position of each level."""
        return len(self.anchor_sizes[0]) * len(self.aspect_ratios)

    def __post_init__(self) -> None:
        """Turns lists into tuples and checks every field."""
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _as_tuple(getattr(self, field.name)))
        self._check_classes()
        self._check_network()
        self._check_anchors()
        self._check_training()
        self._check_images()

    def _check_classes(self) -> None:
        names, ids = self.class_names, self.category_ids
        if not isinstance(names, tuple) or not names or not all(isinstance(n, str) for n in names):
            raise ConfigError(f"class_names: expected at least one name, got {names!r}")
        if len(set(names)) != len(names):
            twice = next(n for n in names if names.count(n) > 1)
            raise ConfigError(f"class_names: expected different names, got {twice!r} twice")
        if not isinstance(ids, tuple) or not all(_is_int(i) for i in ids) or len(set(ids)) != len(ids):
            raise ConfigError(f"category_ids: expected different integers, got {ids!r}")
        if not ids:
            object.__setattr__(self, "category_ids", tuple(range(len(names))))
        elif len(ids) != len(names):
            raise ConfigError(f"category_ids: expected {len(names)} ids, one per class, got {len(ids)}")

    def _check_network(self) -> None:
        self._one_of("backbone", (*BACKBONE_STAGES, CUSTOM))
        self._one_of("backbone_norm", BACKBONE_NORMS)
        if self.backbone_norm_eps is not None:
            self._number("backbone_norm_eps", 0, math.inf)
        self._flag("stride_in_1x1")
        if self.stride_in_1x1 and self.backbone not in BOTTLENECK_RESNETS:
            raise ConfigError(
                f"stride_in_1x1: expected a backbone of {', '.join(BOTTLENECK_RESNETS)}, got {self.backbone}"
            )
        self._one_of("p6_source", ("p5", "c5"))
        self._flag("p7_relu")
        self._one_of("head_norm", ("none", "group"))
        self._flag("head_norm_bias")
        self._integer("fpn_channels", 1)
        self._integer("head_depth", 0)
        self._integer("head_norm_groups", 1)
        if self.trainable_backbone_layers is not None:
            self._integer("trainable_backbone_layers", 0, BACKBONE_STAGES.get(self.backbone))
        levels = self.fpn_levels
        consecutive = isinstance(levels, tuple) and levels and all(_is_int(v) for v in levels)
        if not consecutive or levels != tuple(range(levels[0], levels[0] + len(levels))):
            raise ConfigError(f"fpn_levels: expected consecutive levels such as (3, 4, 5), got {levels!r}")
        if not (2 <= levels[0] <= 5 and levels[-1] <= 7):
            raise ConfigError(f"fpn_levels: expected a first level in 2..5 and none above 7, got {levels!r}")
        if self.head_norm == "group" and self.fpn_channels % self.head_norm_groups:
            raise ConfigError(
                f"head_norm_groups: expected a divisor of fpn_channels {self.fpn_channels}, got {self.head_norm_groups}"
            )
        self._number("prior_probability", 0, 1, exclusive=True)

    def _check_anchors(self) -> None:
        sizes = self.anchor_sizes
        if not isinstance(sizes, tuple) or not all(isinstance(level, tuple) and level for level in sizes):
            raise ConfigError(f"anchor_sizes: expected one non-empty list of sizes per level, got {sizes!r}")
        if len(sizes) != len(self.fpn_levels):
            raise ConfigError(
                f"anchor_sizes: expected {len(self.fpn_levels)} entries, one per level of fpn_levels, got {len(sizes)}"
            )
        if len({len(level) for level in sizes}) != 1:
            raise ConfigError("anchor_sizes: expected equally many sizes on each level because the heads are shared")
        if not all(_is_number(v) and v > 0 for level in sizes for v in level):
            raise ConfigError(f"anchor_sizes: expected sizes above 0, got {sizes!r}")
        self._numbers("aspect_ratios", None)
        self._one_of("anchor_profile", ANCHOR_PROFILES)
        self._numbers("box_weights", 4)
        self._number("max_log_ratio", 0, math.inf, exclusive=True)
        if self.min_log_ratio is not None:
            self._number("min_log_ratio", -math.inf, 0)
        self._number("box_offset", 0, 1)

    def _check_training(self) -> None:
        self._number("fg_iou_threshold", 0, 1)
        self._number("bg_iou_threshold", 0, 1)
        if self.bg_iou_threshold > self.fg_iou_threshold:
            raise ConfigError(
                f"bg_iou_threshold: expected at most fg_iou_threshold {self.fg_iou_threshold}, "
                f"got {self.bg_iou_threshold}"
            )
        self._one_of("low_quality", LOW_QUALITY_RULES)
        self._number("focal_alpha", -math.inf, 1)
        self._number("focal_gamma", 0, math.inf)
        self._number("label_smoothing", 0, 1)
        self._one_of("box_loss", BOX_LOSS_KINDS)
        self._one_of("loss_normaliser", LOSS_NORMALISERS)
        self._number("loss_ema_decay", 0, 1)
        self._number("smooth_l1_beta", 0, math.inf)
        self._number("score_threshold", 0, 1)
        self._integer("topk", 1)
        self._number("nms_threshold", 0, 1)
        self._integer("max_detections", 1)
        self._flag("clip_after_nms")

    def _check_images(self) -> None:
        sizes = self.min_size
        if sizes is not None and not (isinstance(sizes, tuple) and sizes and all(_is_int(s) and s >= 1 for s in sizes)):
            raise ConfigError(f"min_size: expected integers above 0, or None for no resizing, got {sizes!r}")
        self._integer("max_size", 1)
        self._integer("size_divisible", 1)
        self._numbers("image_mean", 3, positive=False)
        self._numbers("image_std", 3)

    def _one_of(self, name: str, choices: tuple[str, ...]) -> None:
        value = getattr(self, name)
        if value not in choices:
            raise ConfigError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")

    def _flag(self, name: str) -> None:
        value = getattr(self, name)
        if not isinstance(value, bool):
            raise ConfigError(f"{name}: expected true or false, got {value!r}")

    def _integer(self, name: str, low: int, high: int | None = None) -> None:
        value = getattr(self, name)
        if not _is_int(value) or value < low or (high is not None and value > high):
            bounds = f"of at least {low}" if high is None else f"in {low}..{high}"
            raise ConfigError(f"{name}: expected an integer {bounds}, got {value!r}")

    def _number(self, name: str, low: float, high: float, *, exclusive: bool = False) -> None:
        value = getattr(self, name)
        inside = _is_number(value) and (low < value < high if exclusive else low <= value <= high)
        if not inside:
            raise ConfigError(f"{name}: expected a number in {low}..{high}, got {value!r}")

    def _numbers(self, name: str, count: int | None, *, positive: bool = True) -> None:
        value = getattr(self, name)
        fits = isinstance(value, tuple) and value and (count is None or len(value) == count)
        if not fits or not all(_is_number(v) and (v > 0 or not positive) for v in value):
            kind = "numbers above 0" if positive else "numbers"
            raise ConfigError(f"{name}: expected {count or 'one or more'} {kind}, got {value!r}")

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, in a form that JSON can hold."""
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        """The configuration as JSON text."""
        return json.dumps(self.to_dict())

    @classmethod
    def torchvision_v1(cls, **fields: Any) -> RetinaNetConfig:
        """The model of torchvision's `retinanet_resnet50_fpn`: the defaults; `fields` override them."""
        return cls(**fields)

    @classmethod
    def torchvision_v2(cls, **fields: Any) -> RetinaNetConfig:
        """The model of its `retinanet_resnet50_fpn_v2`: P6 from C5, GroupNorm in the heads, GIoU loss, batch norm."""
        version_2 = {"backbone_norm": "batch", "p6_source": "c5", "head_norm": "group", "box_loss": "giou"}
        return cls(**{**version_2, **fields})

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> RetinaNetConfig:
        """The configuration from its fields by name; absent fields have their defaults.

        Raises:
            ConfigError: A field is unknown or its value is wrong.
        """
        if not isinstance(fields, dict):
            raise ConfigError(f"configuration: expected an object with fields, got {type(fields).__name__}")
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(fields) - known)
        if unknown:
            raise ConfigError(f"{unknown[0]}: no such field in the configuration of a RetinaNet")
        return cls(**fields)

    @classmethod
    def from_json(cls, text: str) -> RetinaNetConfig:
        """The configuration from JSON text.

        Raises:
            ConfigError: The text is not JSON, a field is unknown or its value is wrong.
        """
        try:
            fields = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"configuration: expected JSON, got an error: {error}") from error
        return cls.from_dict(fields)


def _as_tuple(value: Any) -> Any:
    return tuple(_as_tuple(v) for v in value) if isinstance(value, (list, tuple)) else value


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
