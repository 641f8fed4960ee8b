"""Decides which predictions make `make kernel-times ARGS=--check` fail."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from tools.kernel_times.machines import H200
from tools.kernel_times.predict import Prediction

#: A prediction may grow by this factor over the committed one, and by this many microseconds.
MOST_GROWTH, LEAST_GROWTH_US = 1.15, 1.0
#: A launch that takes longer must use this share of the multiprocessors, and must not spend more than this share of its
#: blocks' time in one warp.
LONG_US, LEAST_MACHINE, MOST_ONE_WARP = 20.0, 0.1, 0.25

#: The instructions of a hot loop in the machine code and those that the emulator estimates may differ by this factor.
#: If they differ more, they belong to different loops.
DISAGREEMENT = 4.0

#: Launches whose shape is accepted: patterns of the case and the kernel, and the reason.
ACCEPTED: list[tuple[str, str, str]] = []


def shape_faults(case: str, predictions: Iterable[Prediction]) -> list[str]:
    """Return a fault for each kernel that leaves most of the machine idle, unless it is accepted."""
    faults = {}
    for p in predictions:
        if p.us <= LONG_US or any(re.search(its, case) and re.search(kernel, p.kernel) for its, kernel, _ in ACCEPTED):
            continue
        if p.multiprocessors < LEAST_MACHINE * H200.multiprocessors:
            faults[p.kernel] = f"uses {p.multiprocessors} of {H200.multiprocessors} multiprocessors"
        elif p.one_warp > MOST_ONE_WARP:
            faults[p.kernel] = f"spends {p.one_warp:.0%} of its blocks' time in one warp"
        else:
            continue
        faults[p.kernel] = f"{case}: {p.kernel}, {p.us:.0f} us, {faults[p.kernel]}"
    return list(faults.values())


def loop_faults(case: str, predictions: Iterable[Prediction]) -> list[str]:
    """Return a fault for each kernel whose hot loop is another one in the machine code than in the emulator."""
    faults = {}
    for p in predictions:
        if p.hot_loop and not p.hot_loop[0] / DISAGREEMENT <= p.hot_loop[1] <= p.hot_loop[0] * DISAGREEMENT:
            faults[p.kernel] = (
                f"{case}: {p.kernel}, the hot loop has {p.hot_loop[0]:.0f} instructions per 128-bit access in the "
                f"machine code, {p.hot_loop[1]:.0f} in the emulator; expected at most a factor of {DISAGREEMENT:.0f}"
            )
    return list(faults.values())


def _grew(new: float, old: float) -> bool:
    return new > old * MOST_GROWTH and new > old + LEAST_GROWTH_US


def growth_faults(case: str, new: dict[str, Any], old: dict[str, Any] | None) -> list[str]:
    """Return a fault for each prediction of a case that is larger than the committed one."""
    if old is None:
        return [f"{case}: not in the table"]
    faults = [
        f"{case}: {us} us on {machine}, the table: {old['us'][machine]} us"
        for machine, us in new["us"].items()
        if _grew(us, old["us"][machine])
    ]
    for kernel, row in new["kernels"].items():
        before = old["kernels"].get(kernel)
        if before and _grew(row["us"], before["us"]):
            faults.append(f"{case}: {kernel} takes {row['us']} us on {H200.name}, the table: {before['us']} us")
    return faults
