"""A pytest plugin that puts the ops in the place of torchvision's functions, or accelerates its detectors."""

from __future__ import annotations

import functools
import os
from typing import Any

import torchvision
from torchvision.models import detection
from torchvision.models._api import BUILTIN_MODELS
from torchvision.ops import boxes

import retinanet_ops as ops
from retinanet_ops.integrations.torchvision import accelerate
from retinanet_ops.integrations.torchvision._model_class import Accelerated

#: The functions of torchvision.ops that the ops replace.
NAMES = (
    "nms",
    "batched_nms",
    "box_iou",
    "generalized_box_iou",
    "distance_box_iou",
    "complete_box_iou",
    "clip_boxes_to_image",
    "sigmoid_focal_loss",
    "generalized_box_iou_loss",
    "distance_box_iou_loss",
    "complete_box_iou_loss",
)


def accelerated(build: Any) -> Any:
    """Return a builder of accelerated models."""

    @functools.wraps(build)
    def wrapper(*args: Any, **options: Any) -> Any:
        global built
        built += 1
        model = accelerate(build(*args, **options))
        assert isinstance(model, Accelerated)
        return model

    return wrapper


#: How many models the tests built.
built = 0


def pytest_sessionfinish(session: Any) -> None:
    """Fail if the tests used nothing of this package."""
    if os.environ["TORCHVISION_SUITE"] == "models" and not built:
        session.exitstatus = 5


if os.environ["TORCHVISION_SUITE"] == "ops":
    for name in NAMES:
        for module in (torchvision.ops, boxes):
            if hasattr(module, name):
                setattr(module, name, getattr(ops, name))
else:
    for name, build in list(BUILTIN_MODELS.items()):
        if build.__module__.startswith("torchvision.models.detection"):
            BUILTIN_MODELS[name] = accelerated(build)
            setattr(detection, name, BUILTIN_MODELS[name])
