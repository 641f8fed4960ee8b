"""Score thresholds that a model was given on a validation set."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class ScoreThresholds:
    """The score thresholds with the best F1 on a validation set, at IoU 0.5.

    A detection is kept if its score is above the threshold. `retinanet.detection.score_curves` chooses them; a
    model carries them as `Detector.score_thresholds`, and its file in the metadata.

    Attributes:
        overall: The threshold for all classes together, in 0..1.
        by_class: The threshold for each class, by label. None where the validation set has no object or the model no
            correct detection of the class.

    Raises:
        ValueError: A threshold is not a number in 0..1. The message names the field.
    """

    overall: float
    by_class: tuple[float | None, ...]

    def __post_init__(self) -> None:
        """Check the numbers."""
        _check("overall", self.overall)
        for label, value in enumerate(self.by_class):
            if value is not None:
                _check(f"by_class[{label}]", value)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values that `from_dict` reads."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Any, num_classes: int) -> ScoreThresholds:
        """Return the thresholds from JSON values.

        Args:
            content: What `to_dict` returned.
            num_classes: Number of classes of the model.

        Raises:
            ValueError: The content is malformed. The message names the field.
        """
        if not isinstance(content, dict) or set(content) != {"overall", "by_class"}:
            raise ValueError(f"score_thresholds: expected an object with overall and by_class, got {content!r}")
        by_class = content["by_class"]
        if not isinstance(by_class, list | tuple) or len(by_class) != num_classes:
            raise ValueError(f"score_thresholds: by_class: expected {num_classes} values, got {by_class!r}")
        return cls(content["overall"], tuple(by_class))


def _check(name: str, value: Any) -> None:
    # A comparison with NaN is false, so NaN is refused, too.
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"score_thresholds: {name}: expected a number in 0..1, got {value!r}")
