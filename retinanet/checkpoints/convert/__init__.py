"""Models of other projects: their checkpoints become models of this one that find the same.

`retinanet.checkpoints.convert.<project>` states what is particular to a project, `rules` and `architecture` what they
share; `read` opens files. Every tensor of a file is accounted for: used, dropped for a reason, or an error.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retinanet.checkpoints.convert import detectron2, mmdet, odtk, torchvision, yhenon
from retinanet.checkpoints.convert.architecture import STYLES, network_fields
from retinanet.checkpoints.convert.read import read_checkpoint
from retinanet.checkpoints.convert.rules import (
    MISSING,
    UNKNOWN,
    Draft,
    Layout,
    keep_classes,
    name_errors,
    translate,
)
from retinanet.common.errors import DataError, listed
from retinanet.model.config import CUSTOM, ConfigError, RetinaNetConfig
from retinanet.model.network import COUNTERS, RetinaNet

__all__ = ["PROJECTS", "STYLES", "ConversionReport", "convert_checkpoint"]

_LAYOUTS: dict[str, Layout] = {
    "torchvision": torchvision.LAYOUT,
    "detectron2": detectron2.LAYOUT,
    "mmdet": mmdet.LAYOUT,
    "yhenon": yhenon.LAYOUT,
    "odtk": odtk.LAYOUT,
}
PROJECTS = tuple(_LAYOUTS)


@dataclass(frozen=True)
class ConversionReport:
    """What became of a file.

    Attributes:
        path: The file.
        project: Where it is from.
        config: Of the model.
        mapped: Name of each tensor of the file in the model.
        unused: Why the model has no use for a tensor of the file, by its name.
        notes: What had to be assumed, or differs from the original.
    """

    path: Path
    project: str
    config: RetinaNetConfig
    mapped: dict[str, str]
    unused: dict[str, str]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        """One fact a line."""
        config = self.config
        levels = config.fpn_levels
        strides = ", strides in 1x1 convolutions" * config.stride_in_1x1
        p7 = "" if config.p7_relu else ", no ReLU before P7"
        group_norm = " with GroupNorm" * (config.head_norm == "group")
        lines = [
            f"{self.path}: {len(self.mapped)} tensors of {self.project} used, {len(self.unused)} unused",
            *(f"  unused: {name}: {reason}" for name, reason in _grouped(self.unused).items()),
            f"  {config.backbone}, {config.backbone_norm} normalisation{strides}",
            f"  P{levels[0]} to P{levels[-1]}, P6 of {config.p6_source}{p7}; "
            f"heads of {config.head_depth} convolutions{group_norm}",
            f"  anchors of {config.anchor_profile}: {config.anchors_per_cell} a position; "
            f"at most {config.max_detections} detections",
            f"  {config.num_classes} classes: {listed(config.class_names)}",
            *(f"  note: {note}" for note in self.notes),
        ]
        return "\n".join(lines)


def convert_checkpoint(
    path: str | os.PathLike[str],
    project: str,
    *,
    classes: int | None = None,
    class_names: Sequence[str] | None = None,
    style: str | None = None,
    fields: Mapping[str, Any] | None = None,
) -> tuple[RetinaNet, ConversionReport]:
    """Makes a model of another project's checkpoint.

    Backbone (a ResNet), pyramid, heads and number of classes are those of the tensors. What a state dict does not tell,
    such as anchors and thresholds, is what the project does by default.

    Args:
        path: A file of `torch.save`, detectron2's `*.pkl`, or `*.safetensors`. No code in it runs.
        project: One of `PROJECTS`.
        classes: 80 keeps COCO's 80 categories of torchvision's 91 rows.
        class_names: Of each class; None takes them from the file, or COCO's for 80 and 91 rows, or numbers them.
        style: `caffe` or `pytorch`, see `rules.Draft`; None is what is usual in the project.
        fields: Of `RetinaNetConfig`, where the model was not of its project's defaults.

    Returns:
        The model, in evaluation mode, and what was done.

    Raises:
        DataError: The file cannot be read, or a tensor is unknown, missing or of another shape.
        ValueError: An argument is wrong.
    """
    if project not in _LAYOUTS:
        raise ValueError(f"project: expected one of {', '.join(PROJECTS)}, got {project!r}")
    if style is not None and (style not in STYLES or project not in ("detectron2", "mmdet")):
        raise ValueError(f"style: expected {' or '.join(STYLES)}, of detectron2 or mmdet, got {style!r} of {project}")
    path, layout = Path(path), _LAYOUTS[project]
    content = read_checkpoint(path)
    if layout.signature not in content.state:
        others = [name for name, other in _LAYOUTS.items() if other.signature in content.state]
        hint = f"; {others[0]} has this layout" if others else ""
        raise DataError(f"{path}: not a RetinaNet of {project}: lacks {layout.signature}{hint}")
    draft = Draft(path, content.rest, style)
    translate(draft, layout, content.state)
    network = network_fields(draft)
    described = layout.fields(draft, network)
    names = _classes(draft, layout, classes, class_names)
    try:
        config = RetinaNetConfig.from_dict({**network, **described, **names, **(fields or {})})
    except ConfigError as error:
        raise DataError(f"{path}: {error}") from error
    if config.backbone == CUSTOM:
        raise DataError(f"{path}: backbone: expected the file's {network['backbone']}, got {CUSTOM!r}")
    for rows, expected, field in (
        (draft.anchors_per_cell, config.anchors_per_cell, "anchor_sizes and aspect_ratios"),
        (draft.num_classes, config.num_classes, "class_names"),
    ):
        if rows != expected:
            raise DataError(f"{path}: {field}: expected {rows} for the rows of the heads, got {expected}")
    layout.adapt(draft, config)
    model = _filled(draft, config)
    mapped = {foreign: name for name, foreign in draft.foreign.items()}
    unused = {foreign: reason for foreign, (_, reason) in draft.dropped.items()}
    return model, ConversionReport(path, project, config, mapped, unused, tuple(draft.notes))


def _classes(
    draft: Draft, layout: Layout, classes: int | None, class_names: Sequence[str] | None
) -> dict[str, tuple[Any, ...]]:
    """Class names and ids; keeps the rows of the classes that are asked for."""
    rows = RetinaNetConfig().class_names  # by COCO's id
    ids = [i for i, name in enumerate(rows) if i and not name.startswith("N/A")]
    coco = {"class_names": tuple(rows[i] for i in ids), "category_ids": tuple(ids)}
    all_rows = layout is torchvision.LAYOUT and draft.num_classes == torchvision.COCO_ROWS
    if classes is not None:
        if not all_rows or classes != len(ids):
            what = f"{classes} classes of {draft.num_classes} rows"
            raise DataError(f"{draft.path}: expected {len(ids)} classes of torchvision's {len(rows)} rows, got {what}")
        keep_classes(draft, ids)
    elif all_rows and class_names is None:
        return {"class_names": rows, "category_ids": tuple(range(len(rows)))}
    names = class_names or layout.class_names(draft)
    if names is None and draft.num_classes == len(ids):
        if classes is None:
            draft.notes.append("80 classes: COCO's are assumed")
        return coco
    names = tuple(names or (f"class {k}" for k in range(draft.num_classes)))
    return coco if names == coco["class_names"] else {"class_names": names}


def _filled(draft: Draft, config: RetinaNetConfig) -> RetinaNet:
    model = RetinaNet(config)
    state = model.state_dict()
    unknown = []
    for name in list(draft.weights):
        if name in state:
            continue
        foreign = draft.foreign.pop(name)
        value = draft.weights.pop(name)
        if name.endswith("num_batches_tracked"):
            draft.dropped[foreign] = (value, "a count of batches, which frozen statistics do not need")
        else:
            unknown.append(foreign)
    if unknown:
        raise name_errors(draft.path, unknown, UNKNOWN)
    missing = [name for name in state if name not in draft.weights and not name.endswith(COUNTERS)]
    if missing:
        raise name_errors(draft.path, missing, MISSING)
    for name, ours in state.items():
        weight = draft.weights.setdefault(name, ours)
        if weight.shape != ours.shape:
            raise draft.wrong(name, f"expected shape {list(ours.shape)}, got {list(weight.shape)}")
        if ours.is_floating_point() and not weight.is_floating_point():
            raise draft.wrong(name, f"expected floating point, got {weight.dtype}")
    model.load_state_dict(draft.weights)
    return model.eval()


def _grouped(reasons: Mapping[str, str]) -> dict[str, str]:
    """One line for each reason: its first name, and how many more there are."""
    lines: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        lines.setdefault(reason, []).append(name)
    return {
        names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else ""): reason for reason, names in lines.items()
    }
