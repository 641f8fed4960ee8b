"""What the converters share: names by rules, and the rows of the output layers.

The output layers of all these projects have the row `a * K + k` for class `k` of the anchor slot `a`, and the rows
`a * 4` to `a * 4 + 3` for its dx, dy, dw, dh; what differs is which anchor a slot stands for and which row a class has.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retinanet.common.errors import DataError
from retinanet.model.config import RetinaNetConfig

#: A pattern at the beginning of a foreign name, and what stands there in ours.
Rule = tuple[str, str | Callable[[re.Match[str]], str]]

#: Bound of log size ratios that means none: a box 1e34 times its anchor is clipped to the image anyway.
UNBOUNDED_LOG_RATIO = 80.0

UNKNOWN = "no part of this RetinaNet"
MISSING = "the file lacks a tensor for this one of the model"
STEM = "backbone.body.conv1"
CLASS_LAYER = "head.classification_head.cls_logits"
BOX_LAYER = "head.regression_head.bbox_reg"


@dataclass
class Draft:
    """A model on its way from a foreign file.

    Attributes:
        path: The file.
        rest: What the file holds beside the state dict.
        style: `caffe`: weights of MSRA or Caffe, for BGR in 0..255, with strides in 1x1 convolutions; `pytorch`: for
            normalised RGB, with strides in 3x3 convolutions; None: whatever is usual in that project.
        foreign: Foreign name of each tensor, by ours.
        weights: The tensors, by our names.
        dropped: Tensors of the file that the model has no use for, and the reason, by foreign name.
        notes: What had to be assumed, or differs from the original.
    """

    path: Path
    rest: dict[str, Any]
    style: str | None
    foreign: dict[str, str] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    dropped: dict[str, tuple[Tensor, str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def weight(self, name: str) -> Tensor:
        """A tensor by our name.

        Raises:
            DataError: The file has none.
        """
        try:
            return self.weights[name]
        except KeyError:
            raise name_errors(self.path, [name], MISSING) from None

    def wrong(self, name: str, reason: str) -> DataError:
        """An error about the tensor of ours of this name."""
        return DataError(f"{self.path}: {self.foreign.get(name, name)}: {reason}")

    def kernel(self, name: str) -> Tensor:  # [rows, columns, height, width]
        """The weight of a convolution, by our name.

        Raises:
            DataError: The file has none, or it has another number of dimensions.
        """
        weight = self.weight(f"{name}.weight")
        if weight.dim() != 4 or not weight.numel():
            raise self.wrong(f"{name}.weight", f"expected the weight of a convolution, got shape {list(weight.shape)}")
        return weight

    @property
    def anchors_per_cell(self) -> int:
        """Slots of a position, by the rows of the box layer."""
        return self._rows_by(BOX_LAYER, 4)

    @property
    def num_classes(self) -> int:
        """Classes of a slot, by the rows of the classification layer."""
        return self._rows_by(CLASS_LAYER, self.anchors_per_cell)

    def _rows_by(self, layer: str, divisor: int) -> int:
        rows, biases = len(self.kernel(layer)), len(self.weight(f"{layer}.bias"))
        if rows % divisor:
            raise self.wrong(f"{layer}.weight", f"expected a multiple of {divisor} as rows, got {rows}")
        if rows != biases:
            raise self.wrong(f"{layer}.bias", f"expected {rows} biases, one for each row, got {biases}")
        return rows // divisor

    @property
    def counts_batches(self) -> bool:
        """Whether the backbone's normalisation was trained: frozen statistics have no counters."""
        return any(name.endswith("num_batches_tracked") for name in self.weights)


@dataclass(frozen=True)
class Layout:
    """A project's RetinaNet.

    Attributes:
        signature: A name that every state dict of the project has.
        rules: From all foreign names to the rules for them; the first that fits is taken.
        dropped: Patterns of names that are not needed, each with the reason.
        fields: What the project does, in fields of `RetinaNetConfig`, beyond `network_fields`.
        adapt: Rewrites weights for the finished configuration, in which slot `a` is `ratio * sizes + size`.
        class_names: Names of the classes, if the file has them.
    """

    signature: str
    rules: Callable[[Collection[str]], Sequence[Rule]]
    fields: Callable[[Draft, dict[str, Any]], dict[str, Any]]
    adapt: Callable[[Draft, RetinaNetConfig], None] = lambda draft, config: None
    dropped: tuple[tuple[str, str], ...] = ()
    class_names: Callable[[Draft], Sequence[str] | None] = lambda draft: None


