"""Conversion of other projects' checkpoints to models of this package that give the same detections.

`retinanet.checkpoints.convert.<project>` describes one project, `rules` and `architecture` hold what the projects
share, and `read` reads files. Every known tensor of a file is used or is dropped for a stated reason. An unknown tensor
is an error.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retinanet.checkpoints.convert import detectron2, mmdet, odtk, torchvision, yhenon
from retinanet.checkpoints.convert.architecture import STYLES, network_fields
from retinanet.checkpoints.convert.read import network_of, read_checkpoint
from retinanet.checkpoints.convert.rules import (
    MISSING,
    UNKNOWN,
    Conversion,
    Layout,
    keep_classes,
    name_errors,
    translate,
)
from retinanet.checkpoints.convert.stated import stated_beside
from retinanet.common.errors import DataError, listed
from retinanet.model.compat import merge_fields
from retinanet.model.config import ConfigError, RetinaNetConfig
from retinanet.model.network import COUNTERS, RetinaNet
from retinanet.model.pyramid_config import CUSTOM

__all__ = ["PROJECTS", "STYLES", "ConversionReport", "convert_checkpoint"]

_LAYOUTS: dict[str, Layout] = {
    "torchvision": torchvision.LAYOUT,
    "detectron2": detectron2.LAYOUT,
    "mmdet": mmdet.LAYOUT,
    "yhenon": yhenon.LAYOUT,
    "odtk": odtk.LAYOUT,
}
PROJECTS = tuple(_LAYOUTS)
#: Other detectors of torchvision with the same backbone, by a tensor that only they have.
_OTHER_DETECTORS = {
    "head.regression_head.bbox_ctrness.weight": "FCOS",
    "rpn.head.cls_logits.weight": "R-CNN",
}


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion did with a file.

    Attributes:
        path: The file.
        project: The project that wrote it.
        config: The configuration of the model.
        mapped: Names in the model, by the names in the file.
        unused: Reasons why the model does not need a tensor, by its name in the file.
        notes: Assumptions, and differences from the original model.
    """

    path: Path
    project: str
    config: RetinaNetConfig
    mapped: dict[str, str]
    unused: dict[str, str]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        """Return the report with one fact per line."""
        config = self.config
        levels = config.fpn_levels
        strides = ", strides in 1x1 convolutions" * config.compat.stride_in_1x1
        p7 = "" if config.compat.p7_relu else ", no ReLU before P7"
        group_norm = " with GroupNorm" * (config.head_norm == "group")
        lines = [
            f"{self.path}: {len(self.mapped)} tensors of {self.project} used, {len(self.unused)} unused",
            *(f"  unused: {name}: {reason}" for name, reason in _grouped(self.unused).items()),
            f"  {config.backbone}, {config.backbone_norm} normalisation{strides}",
            f"  P{levels[0]} to P{levels[-1]}, P6 from {config.p6_source}{p7}; "
            f"heads of {config.head_depth} convolutions{group_norm}",
            f"  anchors of {config.compat.anchor_profile}: {config.anchors_per_cell} per position",
            f"  scores above {config.score_threshold:g}, NMS at IoU {config.nms_threshold:g}, at most "
            f"{config.max_detections} detections",
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
    """Convert another project's checkpoint to a model.

    The tensors determine the backbone (a ResNet), the pyramid, the heads and the number of classes. A state dict does
    not contain other settings, such as anchors and thresholds. They are the project's defaults, unless the file, beside
    the state dict, or `fields` states them. The report says what was taken from the file.

    Args:
        path: A file that `torch.save` wrote, a `*.pkl` of detectron2 or a `*.safetensors`. No code in the file is run.
        project: One of `PROJECTS`.
        classes: 80 keeps only COCO's 80 categories of the 91 classes of torchvision's weights. None keeps all classes.
        class_names: The name of each class. None takes the names from the file, else COCO's names for 80 and 91
            classes, or "class 0", "class 1" and so on.
        style: `caffe` or `pytorch`, see `rules.Conversion`. None takes the style that the file states, else the
            project's usual one.
        fields: Fields of `RetinaNetConfig` in which the model differs from its project's defaults.

    Returns:
        The model, in evaluation mode, and the report.

    Raises:
        DataError: The file cannot be read, a tensor is unknown, missing or of another shape, or `classes`,
            `class_names` or `fields` do not fit the file.
        ValueError: `project` is unknown, or `style` is unknown or given for a project without styles.
    """
    if project not in _LAYOUTS:
        raise ValueError(f"project: expected one of {', '.join(PROJECTS)}, got {project!r}")
    if style is not None and (style not in STYLES or project not in ("detectron2", "mmdet")):
        raise ValueError(
            f"style: expected {' or '.join(STYLES)} for detectron2 or mmdet, else None, got {style!r} for {project}"
        )
    path, layout = Path(path), _LAYOUTS[project]
    content = read_checkpoint(path)
    state, outside = network_of(path, content.state, layout.signature)
    if layout.signature not in state:
        others = [
            name
            for name, other in _LAYOUTS.items()
            if other.signature in network_of(path, content.state, other.signature)[0]
        ]
        hint = f"; the file has the layout of {others[0]}" if others else ""
        raise DataError(f"{path}: not a RetinaNet of {project}: the state dict has no {layout.signature}{hint}")
    for name, detector in _OTHER_DETECTORS.items():
        if name in state:
            raise DataError(f"{path}: expected a RetinaNet, got an {detector}: the state dict has {name}")
    conversion = Conversion(path, content.extras, style)
    conversion.dropped |= {name: (value, "not a tensor of the network") for name, value in outside.items()}
    translate(conversion, layout, state)
    network = network_fields(conversion)
    described = layout.fields(conversion, network)
    known_names = class_names or layout.class_names(conversion)
    given = {*(fields or {}), *(("class_names",) if known_names or classes else ())}
    stated = stated_beside(content.extras, conversion.num_classes, given)
    conversion.notes += stated.notes
    names = _classes(conversion, layout, classes, known_names or stated.class_names)
    try:
        config = RetinaNetConfig.from_dict(merge_fields(network, described, stated.fields, names, fields or {}))
    except ConfigError as error:
        raise DataError(f"{path}: {error}") from error
    if config.backbone == CUSTOM:
        raise DataError(f"{path}: backbone: expected the file's {network['backbone']}, got {CUSTOM!r}")
    for rows, expected, field in (
        (conversion.anchors_per_cell, config.anchors_per_cell, "anchor_sizes and aspect_ratios"),
        (conversion.num_classes, config.num_classes, "class_names"),
    ):
        if rows != expected:
            raise DataError(f"{path}: {field}: expected {rows}, as the rows of the heads imply, got {expected}")
    layout.adapt(conversion, config)
    model = _filled(conversion, config)
    mapped = {source_name: name for name, source_name in conversion.source_names.items()}
    unused = {source_name: reason for source_name, (_, reason) in conversion.dropped.items()}
    return model, ConversionReport(path, project, config, mapped, unused, tuple(conversion.notes))


def _classes(
    conversion: Conversion, layout: Layout, classes: int | None, names: Sequence[str] | None
) -> dict[str, tuple[Any, ...]]:
    """Return class names and ids as configuration fields, and drop the rows of classes that `classes` excludes."""
    rows = RetinaNetConfig().class_names  # Indexed by COCO's ids.
    ids = [i for i, name in enumerate(rows) if i and not name.startswith("N/A")]
    coco = {"class_names": tuple(rows[i] for i in ids), "category_ids": tuple(ids)}
    all_rows = layout is torchvision.LAYOUT and conversion.num_classes == torchvision.COCO_ROWS
    if classes is not None:
        if not all_rows or classes != len(ids):
            what = f"a checkpoint with {conversion.num_classes} classes and classes={classes}"
            raise DataError(
                f"{conversion.path}: classes: expected {len(ids)} of torchvision's {len(rows)} classes, got {what}"
            )
        keep_classes(conversion, ids)
    elif all_rows and names is None:
        return {"class_names": rows, "category_ids": tuple(range(len(rows)))}
    if names is None and conversion.num_classes == len(ids):
        if classes is None:
            conversion.notes.append("assuming COCO's classes: the model has 80, and no class names are stated")
        return coco
    if names is None:
        conversion.notes.append("the classes are numbered, because no class names are stated; --class-names names them")
    names = tuple(names or (f"class {k}" for k in range(conversion.num_classes)))
    return coco if names == coco["class_names"] else {"class_names": names}


def _filled(conversion: Conversion, config: RetinaNetConfig) -> RetinaNet:
    model = RetinaNet(config)
    state = model.state_dict()
    unknown = []
    for name in list(conversion.weights):
        if name in state:
            continue
        source_name = conversion.source_names.pop(name)
        value = conversion.weights.pop(name)
        if name.endswith("num_batches_tracked"):
            conversion.dropped[source_name] = (value, "a counter of batches, which frozen statistics do not need")
        else:
            unknown.append(source_name)
    if unknown:
        raise name_errors(conversion.path, unknown, UNKNOWN)
    missing = [name for name in state if name not in conversion.weights and not name.endswith(COUNTERS)]
    if missing:
        raise name_errors(conversion.path, missing, MISSING)
    for name, initial in state.items():
        weight = conversion.weights.setdefault(name, initial)
        if weight.shape != initial.shape:
            raise conversion.error(name, f"expected shape {list(initial.shape)}, got {list(weight.shape)}")
        if initial.is_floating_point() and not weight.is_floating_point():
            raise conversion.error(name, f"expected floating-point numbers, got {weight.dtype}")
    model.load_state_dict(conversion.weights)
    return model.eval()


def _grouped(reasons: Mapping[str, str]) -> dict[str, str]:
    """Return each reason once, by its first name and the number of further names."""
    lines: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        lines.setdefault(reason, []).append(name)
    return {
        names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else ""): reason for reason, names in lines.items()
    }
