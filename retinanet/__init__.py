"""RetinaNet on the kernels of `retinanet_ops`: network, training, evaluation and detection.

The names below are the public ones; `retinanet.data` opens data sets.
"""

from retinanet.checkpoint import CheckpointError, load_model, save_model
from retinanet.config import ConfigError, RetinaNetConfig
from retinanet.evaluation import EvaluationResult, evaluate
from retinanet.model import RetinaNet
from retinanet.training import TrainOptions, TrainResult, train

__all__ = [
    "CheckpointError",
    "ConfigError",
    "EvaluationResult",
    "RetinaNet",
    "RetinaNetConfig",
    "TrainOptions",
    "TrainResult",
    "evaluate",
    "load_model",
    "save_model",
    "train",
]
