"""Class names and thresholds that a checkpoint states beside its state dict, as a Lightning file does.

Lightning keeps the arguments of the module in `hyper_parameters`; training loops often save `class_names`, a mapping of
labels or their options next to the state dict. Nothing fixes the names of these entries, so those in use are tried.
"""

from __future__ import annotations

import argparse
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from retinanet.common.errors import listed, printable

#: Entries with the names of the classes: a list, or a mapping between names and labels.
_NAME_ENTRIES = (
    "class_names",
    "classes",
    "names",
    "labels",
    "label_names",
    "categories",
    "label_dict",
    "label_map",
    "numeric_to_label_dict",
    "class_to_idx",
    "id2label",
    "label2id",
)
#: Fields of `RetinaNetConfig` by the entries that state them; most are arguments of torchvision's RetinaNet.
_THRESHOLD_ENTRIES = {
    "score_thresh": "score_threshold",
    "score_threshold": "score_threshold",
    "nms_thresh": "nms_threshold",
    "nms_threshold": "nms_threshold",
    "detections_per_img": "max_detections",
    "max_detections": "max_detections",
    "topk_candidates": "topk",
    "fg_iou_thresh": "fg_iou_threshold",
    "bg_iou_thresh": "bg_iou_threshold",
}
_COUNTS = ("max_detections", "topk")
#: Entries of training state, which may be large and state nothing about the network.
_SKIPPED = ("optimizer", "optimizer_states", "lr_schedulers", "loops", "callbacks", "meta")
_DEPTH = 5


class Stated(NamedTuple):
    """What a checkpoint states.

    Attributes:
        class_names: The name of each class, or None.
        fields: Thresholds as fields of `RetinaNetConfig`.
        notes: What was taken, and what was not and why.
    """

    class_names: tuple[str, ...] | None
    fields: dict[str, float | int]
    notes: list[str]


def stated_beside(extras: Mapping[str, Any], num_classes: int, given: Collection[str] = ()) -> Stated:
    """Return the class names and thresholds in the entries beside a state dict.

    An entry that states another number of classes than the network has, or thresholds on which two entries disagree,
    are not taken.

    Args:
        extras: Entries beside the state dict.
        num_classes: Number of classes of the network.
        given: Fields of `RetinaNetConfig`, `class_names` among them, that are known and not looked for.
    """
    entries = list(_entries(extras))
    names, notes = (None, []) if "class_names" in given else _class_names(entries, num_classes)
    fields: dict[str, float | int] = {}
    for field in dict.fromkeys(_THRESHOLD_ENTRIES.values()):
        if field in given:
            continue
        found = {path: value for path, key, value in entries if _THRESHOLD_ENTRIES.get(key) == field}
        found = {path: value for path, value in found.items() if _is_threshold(field, value)}
        # A configuration may have settings for several kinds of networks.
        found = {path: value for path, value in found.items() if "retinanet" in path.lower()} or found
        if len(set(found.values())) > 1:
            values = ", ".join(f"{path} {value:g}" for path, value in found.items())
            notes.append(f"{field} is not taken from the file, whose entries disagree: {values}")
        elif found:
            path, fields[field] = next(iter(found.items()))
            notes.append(f"{field} {fields[field]:g} is taken from {path}")
    return Stated(names, fields, notes)


def _entries(content: Any, path: str = "", depth: int = 0) -> Iterator[tuple[str, str, Any]]:
    """Yield the path, the last part of the path and the value of each entry, also of nested ones."""
    if isinstance(content, argparse.Namespace):
        content = vars(content)
    if not isinstance(content, Mapping) or depth > _DEPTH:
        return
    for key, value in content.items():
        if not isinstance(key, str) or (not path and key in _SKIPPED):
            continue
        yield path + printable(key), key.lower(), value
        yield from _entries(value, f"{path}{printable(key)}.", depth + 1)


def _class_names(entries: Sequence[tuple[str, str, Any]], num_classes: int) -> tuple[tuple[str, ...] | None, list[str]]:
    notes: list[str] = []
    found: dict[tuple[str, ...], str] = {}
    for path, key, value in entries:
        labels = _labels(value) if key in _NAME_ENTRIES else None
        if not labels:
            continue
        if set(labels) == set(range(1, num_classes)):
            labels = {0: "background", **labels}
        if set(labels) == set(range(num_classes)):
            found.setdefault(tuple(labels[k] for k in range(num_classes)), path)
        else:
            notes.append(
                f"class names are not taken from {path}, which states {len(labels)} ({listed(list(labels.values()))}), "
                f"because the network has {num_classes} classes; --class-names names them"
            )
    # Entries beside the state dict are written with it, whereas nested ones may be what a module was created with.
    nearest = min((path.count(".") for path in found.values()), default=0)
    found = {names: path for names, path in found.items() if path.count(".") == nearest}
    if len(found) > 1:
        notes.append(f"class names are not taken from the file, whose entries disagree: {', '.join(found.values())}")
        return None, notes
    for names, path in found.items():
        return names, [f"class names are taken from {path}"]
    return None, notes


def _labels(value: Any) -> dict[int, str] | None:
    """Return names by label from a list of names, or from a mapping of names to labels or of labels to names."""
    if isinstance(value, list | tuple):
        pairs: list[tuple[Any, Any]] = list(enumerate(value))
    elif isinstance(value, Mapping):
        pairs = [(v, k) if isinstance(k, str) and _is_label(v) else (_label(k), v) for k, v in value.items()]
    else:
        return None
    if not all(_is_label(label) and isinstance(name, str) for label, name in pairs):
        return None
    labels = {int(label): name for label, name in pairs}
    return labels if len(labels) == len(pairs) and len(set(labels.values())) == len(pairs) else None


def _is_label(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _label(key: Any) -> Any:
    """Return a label that JSON has turned into text as a number."""
    return int(key) if isinstance(key, str) and key.isdecimal() and len(key) < 10 else key


def _is_threshold(field: str, value: Any) -> bool:
    if isinstance(value, bool):
        return False
    if field in _COUNTS:
        return isinstance(value, int) and value >= 1
    return isinstance(value, int | float) and 0 <= value <= 1
