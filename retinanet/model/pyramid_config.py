"""The fields that the configurations of detectors with a feature pyramid share, and those of their anchors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from retinanet.common.errors import ConfigError
from retinanet.common.validation import checked, integer, integers, is_integer, number, numbers, one_of, optional
from retinanet.model.class_fields import ClassFields
from retinanet.model.compat import CompatConfig
from retinanet_ops.constants import ANCHOR_ASPECT_RATIOS, MAX_LOG_RATIO, TORCHVISION_ANCHOR_SIZES

#: torchvision's networks whose residual blocks have two convolutions.
BASIC_RESNETS = ("resnet18", "resnet34")
#: torchvision's networks whose residual blocks have three convolutions.
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
#: Number of stages that can be frozen, by backbone.
BACKBONE_STAGES = dict.fromkeys(BASIC_RESNETS + BOTTLENECK_RESNETS, 5) | dict.fromkeys(MOBILENETS, 6)
#: Name of a backbone that the caller gives to the model as a module.
CUSTOM = "custom"
BACKBONE_NORMS = ("frozen", "eval", "batch", "sync")


@dataclass(frozen=True)
class PyramidFields(ClassFields):
    """Base of the configurations of detectors with a feature pyramid: backbone, pyramid and preprocessing.

    `RetinaNetConfig` describes the fields.
    """

    #: Size to which every image is resized; None keeps the aspect ratio.
    fixed_size: ClassVar[None] = None

    backbone: str = checked("resnet50", one_of((*BACKBONE_STAGES, CUSTOM)))
    backbone_norm: str = checked("frozen", one_of(BACKBONE_NORMS))
    trainable_backbone_layers: int | None = checked(3, optional(integer(0)))
    fpn_levels: tuple[int, ...] = (3, 4, 5, 6, 7)
    fpn_channels: int = checked(256, integer(1))
    p6_source: str = checked("p5", one_of(("p5", "c5")))

    min_size: tuple[int, ...] | None = checked((800,), optional(integers(1)))
    max_size: int = checked(1333, integer(1))
    image_mean: tuple[float, float, float] = checked((0.485, 0.456, 0.406), numbers(3))
    image_std: tuple[float, float, float] = checked((0.229, 0.224, 0.225), numbers(3, positive=True))
    size_divisible: int = checked(32, integer(1))

    @property
    def conventions(self) -> CompatConfig:
        """How the project that the model comes from differs from torchvision; by default not at all."""
        return CompatConfig()

    def _check_pyramid(self) -> None:
        stages, layers = BACKBONE_STAGES.get(self.backbone), self.trainable_backbone_layers
        if stages is not None and layers is not None and layers > stages:
            raise ConfigError(f"trainable_backbone_layers: expected an integer in 0..{stages}, got {layers}")
        levels = self.fpn_levels
        consecutive = isinstance(levels, tuple) and levels and all(is_integer(v) for v in levels)
        if not consecutive or levels != tuple(range(levels[0], levels[0] + len(levels))):
            raise ConfigError(f"fpn_levels: expected consecutive levels such as (3, 4, 5), got {levels!r}")
        if not (2 <= levels[0] <= 5 and levels[-1] <= 7):
            raise ConfigError(f"fpn_levels: expected a first level in 2..5 and none above 7, got {levels!r}")


@dataclass(frozen=True)
class AnchorFields(PyramidFields):
    """Base of the configurations of detectors whose pyramid levels have anchors; `RetinaNetConfig` describes them."""

    anchor_sizes: tuple[tuple[float, ...], ...] = TORCHVISION_ANCHOR_SIZES
    aspect_ratios: tuple[float, ...] = checked(ANCHOR_ASPECT_RATIOS, numbers(positive=True))
    anchor_shapes: tuple[tuple[tuple[float, float], ...], ...] = ()
    max_log_ratio: float = checked(MAX_LOG_RATIO, number(above=0))

    @property
    def anchors_per_cell(self) -> int:
        """Number of anchors at each position of each level."""
        if self.anchor_shapes:
            return len(self.anchor_shapes[0])
        return len(self.anchor_sizes[0]) * len(self.aspect_ratios)

    def _check_anchor_shapes(self) -> None:
        shapes, pair = self.anchor_shapes, numbers(2, positive=True)
        levels = isinstance(shapes, tuple) and len(shapes) == len(self.fpn_levels)
        if not levels or not all(
            isinstance(level, tuple) and level and all(map(pair.accepts, level)) for level in shapes
        ):
            raise ConfigError(
                f"anchor_shapes: expected {len(self.fpn_levels)} lists of (width, height) above 0, one list per level "
                f"of fpn_levels, got {shapes!r}"
            )
        if len({len(level) for level in shapes}) > 1:
            raise ConfigError(
                f"anchor_shapes: expected equally many on each level (they share the heads), got {shapes!r}"
            )

    def _check_anchor_sizes(self) -> None:
        if self.anchor_shapes:
            self._check_anchor_shapes()
            return
        sizes, rule = self.anchor_sizes, numbers(positive=True)
        if not isinstance(sizes, tuple) or len(sizes) != len(self.fpn_levels):
            raise ConfigError(
                f"anchor_sizes: expected {len(self.fpn_levels)} entries, one per level of fpn_levels, "
                f"got {len(sizes) if isinstance(sizes, tuple) else sizes!r}"
            )
        if not all(rule.accepts(level) and len(level) == len(sizes[0]) for level in sizes):
            raise ConfigError(
                f"anchor_sizes: expected equally many sizes above 0 on each level (they share the heads), got {sizes!r}"
            )