def translate(draft: Draft, layout: Layout, state: dict[str, Tensor]) -> None:
    """Sorts the tensors of a state dict into those of our names and those to drop.

    Raises:
        DataError: No rule knows a name, or two names are one of ours.
    """
    rules = layout.rules(state.keys())
    unknown = []
    for key, value in state.items():
        reason = next((reason for pattern, reason in layout.dropped if re.match(pattern, key)), None)
        name = next((new for rule in rules if (new := _renamed(rule, key)) is not None), None)
        if reason is not None:
            draft.dropped[key] = (value, reason)
        elif name is None:
            unknown.append(key)
        elif name in draft.weights:
            raise draft.wrong(name, f"and {key} are the same tensor of the model, {name}")
        else:
            draft.weights[name], draft.foreign[name] = value, key
    if unknown:
        raise name_errors(draft.path, unknown, UNKNOWN)


def name_errors(path: Path, names: Sequence[str], reason: str) -> DataError:
    """An error with a line for each of some tensors, not more than eight."""
    more = [f"{path}: and {len(names) - 8} more: {reason}"] if len(names) > 8 else []
    return DataError("\n".join([f"{path}: {name}: {reason}" for name in names[:8]] + more))


def _renamed(rule: Rule, key: str) -> str | None:
    name, count = re.subn(f"^(?:{rule[0]})", rule[1], key, count=1)
    return name if count else None


def resnet_rules(prefix: str) -> list[Rule]:
    """Rules for a ResNet whose modules have torchvision's names after a prefix, which is a pattern."""
    return [(rf"{prefix}(?=(?:conv1|bn1|layer[1-4])\.)", "backbone.body.")]


def top_rules(p6: str, p7: str) -> list[Rule]:
    """Rules for the convolutions of P6 and P7, whose names are patterns."""
    return [(rf"{p6}\.", "backbone.fpn.extra_blocks.p6."), (rf"{p7}\.", "backbone.fpn.extra_blocks.p7.")]


def reverse_input_channels(draft: Draft) -> None:
    """Makes a network for BGR one for RGB."""
    draft.weights[f"{STEM}.weight"] = draft.kernel(STEM).flip(1)


def by_size(num_sizes: int, ratios: Sequence[int]) -> list[int]:
    """Slots `size * ratios + ratio` in the order of this package, `ratio * sizes + size`.

    Args:
        num_sizes: Number of sizes.
        ratios: For each of our ratios, which one it is in the order of the foreign slots.

    Returns:
        The foreign slot of each of ours.
    """
    return [size * len(ratios) + ratio for ratio in ratios for size in range(num_sizes)]


def rearrange_slots(draft: Draft, slots: Sequence[int]) -> None:
    """Gives each anchor slot the rows that another has, in both heads."""
    for layer in (CLASS_LAYER, BOX_LAYER):
        for name in (f"{layer}.weight", f"{layer}.bias"):
            rows = draft.weight(name)
            draft.weights[name] = rows.unflatten(0, (len(slots), -1))[list(slots)].flatten(0, 1)


def keep_classes(draft: Draft, classes: Sequence[int]) -> None:
    """Keeps the rows of some classes in each slot."""
    slots = draft.anchors_per_cell
    for name in (f"{CLASS_LAYER}.weight", f"{CLASS_LAYER}.bias"):
        draft.weights[name] = draft.weight(name).unflatten(0, (slots, -1))[:, list(classes)].flatten(0, 1)


def scale_deltas(draft: Draft, factors: Sequence[float]) -> None:
    """Multiplies dx, dy, dw and dh of every slot."""
    for name in (f"{BOX_LAYER}.weight", f"{BOX_LAYER}.bias"):
        rows = draft.weight(name)
        scale = torch.tensor(factors).repeat(len(rows) // 4)
        draft.weights[name] = rows * scale.view(-1, *[1] * (rows.dim() - 1))
