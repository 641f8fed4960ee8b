"""Predict the times of the ops on a GPU from emulated runs of their kernels.

    python -m tools.kernel_times               rewrite docs/generated/kernel_times.json and kernel_times.md
    python -m tools.kernel_times --check       compare the predictions with docs/generated/kernel_times.json
    python -m tools.kernel_times nms detect    print the prediction of every launch of the cases whose names contain
                                               one of these texts, and write nothing

The check fails if a prediction has grown, or if a long launch leaves most of the machine idle: see check.py.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from types import ModuleType

import torch

from tools.emulator.build import BuildError
from tools.kernel_times import check, emulated, extrapolation, lines, page, resources, results
from tools.kernel_times.cases import CASES, Case
from tools.kernel_times.machines import H200, MACHINES
from tools.kernel_times.predict import Prediction
from tools.kernel_times.results import Outcome, groups

HEADER = (
    f"{'kernel':34s} {'launches':>8s} {'blocks':>8s} {'SMs':>4s} {'warps':>5s} {'M instr.':>9s} {'MB':>8s} "
    f"{'span us':>8s} {'us':>9s}  bound by"
)


def line(group: list[Prediction]) -> str:
    """Format the launches of one kernel: sums of instructions, bytes and times, the rest of the longest launch."""
    longest = max(group, key=lambda p: p.us)
    terms = ", ".join(
        f"{name} {us:.1f}" for name, us in sorted(longest.terms.items(), key=lambda t: -t[1]) if us > 0.05
    )
    remarks = [
        f"one warp {longest.one_warp:.0%}" if longest.one_warp > 0.2 else "",
        "one SM" if longest.multiprocessors == 1 else "",
        "" if longest.known else f"{longest.registers} registers assumed",
        "hot loop {:.0f} / {:.0f}".format(*longest.hot_loop) if longest.hot_loop else "",
    ]
    return (
        f"{longest.kernel:34s} {len(group):8d} {longest.blocks:8d} {longest.multiprocessors:4d} "
        f"{longest.resident_warps:5d} {sum(p.instructions for p in group) / 1e6:9.2f} "
        f"{sum(p.bytes for p in group) / 1e6:8.2f} {longest.span:8.1f} {sum(p.us for p in group):9.1f}  "
        + "; ".join(remark for remark in (terms, *remarks) if remark)
    )


def show(outcome: Outcome, emulator: ModuleType, profile: bool) -> None:
    """Print the predictions of one case."""
    case, operations = outcome.case, outcome.torch_calls.operations
    print(f"\n{case.name}: {len(outcome.launches)} launches, {operations.total()} GPU operations of torch", end="")
    print(f" {dict(operations)}, {outcome.torch_calls.dispatcher_calls} dispatcher calls")
    for machine in MACHINES:
        goal = f", goal {case.goal:.0f}" if case.goal and machine is H200 else ""
        print(f"{machine.name}: {outcome.us(machine.name):.1f} us with torch's operations{goal}\n{HEADER}")
        for group in groups(outcome.predictions[machine.name]):
            print(line(group))
    if profile:
        library = Path(emulator.__file__ or "")
        for kernel in dict.fromkeys(launch.kernel for launch in outcome.launches):
            print(f"\nwarp instructions of {kernel}, by line < caller")
            print("\n".join(lines.hottest_lines([each for each in outcome.launches if each.kernel == kernel], library)))
    sys.stdout.flush()


def write_or_check(emulator: ModuleType, known: resources.Resources, compare: bool) -> int:
    """Run all cases; write the table and the page, or compare with the table. Return the exit status."""
    old = results.load()
    rows, faults = {}, []
    for case in CASES:
        start = time.monotonic()
        outcome = Outcome(case, emulator, known)
        rows[case.name] = outcome.row()
        faults += check.shape_faults(case.name, outcome.predictions[H200.name])
        faults += check.loop_faults(case.name, outcome.predictions[H200.name])
        faults += check.growth_faults(case.name, rows[case.name], old["cases"].get(case.name)) if compare else []
        print(f"{case.name}: {outcome.us(H200.name):.1f} us ({time.monotonic() - start:.1f} s)", flush=True)
    rows[extrapolation.NAME] = extrapolation.nms_200k(rows)
    if compare:
        faults += check.growth_faults(
            extrapolation.NAME, rows[extrapolation.NAME], old["cases"].get(extrapolation.NAME)
        )
        faults += [f"{name}: in the table, but no case" for name in old["cases"].keys() - rows.keys()]
        if page.PAGE.read_text() != page.page(old):
            faults.append(f"{page.PAGE.name} is out of date")
        if results.compiler() != old["compiler"]:
            print(f"the table was made with compiler {old['compiler']}, this is {results.compiler()}")
    else:
        results.TABLE.write_text(results.dump(rows))
        page.PAGE.write_text(page.page(results.load()))
    for fault in faults:
        print(fault, file=sys.stderr)
    if faults and compare:
        print("if intended, run `make kernel-times` and commit docs/generated/kernel_times.*", file=sys.stderr)
    return int(bool(faults) and compare)


def main() -> int:
    """Print, write or check predictions. Return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", nargs="*", help="part of the name of a case")
    parser.add_argument("--check", action="store_true", help="compare with the committed table")
    parser.add_argument("--lines", action="store_true", help="list the source lines where the instructions go")
    parser.add_argument(
        "--cubin", type=Path, action="append", default=[], help="take the registers of its kernels from this file"
    )
    arguments = parser.parse_args()
    chosen: list[Case] = [case for case in CASES if any(text in case.name for text in arguments.case)]
    if arguments.case and not chosen:
        names = ", ".join(case.name for case in CASES)
        print(f"case: expected a part of one of {names}; got {', '.join(arguments.case)}", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    try:
        emulator = emulated.load()
    except BuildError as error:
        print(error, file=sys.stderr)
        return 2
    known = resources.load(arguments.cubin)
    if not arguments.case:
        return write_or_check(emulator, known, arguments.check)
    for case in chosen:
        show(Outcome(case, emulator, known, arguments.lines), emulator, arguments.lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
