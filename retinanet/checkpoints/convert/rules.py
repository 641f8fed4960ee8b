"""Shared parts of the converters: renaming of tensors by rules, and the rows of the output layers.

A tensor has a source name in the checkpoint and a model name in this package. In the output layers of all projects, row
`a * K + k` belongs to class `k` of anchor slot `a`, and rows `a * 4` to `a * 4 + 3` to its dx, dy, dw, dh. The projects
differ in which anchor a slot stands for and which class a row stands for.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from retinanet.common.errors import DataError
from retinanet.model.config import RetinaNetConfig

#: A pattern for the beginning of a source name, and its replacement in the model name.
Rule = tuple[str, str | Callable[[re.Match[str]], str]]

#: A bound on log size ratios that has no effect: a box that is exp(80) times as large as its anchor is clipped to the
#: image anyway.
UNBOUNDED_LOG_RATIO = 80.0

UNKNOWN = "not a tensor of this RetinaNet"
MISSING = "the file has no counterpart of this tensor of the model"
STEM = "backbone.body.conv1"
CLASS_LAYER = "head.classification_head.cls_logits"
BOX_LAYER = "head.regression_head.bbox_reg"


@dataclass
class Conversion:
    """The state of a conversion from another project's checkpoint.

    Attributes:
        path: The checkpoint.
        extras: Entries of the checkpoint beside the state dict.
        style: `caffe` is for weights of MSRA or Caffe: BGR images in 0..255, strides in 1x1 convolutions. `pytorch` is
            for normalised RGB images and strides in 3x3 convolutions. None is the project's usual style.
        source_names: Source names by model name.
        weights: Tensors by model name.
        dropped: Tensors that the model does not need, each with the reason, by source name.
        notes: Assumptions, and differences from the original model.
    """

    path: Path
    extras: dict[str, Any]
    style: str | None
    source_names: dict[str, str] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    dropped: dict[str, tuple[Tensor, str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def weight(self, name: str) -> Tensor:
        """Return a tensor by its model name.

        Raises:
            DataError: The checkpoint has no such tensor.
        """
        try:
            return self.weights[name]
        except KeyError:
            raise name_errors(self.path, [name], MISSING) from None

    def error(self, name: str, reason: str) -> DataError:
        """Return an error about the tensor with this model name; the message states its source name."""
        return DataError(f"{self.path}: {self.source_names.get(name, name)}: {reason}")

    def kernel(self, name: str) -> Tensor:  # [rows, columns, height, width]
        """Return the weight of a convolution by the convolution's model name.

        Raises:
            DataError: The checkpoint has no such tensor, or the tensor is empty or not four-dimensional.
        """
        weight = self.weight(f"{name}.weight")
        if weight.dim() != 4 or not weight.numel():
            raise self.error(f"{name}.weight", f"expected the weight of a convolution, got shape {list(weight.shape)}")
        return weight

    @property
    def anchors_per_cell(self) -> int:
        """Number of anchor slots of a position, from the rows of the box layer."""
        return self._rows_by(BOX_LAYER, 4)

    @property
    def num_classes(self) -> int:
        """Number of classes of a slot, from the rows of the classification layer."""
        return self._rows_by(CLASS_LAYER, self.anchors_per_cell)

    def _rows_by(self, layer: str, divisor: int) -> int:
        rows, biases = len(self.kernel(layer)), len(self.weight(f"{layer}.bias"))
        if rows % divisor:
            raise self.error(f"{layer}.weight", f"expected a multiple of {divisor} rows, got {rows}")
        if rows != biases:
            raise self.error(f"{layer}.bias", f"expected {rows} biases, one for each row, got {biases}")
        return rows // divisor

    @property
    def counts_batches(self) -> bool:
        """Whether the backbone has batch normalisation with counters, which frozen statistics lack."""
        return any(name.endswith("num_batches_tracked") for name in self.weights)


@dataclass(frozen=True)
class Layout:
    """The layout of one project's checkpoints.

    Attributes:
        signature: A tensor name that every state dict of the project has.
        rules: Returns the renaming rules for a collection of source names. The first rule that matches applies.
        fields: Returns the project's behaviour as fields of `RetinaNetConfig`, beyond those of `network_fields`.
        adapt: Rewrites weights for the finished configuration, in which slot `a` is `ratio * sizes + size`.
        dropped: Patterns of source names that the model does not need, each with the reason.
        class_names: Returns the names of the classes, or None if the checkpoint does not have them.
    """

    signature: str
    rules: Callable[[Collection[str]], Sequence[Rule]]
    fields: Callable[[Conversion, dict[str, Any]], dict[str, Any]]
    adapt: Callable[[Conversion, RetinaNetConfig], None] = lambda conversion, config: None
    dropped: tuple[tuple[str, str], ...] = ()
    class_names: Callable[[Conversion], Sequence[str] | None] = lambda conversion: None


def translate(conversion: Conversion, layout: Layout, state: dict[str, Tensor]) -> None:
    """Rename the tensors of a state dict, and set aside those that the model does not need.

    Raises:
        DataError: No rule matches a name, or two source names give the same model name.
    """
    rules = layout.rules(state.keys())
    unknown = []
    for key, value in state.items():
        reason = next((reason for pattern, reason in layout.dropped if re.match(pattern, key)), None)
        name = next((new for rule in rules if (new := _renamed(rule, key)) is not None), None)
        if reason is not None:
            conversion.dropped[key] = (value, reason)
        elif name is None:
            unknown.append(key)
        elif name in conversion.weights:
            raise conversion.error(name, f"expected one tensor for {name} of the model, got this one and {key}")
        else:
            conversion.weights[name], conversion.source_names[name] = value, key
    if unknown:
        raise name_errors(conversion.path, unknown, UNKNOWN)


def name_errors(path: Path, names: Sequence[str], reason: str) -> DataError:
    """Return an error with one line for each of the first eight names, and a line that counts the others."""
    more = [f"{path}: and {len(names) - 8} more: {reason}"] if len(names) > 8 else []
    return DataError("\n".join([f"{path}: {name}: {reason}" for name in names[:8]] + more))


def _renamed(rule: Rule, key: str) -> str | None:
    name, count = re.subn(f"^(?:{rule[0]})", rule[1], key, count=1)
    return name if count else None


def resnet_rules(prefix: str) -> list[Rule]:
    """Return the rules for a ResNet whose modules have torchvision's names after a prefix, which is a pattern."""
    return [(rf"{prefix}(?=(?:conv1|bn1|layer[1-4])\.)", "backbone.body.")]


