"""RetinaNet, FCOS, Faster R-CNN and SSD on the kernels of `retinanet_ops`: network, training, evaluation and detection.

The public names are those in `__all__`, and those of `retinanet.data` for data sets. Each name in `__all__` is imported
on first access, so that the network needs only torch and torchvision.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from retinanet.checkpoints.model_file import CheckpointError, load_model, save_model
    from retinanet.checkpoints.transfer import TransferReport, transfer_weights
    from retinanet.detection.evaluate import EvaluationResult, evaluate
    from retinanet.model.config import CompatConfig, ConfigError, RetinaNetConfig
    from retinanet.model.faster_rcnn import FasterRCNN
    from retinanet.model.faster_rcnn_config import FasterRCNNConfig
    from retinanet.model.fcos import FCOS
    from retinanet.model.fcos_config import FCOSConfig
    from retinanet.model.network import RetinaNet
    from retinanet.model.ssd import SSD
    from retinanet.model.ssd_config import SSDConfig
    from retinanet.training.options import TrainOptions
    from retinanet.training.run import TrainResult, train

__all__ = [
    "FCOS",
    "SSD",
    "CheckpointError",
    "CompatConfig",
    "ConfigError",
    "EvaluationResult",
    "FCOSConfig",
    "FasterRCNN",
    "FasterRCNNConfig",
    "RetinaNet",
    "RetinaNetConfig",
    "SSDConfig",
    "TrainOptions",
    "TrainResult",
    "TransferReport",
    "evaluate",
    "load_model",
    "save_model",
    "train",
    "transfer_weights",
]

_MODULES = {
    "checkpoints.model_file": ("CheckpointError", "load_model", "save_model"),
    "checkpoints.transfer": ("TransferReport", "transfer_weights"),
    "detection.evaluate": ("EvaluationResult", "evaluate"),
    "model.config": ("CompatConfig", "ConfigError", "RetinaNetConfig"),
    "model.faster_rcnn": ("FasterRCNN",),
    "model.faster_rcnn_config": ("FasterRCNNConfig",),
    "model.fcos": ("FCOS",),
    "model.fcos_config": ("FCOSConfig",),
    "model.network": ("RetinaNet",),
    "model.ssd": ("SSD",),
    "model.ssd_config": ("SSDConfig",),
    "training.options": ("TrainOptions",),
    "training.run": ("TrainResult", "train"),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            value = globals()[name] = getattr(import_module(f"retinanet.{module}"), name)
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
