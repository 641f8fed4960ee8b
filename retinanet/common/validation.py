"""Declarative checks of a dataclass: one rule beside each field, one wording for every message."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from retinanet.common.errors import ConfigError

Record = TypeVar("Record")

_RULE = "rule"


@dataclass(frozen=True)
class Rule:
    """What a field accepts.

    Attributes:
        expected: Description of the accepted values, for the message "name: expected ..., got ...".
        accepts: Returns whether a value is accepted.
    """

    expected: str
    accepts: Callable[[Any], bool]


def checked(default: Any, rule: Rule) -> Any:
    """Return a dataclass field with a default value and the rule that `check_fields` applies to it."""
    return dataclasses.field(default=default, metadata={_RULE: rule})


def check_fields(record: Any, prefix: str = "") -> None:
    """Check every field of a dataclass instance that was declared with `checked`.

    Args:
        record: The instance.
        prefix: Text before the field name in messages.

    Raises:
        ConfigError: A value breaks the rule of its field. The message names the field, what it accepts and the value.
    """
    for field in dataclasses.fields(record):
        rule: Rule | None = field.metadata.get(_RULE)
        value = getattr(record, field.name)
        if rule is not None and not rule.accepts(value):
            raise ConfigError(f"{prefix}{field.name}: expected {rule.expected}, got {value!r}")


def as_tuples(record: Any) -> None:
    """Turn the lists in the fields of a dataclass instance into tuples.

    A single value becomes a tuple of one where the field's default is a tuple, or a tuple of tuples: 800 and [800] are
    the same size, and [16, 32] and [[16], [32]] the same anchors.
    """
    for field in dataclasses.fields(record):
        value = _as_tuple(getattr(record, field.name))
        if isinstance(field.default, tuple):
            if _is_single(value):
                value = (value,)
            if isinstance(value, tuple) and field.default and isinstance(field.default[0], tuple):
                value = tuple((entry,) if _is_single(entry) else entry for entry in value)
        object.__setattr__(record, field.name, value)


def _as_tuple(value: Any) -> Any:
    return tuple(_as_tuple(v) for v in value) if isinstance(value, (list, tuple)) else value


def _is_single(value: Any) -> bool:
    return isinstance(value, (int, float, str)) and not isinstance(value, bool)


def make_record(record: type[Record], fields: Any, name: str) -> Record:
    """Make a dataclass instance from its fields by name.

    Args:
        record: The dataclass.
        fields: A mapping, usually read from JSON.
        name: Name of the record, for messages.

    Raises:
        ConfigError: `fields` is not a mapping, or a field is unknown or wrong.
    """
    if not isinstance(fields, Mapping):
        raise ConfigError(f"{name}: expected an object with fields, got {type(fields).__name__}")
    unknown = sorted(set(fields) - {field.name for field in dataclasses.fields(record)})  # type: ignore[arg-type]
    if unknown:
        names = [field.name for field in dataclasses.fields(record)]  # type: ignore[arg-type]
        similar = difflib.get_close_matches(str(unknown[0]), names, n=1)
        hint = f", did you mean {similar[0]}?" if similar else ""
        raise ConfigError(f"{unknown[0]}: no such field in the {name}{hint}")
    return record(**fields)


def flag() -> Rule:
    """Return a rule that accepts True and False."""
    return Rule("true or false", lambda value: isinstance(value, bool))


def one_of(choices: Sequence[str]) -> Rule:
    """Return a rule that accepts the given strings."""
    return Rule(f"one of {', '.join(choices)}", lambda value: isinstance(value, str) and value in choices)


def integer(low: int, high: int | None = None) -> Rule:
    """Return a rule that accepts integers from `low` to `high`, both included; `high` None is unbounded."""
    bounds = f"of at least {low}" if high is None else f"in {low}..{high}"
    return Rule(
        f"an integer {bounds}", lambda value: is_integer(value) and value >= low and (high is None or value <= high)
    )


def number(
    low: float | None = None, high: float | None = None, *, above: float | None = None, below: float | None = None
) -> Rule:
    """Return a rule that accepts finite numbers inside bounds.

    Args:
        low: Smallest accepted number, or None.
        high: Largest accepted number, or None.
        above: Exclusive lower bound, or None.
        below: Exclusive upper bound, or None.
    """
    if low is not None and high is not None:
        bounds = [f"in {low:g}..{high:g}"]
    else:
        limits = (("of at least", low), ("above", above), ("of at most", high), ("below", below))
        bounds = [f"{words} {limit:g}" for words, limit in limits if limit is not None]

    def accepts(value: Any) -> bool:
        return (
            is_number(value)
            and (low is None or value >= low)
            and (high is None or value <= high)
            and (above is None or value > above)
            and (below is None or value < below)
        )

    return Rule(f"a number {' and '.join(bounds)}", accepts)


def integers(low: int) -> Rule:
    """Return a rule that accepts a non-empty tuple of integers that are at least `low`."""
    return Rule(
        f"integers of at least {low}",
        lambda value: isinstance(value, tuple) and len(value) > 0 and all(is_integer(v) and v >= low for v in value),
    )


def numbers(count: int | None = None, *, positive: bool = False) -> Rule:
    """Return a rule for a non-empty tuple of finite numbers: `count` of them if given, above 0 if `positive`."""
    kind = "numbers above 0" if positive else "numbers"
    return Rule(
        f"{'one or more' if count is None else count} {kind}",
        lambda value: (
            isinstance(value, tuple)
            and len(value) == (len(value) or 1 if count is None else count)
            and all(is_number(v) and (v > 0 or not positive) for v in value)
        ),
    )


def optional(rule: Rule) -> Rule:
    """Return a rule that accepts None and whatever `rule` accepts."""
    return Rule(f"{rule.expected}, or none", lambda value: value is None or rule.accepts(value))


def is_integer(value: Any) -> bool:
    """Return whether a value is an integer and not a boolean."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Return whether a value is a finite integer or float and not a boolean."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
