"""Transfer of a trained model's weights to a model with other classes, anchors or sizes.

A row of the classification head belongs to an (anchor slot, class) pair; the rows of a class are copied to the class of
the same name, and those of the background of an SSD or a Faster R-CNN to the background. A tensor without a counterpart
keeps its initial value, and the report says why.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from operator import attrgetter
from typing import TypeAlias

import torch
from torch import Tensor

from retinanet.checkpoints.model_file import CheckpointError, ModelFile, read_model
from retinanet.common.errors import listed
from retinanet.common.torch_files import unwrapped
from retinanet.model.detector import Detector
from retinanet.model.detector_config import DetectorConfig
from retinanet.model.faster_rcnn_config import FasterRCNNConfig
from retinanet.model.network import COUNTERS
from retinanet.model.ssd_config import SSDConfig

# The output layers with rows for each class: those of the classification heads of RetinaNet, FCOS, SSD and SSDlite, and
# both of the second stage of Faster R-CNN, which has box deltas for each class.
_CLASS_ROWS = re.compile(
    r"(head\.classification_head\.(cls_logits|module_list\.\d+|module_list\.\d+\.1)"
    r"|roi_heads\.box_predictor\.(cls_score|bbox_pred))\.(weight|bias)"
)
Columns: TypeAlias = tuple[str | None, ...]
#: Fields that decide what the weights mean: with another value, the same weights give other detections.
_FIELDS_THAT_CHANGE_WEIGHTS = {
    "retinanet": (
        "fpn_levels",
        "anchor_sizes",
        "aspect_ratios",
        "anchor_shapes",
        "compat.anchor_profile",
        "box_weights",
        "compat.box_offset",
        "compat.min_log_ratio",
        "max_log_ratio",
        "image_mean",
        "image_std",
        "compat.backbone_norm_eps",
        "head_norm_groups",
        "p6_source",
        "compat.p7_relu",
        "compat.stride_in_1x1",
    ),
    "ssd": ("network", "cls_loss", "box_weights", "max_log_ratio"),
    "fcos": ("fpn_levels", "p6_source", "image_mean", "image_std"),
    "fasterrcnn": (
        "fpn_levels",
        "p6_source",
        "anchor_sizes",
        "aspect_ratios",
        "anchor_shapes",
        "box_weights",
        "max_log_ratio",
        "image_mean",
        "image_std",
    ),
}


@dataclass
class TransferReport:
    """What a transfer did with the weights in a file.

    Attributes:
        loaded: Names of tensors that were copied whole.
        adapted: Names of tensors that got only the rows of some classes, each with the reason.
        skipped: Names of the model's tensors that keep their initial value, because the file lacks them or has them in
            another shape, each with the reason.
        unused: Names of the file's tensors that the model lacks.
        differing: Configuration fields whose values differ between the file and the model, so that the same weights
            have another meaning.
    """

    loaded: list[str] = field(default_factory=list)
    adapted: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)
    differing: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """Return one line for each outcome and reason."""
        lines = [f"{len(self.loaded)} tensors loaded"]
        for title, reasons in (("adapted", self.adapted), ("skipped", self.skipped)):
            by_reason: dict[str, list[str]] = {}
            for name, reason in reasons.items():
                by_reason.setdefault(reason, []).append(name)
            lines += [f"{title}: {listed(names)}: {reason}" for reason, names in by_reason.items()]
        if self.unused:
            lines.append(f"unused: {listed(self.unused)}: not in the model")
        if self.differing:
            lines.append(f"trained with other values of {', '.join(self.differing)}")
        return "\n".join(lines)


def transfer_weights(path: str | os.PathLike[str], model: Detector) -> TransferReport:
    """Copy the weights of a model file into a model, as far as they fit.

    Args:
        path: A file that `save_model` wrote.
        model: The model, changed in place even if an error is raised.

    Returns:
        The tensors that were loaded, adapted and skipped.

    Raises:
        CheckpointError: The file cannot be read, or no convolution of its backbone fits.
    """
    return copy_weights(read_model(path), model)


@torch.no_grad()
def copy_weights(source: ModelFile, model: Detector) -> TransferReport:
    """Copy weights from the content of a model file, as `transfer_weights` does."""
    path, config, tensors, _ = source
    report = TransferReport()
    state = model.state_dict()
    tensors = unwrapped(tensors, path, state.keys())
    if config.architecture != model.config.architecture:
        raise CheckpointError(
            f"{path}: expected the weights of a model of the architecture {model.config.architecture}, got those of "
            f"{config.architecture}; choose the same model"
        )
    first = _first_level(config), _first_level(model.config)
    columns = _columns(config), _columns(model.config)
    for name, target in state.items():
        value = tensors.get(name)
        if value is None and name.endswith(COUNTERS):
            continue  # A count of training steps starts from its initial value.
        if value is None:
            report.skipped[name] = "not in the file"
        elif name.startswith("backbone.fpn.") and first[0] != first[1]:
            report.skipped[name] = f"the pyramid begins at level {first[0]} in the file and at {first[1]} in the model"
        elif _CLASS_ROWS.fullmatch(name) and (None in columns[0]) != (None in columns[1]):
            report.skipped[name] = "only one of the file and the model has a background class (cls_loss mining)"
        elif _CLASS_ROWS.fullmatch(name) and (slots := _slots(value, target, columns))[0] != slots[1]:
            report.skipped[name] = f"{slots[0]} anchors per cell in the file and {slots[1]} in the model"
        elif _CLASS_ROWS.fullmatch(name) and columns[0] != columns[1]:
            if value.shape[1:] != target.shape[1:]:
                report.skipped[name] = _other_shape(value, target)
            elif common := _copy_class_rows(value, target, columns, 4 if ".bbox_pred." in name else 1):
                report.adapted[name] = f"copied {len(common)} of {model.config.num_classes} classes: {listed(common)}"
            else:
                report.skipped[name] = "the file and the model have no class name in common"
        elif value.shape != target.shape:
            report.skipped[name] = _other_shape(value, target)
        else:
            target.copy_(value)
            report.loaded.append(name)
    if not any(name.startswith("backbone.") and state[name].dim() == 4 for name in report.loaded):
        raise CheckpointError(
            f"{path}: backbone: expected weights that fit the model's {model.config.backbone}, got those of "
            f"{config.backbone}; choose the same backbone"
        )
    report.unused = [name for name in tensors if name not in state]
    fields = _FIELDS_THAT_CHANGE_WEIGHTS[config.architecture]
    report.differing = [name for name in fields if attrgetter(name)(config) != attrgetter(name)(model.config)]
    return report


def _first_level(config: DetectorConfig) -> int:
    return 0 if isinstance(config, SSDConfig) else config.fpn_levels[0]


def _columns(config: DetectorConfig) -> Columns:
    """Return the class of each logit of an anchor, None for the background."""
    with_background = isinstance(config, FasterRCNNConfig)
    with_background |= isinstance(config, SSDConfig) and config.num_scores > config.num_classes
    return (None, *config.class_names) if with_background else config.class_names


def _slots(source: Tensor, target: Tensor, columns: tuple[Columns, Columns]) -> tuple[int, int]:
    """Return the number of anchors per cell to which the class rows of the file and of the model belong."""
    return source.shape[0] // len(columns[0]), target.shape[0] // len(columns[1])


def _copy_class_rows(
    source: Tensor,  # [A * K * V, ...]
    target: Tensor,  # [A * K' * V, ...]
    columns: tuple[Columns, Columns],
    values: int,  # V
) -> list[str]:
    """Copy the rows of the classes that both configurations have, and return the names of these classes."""
    rows = {name: k for k, name in enumerate(columns[0])}
    common = [(rows[name], k) for k, name in enumerate(columns[1]) if name in rows]
    names = [name for name in columns[1] if name in rows and name is not None]
    if not names:
        return []
    source_rows = source.unflatten(0, (-1, len(columns[0]), values))
    target_rows = target.unflatten(0, (-1, len(columns[1]), values))
    for k_source, k_target in common:
        target_rows[:, k_target] = source_rows[:, k_source]
    return names


def _other_shape(source: Tensor, target: Tensor) -> str:
    return f"its shape is {list(source.shape)} in the file and {list(target.shape)} in the model"
