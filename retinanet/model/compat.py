"""The part of a configuration that exists only for models of other projects."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from retinanet.common.errors import ConfigError
from retinanet.common.validation import check_fields, checked, flag, number, one_of, optional
from retinanet_ops.constants import ANCHOR_PROFILES

Config = TypeVar("Config")


@dataclass(frozen=True)
class CompatConfig:
    """Differences between projects that change what the same weights compute; `retinanet convert` sets them.

    The defaults suit every model that does not come from another project.

    Attributes:
        stride_in_1x1: Bottleneck blocks halve the resolution in their first convolution, as the ImageNet weights of
            MSRA and Caffe2 expect, and not in the second, as torchvision's do.
        p7_relu: P7 is computed from relu(P6) instead of P6 itself.
        head_norm_bias: The convolutions of the heads have a bias although GroupNorm follows (detectron2).
        backbone_norm_eps: Epsilon of the backbone's normalisation; None is the network's own (1e-5; 1e-3 for
            MobileNetV3). torchvision's COCO weights of version 1 were trained with 1e-5 and are used with 0.
        anchor_profile: Project whose rules place the anchors. `torchvision` rounds base anchors to pixels and takes
            strides of `image // map` per axis. `detectron2` and `mmdet` do not round and take strides of `2**n`.
            `yhenon` and `odtk` do the same and shift the anchors by half a stride. In every profile, slot `a` of a cell
            is `ratio * sizes + size`.
        box_offset: 1 for models that were trained with box widths of `x2 - x1 + 1` (ODTK), else 0. It is added to x2
            and y2 of every anchor, after which the usual coding, matching and NMS compute what the original does.
        min_log_ratio: Lower bound of the decoded dw and dh; None is unbounded.
        clip_after_nms: Boxes are clipped to the image after NMS (detectron2) instead of before it (torchvision).
        loss_ema_decay: Decay of the moving average of `loss_normaliser="ema"`. The average starts with the mean of the
            first step.

    Raises:
        ConfigError: A value is out of its range. The message names the field.
    """

    stride_in_1x1: bool = checked(False, flag())
    p7_relu: bool = checked(True, flag())
    head_norm_bias: bool = checked(False, flag())
    backbone_norm_eps: float | None = checked(None, optional(number(low=0)))
    anchor_profile: str = checked("torchvision", one_of(ANCHOR_PROFILES))
    box_offset: float = checked(0.0, number(0, 1))
    min_log_ratio: float | None = checked(None, optional(number(high=0)))
    clip_after_nms: bool = checked(False, flag())
    loss_ema_decay: float = checked(0.9, number(0, 1))

    def __post_init__(self) -> None:
        """Check every field."""
        check_fields(self, "compat.")


_NAMES = frozenset(field.name for field in dataclasses.fields(CompatConfig))


def merge_fields(*parts: Mapping[str, Any]) -> dict[str, Any]:
    """Merge fields of `RetinaNetConfig`, and those of `compat` one by one; later parts override earlier ones.

    Fields that belong to `compat` may stand beside the others, as in configurations of earlier versions.

    Args:
        *parts: Fields by name, in the form of `RetinaNetConfig.to_dict`.

    Returns:
        All fields by name, with those of `compat` in a nested mapping.

    Raises:
        ConfigError: `compat` is not a mapping.
    """
    merged: dict[str, Any] = {}
    compat: dict[str, Any] = {}
    for part in parts:
        merged |= {name: value for name, value in part.items() if name not in _NAMES and name != "compat"}
        compat |= {name: value for name, value in part.items() if name in _NAMES}
        nested = part.get("compat", {})
        if isinstance(nested, CompatConfig):
            nested = dataclasses.asdict(nested)
        if not isinstance(nested, Mapping):
            raise ConfigError(f"compat: expected an object with fields, got {type(nested).__name__}")
        compat |= nested
    return merged | ({"compat": compat} if compat else {})


def name_moved_fields(config_class: type[Config]) -> type[Config]:
    """Decorate a dataclass so that its constructor refuses fields of `CompatConfig` with a hint to use `compat`."""
    original = config_class.__init__

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **fields: Any) -> None:
        for name in fields:
            if name in _NAMES:
                raise ConfigError(f"{name}: is a field of compat; write compat=CompatConfig({name}={fields[name]!r})")
        original(self, *args, **fields)

    config_class.__init__ = __init__  # type: ignore[method-assign]
    return config_class
