"""The configuration of an SSD: one frozen dataclass that is stored in every model file, and the networks that it names.

Sizes, scales and steps are those of Liu et al. 2016 (arXiv:1512.02325) for VOC, in torchvision's form, and those of
torchvision's SSDlite. A network with MobileNetV2 has the default boxes of the network whose name it shares.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from retinanet.common.errors import ConfigError
from retinanet.common.validation import (
    as_tuples,
    check_fields,
    checked,
    flag,
    integer,
    make_record,
    number,
    numbers,
    one_of,
    optional,
)
from retinanet.model.class_fields import COCO_91_NAMES, ClassFields
from retinanet_ops.constants import MAX_LOG_RATIO


@dataclass(frozen=True)
class SSDNetwork:
    """What distinguishes the networks of SSD.

    Attributes:
        backbone: torchvision's name of the classification network.
        size: Height and width in pixels to which every image is resized.
        grid_sizes: Height and width of each level's maps.
        aspect_ratios: Aspect ratios of each level's default boxes besides 1. Each ratio gives two boxes, of which one
            stands upright and one lies.
        scales: Scale of each level's default boxes, as a share of the image, and a last one that only counts in the
            geometric mean with the scale before it.
        steps: Pixels between the default boxes of each level. None divides the image evenly.
        stages: Number of backbone stages that can be frozen.
        image_mean: Mean of each RGB channel that is subtracted.
        image_std: Standard deviation by which each RGB channel is divided.
    """

    backbone: str
    size: int
    grid_sizes: tuple[int, ...]
    aspect_ratios: tuple[tuple[int, ...], ...]
    scales: tuple[float, ...]
    steps: tuple[int, ...] | None
    stages: int
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]

    @property
    def anchors_per_cell(self) -> tuple[int, ...]:
        """Number of default boxes at each position, by level."""
        return tuple(2 + 2 * len(ratios) for ratios in self.aspect_ratios)


# torchvision's VGG16 takes pixels of 0..255 from which the mean is subtracted.
_VGG_MEAN, _VGG_STD = (0.48235, 0.45882, 0.40784), (1 / 255, 1 / 255, 1 / 255)
_VGG_NETWORKS = {
    "ssd300": SSDNetwork(
        backbone="vgg16",
        size=300,
        grid_sizes=(38, 19, 10, 5, 3, 1),
        aspect_ratios=((2,), (2, 3), (2, 3), (2, 3), (2,), (2,)),
        scales=(0.07, 0.15, 0.33, 0.51, 0.69, 0.87, 1.05),
        steps=(8, 16, 32, 64, 100, 300),
        stages=5,
        image_mean=_VGG_MEAN,
        image_std=_VGG_STD,
    ),
    "ssd512": SSDNetwork(
        backbone="vgg16",
        size=512,
        grid_sizes=(64, 32, 16, 8, 4, 2, 1),
        aspect_ratios=((2,), (2, 3), (2, 3), (2, 3), (2, 3), (2,), (2,)),
        scales=(0.07, 0.15, 0.3, 0.45, 0.6, 0.75, 0.9, 1.05),
        steps=(8, 16, 32, 64, 128, 256, 512),
        stages=5,
        image_mean=_VGG_MEAN,
        image_std=_VGG_STD,
    ),
}
_LITE = SSDNetwork(
    backbone="mobilenet_v3_large",
    size=320,
    grid_sizes=(20, 10, 5, 3, 2, 1),
    aspect_ratios=((2, 3),) * 6,
    scales=(0.2, 0.35, 0.5, 0.65, 0.8, 0.95, 1.0),
    steps=None,
    stages=6,
    image_mean=(0.5, 0.5, 0.5),
    image_std=(0.5, 0.5, 0.5),
)


def _with_mobilenet_v2(network: SSDNetwork) -> SSDNetwork:
    return replace(
        network, backbone="mobilenet_v2", stages=6, image_mean=(0.485, 0.456, 0.406), image_std=(0.229, 0.224, 0.225)
    )


NETWORKS = {
    **{f"{name}_vgg16": network for name, network in _VGG_NETWORKS.items()},
    "ssdlite320": _LITE,
    **{
        f"{name}_mobilenet_v2": _with_mobilenet_v2(network)
        for name, network in (*_VGG_NETWORKS.items(), ("ssdlite320", _LITE))
    },
}
CLS_LOSSES = ("mining", "focal")


@dataclass(frozen=True)
class SSDConfig(ClassFields):
    """Classes, network, matching, losses and post-processing of an SSD.

    Sequences may be given as lists, or as one value; they are stored as tuples. `to_dict` and `from_dict` round-trip
    through JSON.

    Attributes:
        class_names: Name of each foreground class. Label `k` of targets and detections is `class_names[k]`. The default
            are torchvision's COCO classes without the background.
        category_ids: Id of each class in the data set that the model was trained on (COCO JSON), in the same order.
            Empty gives 0, 1, 2 ...
        class_weights: Factor on the class loss of a matched default box, by its class; empty is 1 for every class.
        network: `ssd300_vgg16` (8,732 default boxes), `ssd512_vgg16` (24,564) or `ssdlite320` (3,234), which is
            torchvision's `ssdlite320_mobilenet_v3_large`. `ssd300_mobilenet_v2`, `ssd512_mobilenet_v2` and
            `ssdlite320_mobilenet_v2` have the same default boxes on a MobileNetV2.
        trainable_backbone_layers: Number of stages of the classification network, counted from the last, that are
            trained: 0 to 5 for VGG16, 0 to 6 for the others. None trains all.
        reduced_tail: The last stage of MobileNetV3 has half its channels, as in torchvision's COCO weights. ImageNet
            weights need the whole stage. Other networks do not have this choice.
        cls_loss: `mining` is the softmax cross entropy with a background class over the matched default boxes and the
            hard negatives. `focal` is the sigmoid focal loss without a background class over all default boxes.
        negative_ratio: Hard negatives per matched default box of an image; for `mining`.
        min_negatives: Least number of hard negatives of an image, so that images without objects teach the
            background; for `mining`.
        focal_alpha: Weight of foreground in the focal loss. A negative value turns the weighting off.
        focal_gamma: Focusing exponent of the focal loss.
        prior_probability: Initial score of every class, which sets the initial bias of the class head; for `focal`.
        fg_iou_threshold: A default box whose IoU with an object reaches this is matched. Each object is also matched to
            the default box with which its IoU is highest.
        box_weights: Factors of (dx, dy, dw, dh) in the box coder, the reciprocals of SSD's variances.
        max_log_ratio: Upper bound of dw and dh when boxes are decoded.
        smooth_l1_beta: Absolute error at which smooth-L1 turns from quadratic to linear.
        score_threshold: Detections need a score above this.
        topk: Candidates that each level keeps before NMS.
        nms_threshold: A detection is dropped if its IoU with a better one of its class is above this.
        max_detections: Detections that each image keeps.

    Raises:
        ConfigError: A value is out of its range. The message names the field.
    """

    architecture: ClassVar[str] = "ssd"
    #: Images are resized to a fixed size, so these settings of a RetinaNet have no effect.
    min_size: ClassVar[None] = None
    size_divisible: ClassVar[int] = 1

    class_names: tuple[str, ...] = COCO_91_NAMES[1:]

    network: str = checked("ssd300_vgg16", one_of(tuple(NETWORKS)))
    trainable_backbone_layers: int | None = checked(None, optional(integer(0)))
    reduced_tail: bool = checked(True, flag())

    cls_loss: str = checked("mining", one_of(CLS_LOSSES))
    negative_ratio: float = checked(3.0, number(low=0))
    min_negatives: int = checked(0, integer(0))
    focal_alpha: float = checked(0.25, number(high=1))
    focal_gamma: float = checked(2.0, number(low=0))
    prior_probability: float = checked(0.01, number(above=0, below=1))

    fg_iou_threshold: float = checked(0.5, number(0, 1))
    box_weights: tuple[float, float, float, float] = checked((10.0, 10.0, 5.0, 5.0), numbers(4, positive=True))
    max_log_ratio: float = checked(MAX_LOG_RATIO, number(above=0))
    smooth_l1_beta: float = checked(1.0, number(low=0))

    score_threshold: float = checked(0.01, number(0, 1))
    topk: int = checked(1000, integer(1))
    nms_threshold: float = checked(0.45, number(0, 1))
    max_detections: int = checked(200, integer(1))

    def __post_init__(self) -> None:
        """Turn lists and single values into tuples and check every field."""
        as_tuples(self)
        check_fields(self)
        self._check_classes()
        stages, layers = self.layout.stages, self.trainable_backbone_layers
        if layers is not None and layers > stages:
            raise ConfigError(f"trainable_backbone_layers: expected an integer in 0..{stages}, got {layers}")
        if self.cls_loss == "focal":
            for name, unused in (("negative_ratio", 3.0), ("min_negatives", 0)):
                if getattr(self, name) != unused:
                    raise ConfigError(
                        f"{name}: does not apply to cls_loss focal, which takes all default boxes; "
                        f"got {getattr(self, name)!r}"
                    )

    @property
    def layout(self) -> SSDNetwork:
        """The sizes of the network."""
        return NETWORKS[self.network]

    @property
    def backbone(self) -> str:
        """The classification network, by torchvision's name."""
        return self.layout.backbone

    @property
    def is_lite(self) -> bool:
        """Whether heads and extra blocks are those of SSDlite, with depthwise convolutions."""
        return self.network.startswith("ssdlite")

    @property
    def trains_norm(self) -> bool:
        """Whether the network has batch normalisation, which is trained."""
        return self.backbone != "vgg16"

    @property
    def bg_iou_threshold(self) -> float:
        """A default box whose IoU with every object is below this is background; none is in between."""
        return self.fg_iou_threshold

    @property
    def fixed_size(self) -> tuple[int, int]:
        """Height and width in pixels to which every image is resized."""
        return self.layout.size, self.layout.size

    @property
    def max_size(self) -> int:
        """The longer side of every resized image."""
        return self.layout.size

    @property
    def image_mean(self) -> tuple[float, float, float]:
        """Mean of each RGB channel that is subtracted."""
        return self.layout.image_mean

    @property
    def image_std(self) -> tuple[float, float, float]:
        """Standard deviation of each RGB channel by which the channel is divided."""
        return self.layout.image_std

    @property
    def num_scores(self) -> int:
        """Number of class logits of a default box: under `mining`, the first one is that of the background."""
        return self.num_classes + (self.cls_loss == "mining")

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> SSDConfig:
        """Make a configuration from its fields by name; absent fields have their defaults.

        Raises:
            ConfigError: A field is unknown or its value is wrong.
        """
        return make_record(cls, fields, "configuration")
