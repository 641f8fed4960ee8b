"""RetinaNet, FCOS, Faster R-CNN and SSD: networks, losses and detections on the kernels of `retinanet_ops`.

This package imports only torch, torchvision, `retinanet_ops`, the standard library and `retinanet.common`, so it can be
read, copied and used without the rest of `retinanet`.
"""

from retinanet.model.config import CompatConfig, ConfigError, RetinaNetConfig
from retinanet.model.detector import Detector
from retinanet.model.faster_rcnn import FasterRCNN
from retinanet.model.faster_rcnn_config import FasterRCNNConfig
from retinanet.model.fcos import FCOS
from retinanet.model.fcos_config import FCOSConfig
from retinanet.model.network import RetinaNet
from retinanet.model.ssd import SSD
from retinanet.model.ssd_config import SSDConfig
from retinanet.model.targets import Batch, ImageDetections, check_targets, pad_targets, split_detections

__all__ = [
    "FCOS",
    "SSD",
    "Batch",
    "CompatConfig",
    "ConfigError",
    "Detector",
    "FCOSConfig",
    "FasterRCNN",
    "FasterRCNNConfig",
    "ImageDetections",
    "RetinaNet",
    "RetinaNetConfig",
    "SSDConfig",
    "check_targets",
    "pad_targets",
    "split_detections",
]