def top_rules(p6: str, p7: str) -> list[Rule]:
    """Return the rules for the convolutions of P6 and P7, whose names are patterns."""
    return [(rf"{p6}\.", "backbone.fpn.extra_blocks.p6."), (rf"{p7}\.", "backbone.fpn.extra_blocks.p7.")]


def reverse_input_channels(conversion: Conversion) -> None:
    """Reorder the weights of the first convolution from BGR to RGB input."""
    conversion.weights[f"{STEM}.weight"] = conversion.kernel(STEM).flip(1)


def by_size(num_sizes: int, ratios: Sequence[int]) -> list[int]:
    """Map slots of this package, `ratio * sizes + size`, to source slots, `size * ratios + ratio`.

    Args:
        num_sizes: Number of sizes.
        ratios: For each ratio of the model, its position among the ratios of the source.

    Returns:
        The source slot of each slot of the model.
    """
    return [size * len(ratios) + ratio for ratio in ratios for size in range(num_sizes)]


def rearrange_slots(conversion: Conversion, slots: Sequence[int]) -> None:
    """Give slot `i` of both output layers the rows of slot `slots[i]`."""
    for layer in (CLASS_LAYER, BOX_LAYER):
        for name in (f"{layer}.weight", f"{layer}.bias"):
            rows = conversion.weight(name)
            conversion.weights[name] = rows.unflatten(0, (len(slots), -1))[list(slots)].flatten(0, 1)


def keep_classes(conversion: Conversion, classes: Sequence[int]) -> None:
    """Keep only the rows of these classes in each slot."""
    slots = conversion.anchors_per_cell
    for name in (f"{CLASS_LAYER}.weight", f"{CLASS_LAYER}.bias"):
        conversion.weights[name] = conversion.weight(name).unflatten(0, (slots, -1))[:, list(classes)].flatten(0, 1)


def scale_deltas(conversion: Conversion, factors: Sequence[float]) -> None:
    """Multiply the rows for dx, dy, dw and dh of every slot by the four factors."""
    for name in (f"{BOX_LAYER}.weight", f"{BOX_LAYER}.bias"):
        rows = conversion.weight(name)
        scale = torch.tensor(factors).repeat(len(rows) // 4)
        conversion.weights[name] = rows * scale.view(-1, *[1] * (rows.dim() - 1))


def are_numbers(values: Any, count: int | None = None) -> TypeGuard[list[float]]:
    """Return whether a value is a list of `count` finite numbers, or of one or more if `count` is None."""
    return (
        isinstance(values, list)
        and len(values) == (count or len(values) or 1)
        and all(isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) for v in values)
    )
