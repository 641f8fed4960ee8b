"""A trained model's weights as the start of another: of other classes, anchors or size.

Rows of the classification head belong to (anchor slot, class) pairs: a class of the same name keeps its own. What has
no counterpart keeps the value that it was made with, and the report says so.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from retinanet.checkpoints.model_file import CheckpointError, read_model
from retinanet.common.errors import listed
from retinanet.model.config import RetinaNetConfig
from retinanet.model.network import COUNTERS, RetinaNet

_CLASS_ROWS = ("head.classification_head.cls_logits.weight", "head.classification_head.cls_logits.bias")
#: Fields whose change gives the weights another meaning than they were trained for.
_MEANING = (
    "fpn_levels",
    "anchor_sizes",
    "aspect_ratios",
    "anchor_profile",
    "box_weights",
    "box_offset",
    "min_log_ratio",
    "max_log_ratio",
    "image_mean",
    "image_std",
    "backbone_norm_eps",
    "head_norm_groups",
    "p6_source",
    "p7_relu",
    "stride_in_1x1",
)


@dataclass
class TransferReport:
    """What became of the weights in a file.

    Attributes:
        loaded: Tensors taken as they are.
        adapted: Tensors of which the rows of some classes were taken, with the reason.
        skipped: Tensors of the model that the file has not, or in another shape, with the reason; they keep what they
            were initialised with.
        unused: Tensors of the file that the model has not.
        differing: Fields of the configuration, under which the weights were trained, that the model has not.
    """

    loaded: list[str] = field(default_factory=list)
    adapted: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)
    differing: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """A line for each kind, with the reasons."""
        lines = [f"{len(self.loaded)} tensors loaded"]
        for title, reasons in (("adapted", self.adapted), ("skipped", self.skipped)):
            by_reason: dict[str, list[str]] = {}
            for name, reason in reasons.items():
                by_reason.setdefault(reason, []).append(name)
            lines += [f"{title}: {listed(names)}: {reason}" for reason, names in by_reason.items()]
        if self.unused:
            lines.append(f"not used: {listed(self.unused)}")
        if self.differing:
            lines.append(f"trained with other values of {', '.join(self.differing)}")
        return "\n".join(lines)


@torch.no_grad()
def transfer_weights(path: str | os.PathLike[str], model: RetinaNet) -> TransferReport:
    """Copies what fits of a model file's weights into a model.

    Args:
        path: A file that `save_model` wrote.
        model: Changed in place, also where an error is raised.

    Returns:
        What was loaded, adapted and skipped.

    Raises:
        CheckpointError: The file cannot be read, or no convolution of its backbone fits.
    """
    path = Path(path)
    config, tensors = read_model(path)
    report = TransferReport()
    state = model.state_dict()
    slots = config.anchors_per_cell, model.config.anchors_per_cell
    first = config.fpn_levels[0], model.config.fpn_levels[0]
    for name, target in state.items():
        source = tensors.get(name)
        if source is None and name.endswith(COUNTERS):
            continue  # starts anew
        if source is None:
            report.skipped[name] = "not in the file"
        elif name.startswith("backbone.fpn.") and first[0] != first[1]:
            report.skipped[name] = f"the pyramid begins at level {first[0]} in the file and at {first[1]} here"
        elif name in _CLASS_ROWS and slots[0] != slots[1]:
            report.skipped[name] = f"{slots[0]} anchors per cell in the file and {slots[1]} here"
        elif name in _CLASS_ROWS and config.class_names != model.config.class_names:
            if source.shape[1:] != target.shape[1:]:
                report.skipped[name] = _other_shape(source, target)
            elif common := _copy_class_rows(source, config, target, model.config):
                report.adapted[name] = f"of {len(model.config.class_names)} classes, the rows of {listed(common)}"
            else:
                report.skipped[name] = "no class has the name of one in the file"
        elif source.shape != target.shape:
            report.skipped[name] = _other_shape(source, target)
        else:
            target.copy_(source)
            report.loaded.append(name)
    if not any(name.startswith("backbone.") and state[name].dim() == 4 for name in report.loaded):
        raise CheckpointError(
            f"{path}: its backbone, {config.backbone}, does not fit the model's, {model.config.backbone}"
        )
    report.unused = [name for name in tensors if name not in state]
    report.differing = [name for name in _MEANING if getattr(config, name) != getattr(model.config, name)]
    return report


def _copy_class_rows(
    source: Tensor,  # [A * K, ...]
    source_config: RetinaNetConfig,
    target: Tensor,  # [A * K', ...]
    target_config: RetinaNetConfig,
) -> list[str]:
    """Copies the rows of the classes that both have; returns their names."""
    rows = {name: k for k, name in enumerate(source_config.class_names)}
    common = [(rows[name], k) for k, name in enumerate(target_config.class_names) if name in rows]
    theirs, ours = (
        source.unflatten(0, (-1, source_config.num_classes)),
        target.unflatten(0, (-1, target_config.num_classes)),
    )
    for k_source, k_target in common:
        ours[:, k_target] = theirs[:, k_source]
    return [target_config.class_names[k] for _, k in common]


def _other_shape(source: Tensor, target: Tensor) -> str:
    return f"its shape is {list(source.shape)} in the file and {list(target.shape)} here"
