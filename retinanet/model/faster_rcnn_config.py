"""The configuration of a Faster R-CNN: one frozen dataclass that is stored in every model file.

The defaults are those of torchvision's `fasterrcnn_resnet50_fpn` with a pretrained backbone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from retinanet.common.errors import ConfigError
from retinanet.common.validation import as_tuples, check_fields, checked, integer, make_record, number, numbers, one_of
from retinanet.model.pyramid_config import AnchorFields


@dataclass(frozen=True)
class FasterRCNNConfig(AnchorFields):
    """Classes, networks, matching, sampling, post-processing and preprocessing of a Faster R-CNN.

    Sequences may be given as lists, or as one value; they are stored as tuples. `to_dict` and `from_dict` round-trip
    through JSON. Classes, backbone, pyramid, anchors and preprocessing have the fields of `RetinaNetConfig`. The region
    proposal network (RPN) uses all levels of the pyramid; regions are pooled from the levels up to 5.

    Attributes:
        p6_source: Map from which P6 is computed: `pool` (every second cell of P5; torchvision), `p5` or `c5` (a
            convolution).
        rpn_fg_iou_threshold: An anchor whose IoU with an object reaches this is foreground, and so is the best anchor
            of an object.
        rpn_bg_iou_threshold: An anchor whose IoU with every object is below this is background.
        rpn_batch_size: Anchors that are sampled from each image for the losses of the RPN.
        rpn_positive_fraction: Largest share of foreground among them.
        rpn_topk_training: Anchors that each level keeps before the NMS of the RPN, in training.
        rpn_topk: The same in evaluation.
        proposals_training: Proposals that each image keeps after the NMS of the RPN, in training.
        proposals: The same in evaluation.
        rpn_nms_threshold: A proposal is dropped if its IoU with a better one of its level is above this.
        roi_fg_iou_threshold: A proposal whose IoU with an object reaches this is foreground.
        roi_bg_iou_threshold: A proposal whose IoU with every object is below this is background.
        roi_batch_size: Proposals and objects that are sampled from each image for the losses of the second stage.
        roi_positive_fraction: Largest share of foreground among them.
        representation_size: Features of a region in the hidden layers of the second stage.
        box_weights: Factors of (dx, dy, dw, dh) in the box coder of the second stage. Those of the RPN are 1.
        score_threshold: Detections need a score above this.
        nms_threshold: A detection is dropped if its IoU with a better one of its class is above this.
        max_detections: Detections that each image keeps.

    Raises:
        ConfigError: A value is out of its range. The message names the field.
    """

    architecture: ClassVar[str] = "fasterrcnn"

    fpn_levels: tuple[int, ...] = (2, 3, 4, 5, 6)
    p6_source: str = checked("pool", one_of(("pool", "p5", "c5")))
    anchor_sizes: tuple[tuple[float, ...], ...] = ((32,), (64,), (128,), (256,), (512,))

    rpn_fg_iou_threshold: float = checked(0.7, number(0, 1))
    rpn_bg_iou_threshold: float = checked(0.3, number(0, 1))
    rpn_batch_size: int = checked(256, integer(1))
    rpn_positive_fraction: float = checked(0.5, number(0, 1))
    rpn_topk_training: int = checked(2000, integer(1))
    rpn_topk: int = checked(1000, integer(1))
    proposals_training: int = checked(2000, integer(1))
    proposals: int = checked(1000, integer(1))
    rpn_nms_threshold: float = checked(0.7, number(0, 1))

    roi_fg_iou_threshold: float = checked(0.5, number(0, 1))
    roi_bg_iou_threshold: float = checked(0.5, number(0, 1))
    roi_batch_size: int = checked(512, integer(1))
    roi_positive_fraction: float = checked(0.25, number(0, 1))
    representation_size: int = checked(1024, integer(1))
    box_weights: tuple[float, float, float, float] = checked((10.0, 10.0, 5.0, 5.0), numbers(4, positive=True))

    score_threshold: float = checked(0.05, number(0, 1))
    nms_threshold: float = checked(0.5, number(0, 1))
    max_detections: int = checked(100, integer(1))

    def __post_init__(self) -> None:
        """Turn lists and single values into tuples and check every field."""
        as_tuples(self)
        check_fields(self)
        self._check_classes()
        self._check_pyramid()
        self._check_anchor_sizes()
        if self.p6_source == "pool" and self.fpn_levels[-1] > 6:
            raise ConfigError(
                f"fpn_levels: expected none above 6 with p6_source pool, got {self.fpn_levels!r}; p6_source p5 or c5 "
                "computes level 7"
            )
        for stage in ("rpn", "roi"):
            low, high = (getattr(self, f"{stage}_{kind}_iou_threshold") for kind in ("bg", "fg"))
            if low > high:
                raise ConfigError(
                    f"{stage}_bg_iou_threshold: expected at most {stage}_fg_iou_threshold {high}, got {low}"
                )

    @property
    def fg_iou_threshold(self) -> float:
        """An anchor whose IoU with an object reaches this is foreground."""
        return self.rpn_fg_iou_threshold

    @property
    def bg_iou_threshold(self) -> float:
        """An anchor whose IoU with every object is below this is background."""
        return self.rpn_bg_iou_threshold

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> FasterRCNNConfig:
        """Make a configuration from its fields by name; absent fields have their defaults.

        Raises:
            ConfigError: A field is unknown or its value is wrong.
        """
        return make_record(cls, fields, "configuration")
