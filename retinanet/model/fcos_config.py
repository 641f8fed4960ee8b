"""The configuration of an FCOS: one frozen dataclass that is stored in every model file.

The defaults are those of torchvision's `fcos_resnet50_fpn` with a pretrained backbone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from retinanet.common.errors import ConfigError
from retinanet.common.validation import as_tuples, check_fields, checked, integer, make_record, number
from retinanet.model.pyramid_config import PyramidFields

#: torchvision's heads normalise their channels in this number of groups.
HEAD_GROUPS = 32


@dataclass(frozen=True)
class FCOSConfig(PyramidFields):
    """Classes, network, assignment, losses, post-processing and preprocessing of an FCOS.

    Sequences may be given as lists, or as one value; they are stored as tuples. `to_dict` and `from_dict` round-trip
    through JSON. Classes, backbone, pyramid and preprocessing have the fields of `RetinaNetConfig`. `fpn_channels` must
    be a multiple of 32, because the heads have GroupNorm with 32 groups.

    Attributes:
        head_depth: Number of 3x3 convolutions in each head before its output layers.
        prior_probability: Initial score of every class, which sets the initial bias of the classification head.
        center_sampling_radius: An object is assigned to points inside it that are less than this many strides from its
            centre, in x and in y.
        focal_alpha: Weight of foreground in the focal loss. A negative value turns the weighting off.
        focal_gamma: Focusing exponent of the focal loss.
        score_threshold: Detections need a score above this. The score is the geometric mean of the probability of the
            class and of the centreness.
        topk: Candidates that each level keeps before NMS.
        nms_threshold: A detection is dropped if its IoU with a better one of its class is above this.
        max_detections: Detections that each image keeps.

    Raises:
        ConfigError: A value is out of its range. The message names the field.
    """

    architecture: ClassVar[str] = "fcos"

    head_depth: int = checked(4, integer(0))
    prior_probability: float = checked(0.01, number(above=0, below=1))

    center_sampling_radius: float = checked(1.5, number(above=0))
    focal_alpha: float = checked(0.25, number(high=1))
    focal_gamma: float = checked(2.0, number(low=0))

    score_threshold: float = checked(0.2, number(0, 1))
    topk: int = checked(1000, integer(1))
    nms_threshold: float = checked(0.6, number(0, 1))
    max_detections: int = checked(100, integer(1))

    def __post_init__(self) -> None:
        """Turn lists and single values into tuples and check every field."""
        as_tuples(self)
        check_fields(self)
        self._check_classes()
        self._check_pyramid()
        if self.fpn_channels % HEAD_GROUPS:
            raise ConfigError(
                f"fpn_channels: expected a multiple of {HEAD_GROUPS} for the GroupNorm of FCOS's heads, "
                f"got {self.fpn_channels}"
            )

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> FCOSConfig:
        """Make a configuration from its fields by name; absent fields have their defaults.

        Raises:
            ConfigError: A field is unknown or its value is wrong.
        """
        return make_record(cls, fields, "configuration")
