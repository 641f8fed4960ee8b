"""Extrapolates the NMS of a long list, which takes hours to emulate, from shorter ones."""

from __future__ import annotations

from typing import Any

from tools.kernel_times.machines import H200, MACHINES, Machine

NAME = "nms 200k, thousands kept (extrapolated)"
GOAL = 16_000.0
#: Names of the emulated cases, and the case to predict: number of boxes, and how many the CPU kernel keeps of them.
EMULATED = {"nms 12k, thousands kept": (12_000, 8_629), "nms 20k, thousands kept": (20_000, 12_937)}
BOXES, KEPT = 200_000, 60_608

NOTE = (
    "extrapolated from 12,000 and 20,000 boxes. One part of a kernel's time and instructions is taken to grow with the "
    "number of boxes, the other with its product with the number of boxes kept. A kernel takes at least the time to "
    "issue its instructions"
)


def extrapolate(values: list[float]) -> float:
    """Return a quantity of the long list from that of the emulated ones: `a * boxes + b * boxes * kept`."""
    (n1, k1), (n2, k2) = EMULATED.values()
    per_box1, per_box2 = values[0] / n1, values[1] / n2
    b = max((per_box2 - per_box1) / (k2 - k1), 0.0)
    return BOXES * (per_box2 + b * (KEPT - k2))


def extend(values: list[float]) -> float:
    """Return a quantity of the long list that is `a + b * boxes`, such as a number of launches."""
    (n1, _), (n2, _) = EMULATED.values()
    return values[1] + (values[1] - values[0]) / (n2 - n1) * (BOXES - n2)


def issue_us(instructions: float, machine: Machine) -> float:
    """Return the microseconds that a machine takes to issue warp instructions on all multiprocessors."""
    return instructions / (machine.multiprocessors * machine.issue_rate * machine.clock)


def kernel(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the row of a kernel. What belongs to one launch is that of the longest emulated list."""
    launches = round(extend([row["launches"] for row in rows]))
    # The time of a single launch has a part that does not grow.
    formula = extend if launches == rows[1]["launches"] else extrapolate
    sums = {key: round(formula([row[key] for row in rows])) for key in ("us", "instructions", "bytes")}
    sums["us"] = round(max(sums["us"], issue_us(sums["instructions"], H200) + launches * H200.launch))
    return rows[1] | sums | {"launches": launches}


def nms_200k(cases: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the row of the table, from the rows of the emulated cases."""
    rows = [cases[name] for name in EMULATED]
    kernels = {
        name: kernel([row["kernels"].get(name, its) for row in rows]) for name, its in rows[1]["kernels"].items()
    }
    us = {}
    for machine in MACHINES:
        # The rows of kernels have times on an H200. What the longest list takes beyond them are PyTorch's operations.
        beyond = rows[1]["us"][H200.name] - sum(its["us"] for its in rows[1]["kernels"].values())
        by_kernel = beyond + sum(
            max(its["us"], issue_us(its["instructions"], machine) + its["launches"] * machine.launch)
            for its in kernels.values()
        )
        us[machine.name] = round(max(by_kernel, extrapolate([row["us"][machine.name] for row in rows])), 1)
    return rows[1] | {
        "goal": GOAL,
        "us": us,
        "launches": sum(its["launches"] for its in kernels.values()),
        "kernels": kernels,
    }
