"""The configuration of a RetinaNet: one frozen dataclass that is stored in every model file.

The defaults are those of torchvision's `retinanet_resnet50_fpn` with a pretrained backbone: ResNet-50 with frozen batch
normalisation, FPN P3-P7 with P6 computed from P5, nine anchors per cell, focal and L1 loss, 91 COCO classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from retinanet.common.errors import ConfigError
from retinanet.common.validation import (
    as_tuples,
    check_fields,
    checked,
    integer,
    make_record,
    number,
    numbers,
    one_of,
)
from retinanet.model.compat import CompatConfig, merge_fields, name_moved_fields
from retinanet.model.pyramid_config import BOTTLENECK_RESNETS, AnchorFields
from retinanet_ops.constants import BOX_LOSS_KINDS, LOW_QUALITY_RULES

LOSS_NORMALISERS = ("per_image", "batch", "ema")


@name_moved_fields
@dataclass(frozen=True)
class RetinaNetConfig(AnchorFields):
    """Classes, network, anchors, matching, losses, post-processing and preprocessing of a RetinaNet.

    Sequences may be given as lists, or as one value; they are stored as tuples. `to_dict` and `from_dict` round-trip
    through JSON.

    Attributes:
        class_names: Name of each foreground class. Label `k` of targets and detections is `class_names[k]`.
        category_ids: Id of each class in the data set that the model was trained on (COCO JSON), in the same order.
            Empty gives 0, 1, 2 ...
        class_weights: Factor on the focal loss of a foreground anchor, by its class; empty is 1 for every class.
        backbone: A network of torchvision's ResNet family (`resnet18` to `resnet152`, `resnext50_32x4d`,
            `resnext101_32x8d`, `resnext101_64x4d`, `wide_resnet50_2`, `wide_resnet101_2`), `mobilenet_v2`,
            `mobilenet_v3_large`, `mobilenet_v3_small`, or `custom` for a module that is given to `RetinaNet`.
        backbone_norm: `frozen` (statistics and affine parameters are constants; for pretrained weights), `eval`
            (statistics are constants, affine parameters are trained; for pretrained weights and small batches), `batch`
            (ordinary batch normalisation; for training from scratch) or `sync` (batch normalisation over the images of
            all processes).
        trainable_backbone_layers: Number of backbone stages, counted from the last, that are trained: 0 to 5 for
            ResNets, 0 to 6 for MobileNets. None trains all.
        fpn_levels: Consecutive pyramid levels. The first is 2, 3, 4 or 5, and none is above 7. Level `n` has stride
            `2**n`.
        fpn_channels: Channels of every pyramid level and of the heads' convolutions.
        p6_source: Map from which P6 is computed: `p5` (torchvision v1) or `c5` (torchvision v2).
        head_depth: Number of 3x3 convolutions in each head before its output layer.
        head_norm: `none`, or `group` for GroupNorm after each convolution of the heads.
        head_norm_groups: Number of groups of the heads' GroupNorm.
        prior_probability: Initial score of every class, which sets the initial bias of the classification head.
        anchor_sizes: Sizes (square root of the area, in pixels) of the anchors of each level.
        aspect_ratios: Height / width of the anchors, the same on each level.
        anchor_shapes: Width and height in pixels of each anchor of each level, in place of `anchor_sizes` and
            `aspect_ratios`, as `retinanet anchors fit` finds them. Empty uses those.
        box_weights: Factors of (dx, dy, dw, dh) in the box coder.
        max_log_ratio: Upper bound of dw and dh when boxes are decoded.
        fg_iou_threshold: An anchor whose IoU with a ground-truth box reaches this is foreground.
        bg_iou_threshold: An anchor whose IoU with every ground-truth box is below this is background.
        low_quality: Rule that gives a ground-truth box its best anchor although their IoU is below `fg_iou_threshold`:
            `torchvision`, `mmdet` or `off`.
        focal_alpha: Weight of foreground in the focal loss. A negative value turns the weighting off.
        focal_gamma: Focusing exponent of the focal loss.
        label_smoothing: Smoothing `s`, with which the targets 1 and 0 of the focal loss become `1 - s / 2` and `s / 2`.
        box_loss: `l1`, `smooth_l1`, `giou`, `diou` or `ciou`.
        loss_normaliser: Divisor of an image's loss sums: `per_image` (its number of foreground anchors; torchvision),
            `batch` (the mean of that number over the images of all processes, so that an image with few objects does
            not outweigh the others) or `ema` (the moving average of that mean over the training steps). Every divisor
            is at least 1.
        smooth_l1_beta: Absolute error at which smooth-L1 turns from quadratic to linear.
        score_threshold: Detections need a score above this.
        topk: Candidates that each level keeps before NMS.
        nms_threshold: A detection is dropped if its IoU with a better one of its class is above this.
        max_detections: Detections that each image keeps.
        min_size: Length in pixels to which the shorter image side is resized. Training draws one of several at random,
            and evaluation takes the last. None leaves images at their original size.
        max_size: Upper bound in pixels on the longer side after resizing.
        image_mean: Mean of each RGB channel, in 0..1, that is subtracted.
        image_std: Standard deviation of each RGB channel, in 0..1, by which the channel is divided.
        size_divisible: Batches are padded to a multiple of this many pixels.
        compat: Fields that exist for models of other projects.

    Raises:
        ConfigError: A value is out of its range. The message names the field.
    """

    architecture: ClassVar[str] = "retinanet"
    head_depth: int = checked(4, integer(0))
    head_norm: str = checked("none", one_of(("none", "group")))
    head_norm_groups: int = checked(32, integer(1))
    prior_probability: float = checked(0.01, number(above=0, below=1))

    box_weights: tuple[float, float, float, float] = checked((1.0, 1.0, 1.0, 1.0), numbers(4, positive=True))
    fg_iou_threshold: float = checked(0.5, number(0, 1))
    bg_iou_threshold: float = checked(0.4, number(0, 1))
    low_quality: str = checked("torchvision", one_of(LOW_QUALITY_RULES))
    focal_alpha: float = checked(0.25, number(high=1))
    focal_gamma: float = checked(2.0, number(low=0))
    label_smoothing: float = checked(0.0, number(0, 1))
    box_loss: str = checked("l1", one_of(BOX_LOSS_KINDS))
    loss_normaliser: str = checked("per_image", one_of(LOSS_NORMALISERS))
    smooth_l1_beta: float = checked(1 / 9, number(low=0))

    score_threshold: float = checked(0.05, number(0, 1))
    topk: int = checked(1000, integer(1))
    nms_threshold: float = checked(0.5, number(0, 1))
    max_detections: int = checked(300, integer(1))

    compat: CompatConfig = CompatConfig()

    @property
    def conventions(self) -> CompatConfig:
        """How the project that the model comes from differs from torchvision."""
        return self.compat

    def __post_init__(self) -> None:
        """Turn lists and single values into tuples and check every field."""
        as_tuples(self)
        if not isinstance(self.compat, CompatConfig):
            object.__setattr__(self, "compat", make_record(CompatConfig, self.compat, "configuration's compat"))
        check_fields(self)
        self._check_classes()
        self._check_pyramid()
        self._check_network()
        self._check_anchor_sizes()
        if self.bg_iou_threshold > self.fg_iou_threshold:
            raise ConfigError(
                f"bg_iou_threshold: expected at most fg_iou_threshold {self.fg_iou_threshold}, "
                f"got {self.bg_iou_threshold}"
            )

    def _check_network(self) -> None:
        if self.compat.stride_in_1x1 and self.backbone not in BOTTLENECK_RESNETS:
            raise ConfigError(
                f"compat.stride_in_1x1: expected a backbone of {', '.join(BOTTLENECK_RESNETS)}, got {self.backbone}"
            )
        if self.head_norm == "group" and self.fpn_channels % self.head_norm_groups:
            raise ConfigError(
                f"head_norm_groups: expected a divisor of fpn_channels {self.fpn_channels}, got {self.head_norm_groups}"
            )

    @classmethod
    def torchvision_v2(cls, **fields: Any) -> RetinaNetConfig:
        """Return the configuration of torchvision's `retinanet_resnet50_fpn_v2`, with some fields replaced.

        It differs from the defaults by P6 from C5, GroupNorm in the heads, GIoU loss and ordinary batch normalisation.
        """
        version_2 = {"backbone_norm": "batch", "p6_source": "c5", "head_norm": "group", "box_loss": "giou"}
        return cls(**{**version_2, **fields})

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> RetinaNetConfig:
        """Make a configuration from its fields by name; absent fields have their defaults.

        Fields of `compat` may stand beside the others, as they do in model files of earlier versions.

        Raises:
            ConfigError: A field is unknown or its value is wrong.
        """
        return make_record(cls, merge_fields(fields) if isinstance(fields, Mapping) else fields, "configuration")
