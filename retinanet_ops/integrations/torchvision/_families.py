"""The families of torchvision's detectors that can be accelerated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn
from torchvision.models.detection import FCOS, RetinaNet
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.models.detection.ssd import SSD

from . import _faster_rcnn, _fcos, _retinanet, _ssd
from ._model_class import Accelerated
from ._own_code import unwrap


class Family(NamedTuple):
    """What `accelerate` needs to know of a class of torchvision and its subclasses."""

    detector: type[nn.Module]  # torchvision's class
    forward: type[Accelerated]  # the class that has the accelerated methods, first base of the accelerated class
    check: Callable[[Any], None] | None  # raises ValueError if the model overrides what would be bypassed
    parts: tuple[tuple[str, type[nn.Module]], ...] = ()  # attributes that have families of their own, and their classes


#: No class is a subclass of another one.
FAMILIES = (
    Family(RetinaNet, _retinanet.AcceleratedForward, _retinanet.check_retinanet),
    Family(SSD, _ssd.AcceleratedForward, _ssd.check_ssd),
    Family(FCOS, _fcos.AcceleratedForward, _fcos.check_fcos),
    Family(
        GeneralizedRCNN,
        _faster_rcnn.AcceleratedRCNN,
        check=None,
        parts=(("rpn", RegionProposalNetwork), ("roi_heads", RoIHeads)),
    ),
    Family(RegionProposalNetwork, _faster_rcnn.AcceleratedRPN, _faster_rcnn.check_rpn),
    Family(RoIHeads, _faster_rcnn.AcceleratedRoIHeads, _faster_rcnn.check_roi_heads),
)


def family_of(model: Any) -> Family | None:
    """Return the family of a model, or None if it is no detector that can be accelerated."""
    return next((family for family in FAMILIES if isinstance(model, family.detector)), None)


def with_parts(model: Any, family: Family) -> list[tuple[Any, Family]]:
    """Return a model and those of its parts that are accelerated with it, and the family of each."""
    found = [(model, family)]
    for name, owner in family.parts:
        part = _part(model, name)
        found += [(part, of_part) for of_part in FAMILIES if of_part.detector is owner and isinstance(part, owner)]
    return found


def check_parts(model: Any, family: Family) -> None:
    """Raise TypeError if a part that would be accelerated with a model is not torchvision's."""
    for name, owner in family.parts:
        part = _part(model, name)
        if not isinstance(part, owner):
            raise TypeError(
                f"accelerate: model.{name} must be a torchvision {owner.__name__}, got {type(part).__name__}; pass "
                "another part of the model to accelerate that part only"
            )


def _part(model: Any, name: str) -> Any:
    return unwrap(getattr(model, name), "box_coder")
