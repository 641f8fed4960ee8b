"""The families of torchvision's detectors that can be accelerated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn
from torchvision.models.detection import FCOS, RetinaNet
from torchvision.models.detection.ssd import SSD

from . import _fcos, _retinanet, _ssd
from ._model_class import Accelerated


class Family(NamedTuple):
    """What `accelerate` needs to know of a class of torchvision and its subclasses."""

    detector: type[nn.Module]  # torchvision's class
    forward: type[Accelerated]  # the class that has the accelerated `forward`, first base of the accelerated class
    check: Callable[[Any], None]  # raises ValueError if the model overrides what would be bypassed


#: No class is a subclass of another one.
FAMILIES = (
    Family(RetinaNet, _retinanet.AcceleratedForward, _retinanet.check_retinanet),
    Family(SSD, _ssd.AcceleratedForward, _ssd.check_ssd),
    Family(FCOS, _fcos.AcceleratedForward, _fcos.check_fcos),
)


def family_of(model: Any) -> Family | None:
    """Return the family of a model, or None if it is no detector that can be accelerated."""
    return next((family for family in FAMILIES if isinstance(model, family.detector)), None)
