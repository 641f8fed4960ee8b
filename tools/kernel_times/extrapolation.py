"""Extrapolates the NMS of a long list, which takes hours to emulate, from shorter ones."""

from __future__ import annotations

from typing import Any

NAME = "nms 200k, thousands kept (extrapolated)"
GOAL = 16_000.0
#: Names of the emulated cases, and the case to predict: number of boxes, and how many the CPU kernel keeps of them.
EMULATED = {"nms 10k, thousands kept": (10_000, 7_402), "nms 20k, thousands kept": (20_000, 12_937)}
BOXES, KEPT = 200_000, 60_608

NOTE = (
    "extrapolated from 10,000 and 20,000 boxes. One part of the time is taken to grow with the number of boxes, the "
    "other with its product with the number of boxes kept"
)


def extrapolate(values: list[float]) -> float:
    """Return a quantity of the long list from that of the emulated ones: `a * boxes + b * boxes * kept`."""
    (n1, k1), (n2, k2) = EMULATED.values()
    per_box1, per_box2 = values[0] / n1, values[1] / n2
    b = max((per_box2 - per_box1) / (k2 - k1), 0.0)
    return BOXES * (per_box2 + b * (KEPT - k2))


def kernel(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the row of a kernel. What belongs to one launch is that of the longest emulated list."""
    sums = {key: round(extrapolate([row[key] for row in rows])) for key in ("us", "instructions", "bytes", "launches")}
    return rows[1] | sums


def nms_200k(cases: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the row of the table, from the rows of the emulated cases."""
    rows = [cases[name] for name in EMULATED]
    kernels = {
        name: kernel([row["kernels"].get(name, its) for row in rows]) for name, its in rows[1]["kernels"].items()
    }
    return rows[1] | {
        "goal": GOAL,
        "us": {machine: round(extrapolate([row["us"][machine] for row in rows]), 1) for machine in rows[1]["us"]},
        "launches": sum(its["launches"] for its in kernels.values()),
        "kernels": kernels,
    }
