"""Weights of the classes in the class loss, for data in which some classes are rare."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from retinanet.common.errors import DataError, listed
from retinanet.common.files import read_json
from retinanet.common.validation import is_number

#: Bounds of a weight, so that a class with a handful of objects cannot rule the gradient.
LOWEST, HIGHEST = 0.1, 10.0


def balanced_weights(counts: Sequence[int]) -> tuple[float, ...]:
    """Return weights that grow with the rarity of a class.

    The weight of a class with `n` objects is proportional to `1 / sqrt(n)`, scaled so that the mean weight of an object
    is 1, and then limited to 0.1..10. With twice the objects, a class therefore has the square root of 2 times the
    influence, instead of twice the influence. A class without objects has the weight 1.

    Args:
        counts: Objects of each class.
    """
    roots = [math.sqrt(count) for count in counts]
    factor = sum(counts) / max(sum(roots), 1e-9)
    return tuple(round(min(max(factor / root, LOWEST), HIGHEST), 4) if root else 1.0 for root in roots)


def read_weights(path: Path, class_names: Sequence[str]) -> tuple[float, ...]:
    """Read weights by class name from a JSON object; a class that is absent has the weight 1.

    Raises:
        DataError: The file cannot be read, names an unknown class, or has a weight that is not a number above 0.
    """
    content = read_json(path)
    if not isinstance(content, Mapping):
        raise DataError(f"{path}: expected a JSON object of weights by class name, got {type(content).__name__}")
    for name, weight in content.items():
        if name not in class_names:
            raise DataError(f"{path}: {name}: no such class; the data has {listed(list(class_names))}")
        if not is_number(weight) or weight <= 0:
            raise DataError(f"{path}: {name}: expected a weight above 0, got {weight!r}")
    return tuple(float(content.get(name, 1.0)) for name in class_names)
