"""The configurations of all architectures."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeAlias

from retinanet.common.errors import ConfigError
from retinanet.model.config import RetinaNetConfig
from retinanet.model.faster_rcnn_config import FasterRCNNConfig
from retinanet.model.fcos_config import FCOSConfig
from retinanet.model.ssd_config import SSDConfig

#: Configurations of detectors with a feature pyramid.
PyramidConfig: TypeAlias = RetinaNetConfig | FCOSConfig | FasterRCNNConfig
#: Configurations of detectors that match anchors to objects.
AnchorConfig: TypeAlias = RetinaNetConfig | SSDConfig | FasterRCNNConfig
DetectorConfig: TypeAlias = PyramidConfig | AnchorConfig

#: The class of the configuration, by the name of the architecture in model files.
CONFIG_CLASSES: dict[str, type[DetectorConfig]] = {
    config_class.architecture: config_class
    for config_class in (RetinaNetConfig, SSDConfig, FCOSConfig, FasterRCNNConfig)
}


def owners_of(field: str) -> list[str]:
    """Return the names of the classes of configurations that have a field."""
    return [c.__name__ for c in CONFIG_CLASSES.values() if field in {own.name for own in dataclasses.fields(c)}]


def config_from_dict(fields: Mapping[str, Any], architecture: str = RetinaNetConfig.architecture) -> DetectorConfig:
    """Make a configuration from its fields by name; absent fields have their defaults.

    Args:
        fields: What `to_dict` of a configuration returned.
        architecture: Name of the architecture. Files of earlier versions name none and hold a RetinaNet.

    Raises:
        ConfigError: The architecture or a field is unknown, or a value is wrong.
    """
    if architecture not in CONFIG_CLASSES:
        raise ConfigError(f"architecture: expected one of {', '.join(CONFIG_CLASSES)}, got {architecture!r}")
    return CONFIG_CLASSES[architecture].from_dict(fields)
