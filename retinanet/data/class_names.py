"""Classes of annotations that name the class of each object, and have no list of all classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from retinanet.common.errors import listed, shown
from retinanet.data.problems import Kind, Problems


def is_class(name: str, class_names: Sequence[str] | None, where: str, image_id: int, problems: Problems) -> bool:
    """Return whether an object's class is not empty and one of `class_names`, if there are any; else add a problem."""
    if not name:
        problems.add(Kind.CLASS, where, "expected a class, got nothing", image_id)
    elif class_names is not None and name not in class_names:
        problems.add(Kind.CLASS, where, f"expected a class among {listed(class_names)}, got {shown(name)}", image_id)
    else:
        return True
    return False


def number_classes(objects: Sequence[dict[str, Any]], class_names: Sequence[str] | None) -> list[dict[str, Any]]:
    """Give each object the `category_id` of its class.

    Args:
        objects: Entries with `class`.
        class_names: The classes in the order of their labels. None takes those that occur, sorted.

    Returns:
        The categories, with ids 1..K.
    """
    names = sorted({entry["class"] for entry in objects}) if class_names is None else class_names
    number_of = {name: number for number, name in enumerate(names, start=1)}
    for entry in objects:
        entry["category_id"] = number_of[entry["class"]]
    return [{"id": number, "name": name} for name, number in number_of.items()]
