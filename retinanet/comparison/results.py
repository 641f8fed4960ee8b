"""The numbers of a comparison: those of each run, and what they say of the models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, NamedTuple

from retinanet.comparison.timing import Times
from retinanet.detection.score_curves import Counts


@dataclass(frozen=True)
class Run:
    """A trained model and its numbers on the validation data.

    Attributes:
        seed: Seed of the run.
        stats: The twelve COCO numbers of the last epoch; an undefined one is -1.
        counts: Correct and wrong detections and missed objects at the score threshold with the best F1 on the
            validation data. None if no detection is correct.
        losses: Steps and the mean training losses of the steps before them.
        evaluations: Steps and the AP50 of the model after them.
    """

    seed: int
    stats: dict[str, float]
    counts: Counts | None
    losses: list[tuple[int, float]]
    evaluations: list[tuple[int, float]]

    @classmethod
    def from_lines(
        cls, seed: int, stats: dict[str, float], counts: Counts | None, lines: Sequence[Mapping[str, Any]]
    ) -> Run:
        """Make a run from the lines of its `metrics.jsonl`."""
        # A short run may have no lines of steps, but it always has those of epochs.
        kind = "step" if any(line["kind"] == "step" for line in lines) else "epoch"
        losses = [(line["step"], line["loss"]) for line in lines if line["kind"] == kind]
        return cls(seed, stats, counts, losses, [(line["step"], line["AP50"]) for line in lines if "AP50" in line])

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return {
            "seed": self.seed,
            "stats": self.stats,
            "best_f1": None if self.counts is None else self.counts.to_dict(),
            "losses": self.losses,
            "evaluations": self.evaluations,
        }


@dataclass(frozen=True)
class ModelResult:
    """What a comparison found out about a model.

    Attributes:
        name: Name of the recipe.
        title: Title of the recipe.
        command: The command that trains the model with the first seed.
        parameters: Number of weights, those that are not trained included.
        times: Durations, of the model with the first seed.
        runs: The runs, one for each seed.
    """

    name: str
    title: str
    command: str
    parameters: int
    times: Times
    runs: list[Run]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return {
            "name": self.name,
            "title": self.title,
            "command": self.command,
            "parameters": self.parameters,
            "times": self.times.to_dict(),
            "runs": [run.to_dict() for run in self.runs],
        }


class Row(NamedTuple):
    """A row of the table."""

    label: str
    cells: list[str]  # one for each model


# Smaller differences are 0.000 in the table.
_EQUAL = 0.0005
_STATS = {
    "AP": "AP",
    "AP50": "AP50",
    "AP75": "AP75",
    "APs": "AP, area below 32²",
    "APm": "AP, area 32² to 96²",
    "APl": "AP, area from 96²",
}


def table(models: Sequence[ModelResult]) -> list[Row]:
    """Return the rows of the table that compares models.

    A cell of several seeds holds the mean and the range.
    """
    rows = [
        Row(label, [_spread([_defined(run.stats[name]) for run in model.runs]) for model in models])
        for name, label in _STATS.items()
        if any(run.stats[name] >= 0 for model in models for run in model.runs)
    ]
    ratios: tuple[tuple[str, Callable[[Counts], float | None]], ...] = (
        ("precision at the best threshold", lambda counts: counts.precision),
        ("recall at the best threshold", lambda counts: counts.recall),
        ("F1 at the best threshold", lambda counts: counts.f1),
        ("best score threshold", lambda counts: counts.threshold),
    )
    for label, ratio in ratios:
        values = ([None if run.counts is None else ratio(run.counts) for run in model.runs] for model in models)
        rows.append(Row(label, [_spread(of_model) for of_model in values]))
    rows.append(Row("parameters", [f"{model.parameters / 1e6:.2f} million" for model in models]))
    times = [model.times for model in models]
    rows.append(Row("detection, per image", [f"{1000 * t.detection_seconds:.1f} ms" for t in times]))
    rows.append(Row("share of post-processing", [_share(t.post_processing_share) for t in times]))
    rows.append(Row("losses and gradients, per image", [f"{1000 * t.step_seconds:.1f} ms" for t in times]))
    rows.append(Row("share of matching and losses", [_share(t.loss_share) for t in times]))
    return rows


def conclusions(models: Sequence[ModelResult]) -> list[str]:
    """Return a sentence on the AP and on the AP50 of each pair of models: what the seeds show, and what they do not."""
    sentences = []
    for first, second in combinations(models, 2):
        for name in ("AP", "AP50"):
            pairs = [
                (one.stats[name], other.stats[name])
                for one, other in zip(first.runs, second.runs, strict=True)
                if min(one.stats[name], other.stats[name]) >= 0
            ]
            if pairs:
                sentences.append(_conclusion(name, first.title, second.title, [one - other for one, other in pairs]))
    return sentences


def _conclusion(name: str, first: str, second: str, differences: Sequence[float]) -> str:
    low, high = min(differences), max(differences)
    seeds = f"{len(differences)} seeds"
    if len(differences) == 1:
        return (
            f"{name}: \u201c{first}\u201d minus \u201c{second}\u201d is {low:+.3f}. A single seed does not show "
            "whether another one would reverse that."
        )
    if max(-low, high) < _EQUAL:
        return f"{name}: \u201c{first}\u201d and \u201c{second}\u201d are equal with each of {seeds}, to three digits."
    if low < _EQUAL and high > -_EQUAL:
        return (
            f"{name}: \u201c{first}\u201d minus \u201c{second}\u201d is {low:+.3f} to {high:+.3f} in {seeds}. Not "
            "all seeds agree, so this comparison does not show which is better."
        )
    if high < 0:
        first, second, low, high = second, first, -high, -low
    return (
        f"{name}: \u201c{first}\u201d is above \u201c{second}\u201d with each of {seeds}, by {low:.3f} to {high:.3f}."
    )


def _defined(value: float) -> float | None:
    return None if value < 0 else value


def _share(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.1%}"


def _spread(values: Sequence[float | None]) -> str:
    defined = [value for value in values if value is not None]
    if not defined:
        return "undefined"
    text = f"{sum(defined) / len(defined):.3f}"
    if len(defined) > 1:
        text += f" ({min(defined):.3f} to {max(defined):.3f})"
    missing = len(values) - len(defined)
    return text + (f", undefined for {missing} of {len(values)} seeds" if missing else "")
