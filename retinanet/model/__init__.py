"""The RetinaNet: network, losses and detections on the kernels of `retinanet_ops`.

This package imports torch, torchvision, `retinanet_ops` and `retinanet.common` alone, so it can be read, copied and
used without the rest of `retinanet`.
"""

from retinanet.model.config import ConfigError, RetinaNetConfig
from retinanet.model.network import RetinaNet
from retinanet.model.targets import check_targets, pack_targets, unpack_detections

__all__ = ["ConfigError", "RetinaNet", "RetinaNetConfig", "check_targets", "pack_targets", "unpack_detections"]
