"""The fields of a configuration that say which classes a model detects."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from torchvision.models.detection import RetinaNet_ResNet50_FPN_Weights

from retinanet.common.errors import ConfigError
from retinanet.common.validation import is_integer, numbers


def _coco_91_names() -> tuple[str, ...]:
    # torchvision's 91 rows are indexed by COCO category id. Ids that COCO never used are all called "N/A".
    names = RetinaNet_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    return tuple(f"N/A {i}" if name == "N/A" else name for i, name in enumerate(names))


#: torchvision's names by COCO category id. The first is that of the background.
COCO_91_NAMES = _coco_91_names()


@dataclass(frozen=True)
class ClassFields:
    """Base of the configurations: names, ids and weights of the foreground classes.

    Attributes:
        class_names: Name of each foreground class.
        category_ids: Id of each class in the data set; empty gives 0, 1, 2 ...
        class_weights: Factor on the class loss of a foreground anchor, by its class; empty is 1 for every class.
    """

    class_names: tuple[str, ...] = COCO_91_NAMES
    category_ids: tuple[int, ...] = ()
    class_weights: tuple[float, ...] = ()

    @property
    def num_classes(self) -> int:
        """Number of foreground classes."""
        return len(self.class_names)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields by name, in a form that JSON can hold."""
        return dataclasses.asdict(self)

    def _check_classes(self) -> None:
        names, ids = self.class_names, self.category_ids
        if not isinstance(names, tuple) or not names or not all(isinstance(n, str) for n in names):
            raise ConfigError(f"class_names: expected at least one name, got {names!r}")
        if len(set(names)) != len(names):
            twice = next(n for n in names if names.count(n) > 1)
            raise ConfigError(f"class_names: expected different names, got {twice!r} twice")
        if not isinstance(ids, tuple) or not all(is_integer(i) for i in ids) or len(set(ids)) != len(ids):
            raise ConfigError(f"category_ids: expected different integers, got {ids!r}")
        if not ids:
            object.__setattr__(self, "category_ids", tuple(range(len(names))))
        elif len(ids) != len(names):
            raise ConfigError(f"category_ids: expected {len(names)} ids, one per class, got {len(ids)}")

        weights = self.class_weights
        if weights and not (numbers(positive=True).accepts(weights) and len(weights) == len(names)):
            raise ConfigError(f"class_weights: expected {len(names)} numbers above 0, one per class, got {weights!r}")
