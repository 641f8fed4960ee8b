"""Predict the times of the ops on a GPU from emulated runs of their kernels.

python -m tools.kernel_times [CASE ...]     print the prediction of every launch of the cases whose name contains
                                            one of these texts, by default of all
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from tools.emulator.build import BuildError
from tools.kernel_times import emulated, lines, resources
from tools.kernel_times.cases import CASES, CPP_NAMES, Case
from tools.kernel_times.machines import MACHINES
from tools.kernel_times.predict import Prediction, predict

HEADER = (
    f"{'kernel':34s} {'launches':>8s} {'blocks':>8s} {'SMs':>4s} {'warps':>5s} {'M instr.':>9s} {'MB':>8s} "
    f"{'span us':>8s} {'us':>9s}  bound by"
)


def group(predictions: Sequence[Prediction]) -> list[list[Prediction]]:
    """Return the predictions in groups of the same kernel, in the order of its first launch."""
    groups: dict[str, list[Prediction]] = {}
    for prediction in predictions:
        groups.setdefault(prediction.kernel, []).append(prediction)
    return list(groups.values())


def row(predictions: list[Prediction]) -> str:
    """Format the launches of one kernel: sums of instructions, bytes and times, the rest of the longest launch."""
    longest = max(predictions, key=lambda p: p.us)
    terms = ", ".join(
        f"{name} {us:.1f}" for name, us in sorted(longest.terms.items(), key=lambda t: -t[1]) if us > 0.05
    )
    remarks = [
        f"one warp {longest.one_warp:.0%}" if longest.one_warp > 0.2 else "",
        "one SM" if longest.multiprocessors == 1 else "",
        "" if longest.known else f"{longest.registers} registers assumed",
    ]
    return (
        f"{longest.kernel:34s} {len(predictions):8d} {longest.blocks:8d} {longest.multiprocessors:4d} "
        f"{longest.resident_warps:5d} {sum(p.instructions for p in predictions) / 1e6:9.2f} "
        f"{sum(p.bytes for p in predictions) / 1e6:8.2f} {longest.span:8.1f} {sum(p.us for p in predictions):9.1f}  "
        + "; ".join(remark for remark in (terms, *remarks) if remark)
    )


def show(case: Case, emulator, known: resources.Resources, profile: bool) -> None:
    """Print the predictions of one case."""
    torch.manual_seed(0)
    call = case.prepare()
    start = time.monotonic()
    launches = emulated.run(emulator, call, case.sampled_blocks, profile)
    seconds = time.monotonic() - start
    for machine in MACHINES:
        predictions = [predict(launch, machine, known, CPP_NAMES[case.dtype], case.scale) for launch in launches]
        goal = f", goal {case.goal:.0f}" if case.goal and machine is MACHINES[0] else ""
        total = sum(p.us for p in predictions)
        print(f"\n{case.name} on {machine.name}: {total:.1f} us{goal} ({seconds:.1f} s emulated)\n{HEADER}")
        for each in group(predictions):
            print(row(each))
    if profile:
        library = Path(emulator.__file__ or "")
        for kernel in dict.fromkeys(launch.kernel for launch in launches):
            print(f"\nwarp instructions of {kernel}, by line < caller")
            print("\n".join(lines.hottest_lines([launch for launch in launches if launch.kernel == kernel], library)))


def main() -> int:
    """Print the predictions of the chosen cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", nargs="*", help="part of the name of a case")
    parser.add_argument("--lines", action="store_true", help="list the source lines where the instructions go")
    parser.add_argument(
        "--cubin", type=Path, action="append", default=[], help="take the registers of its kernels from this file"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    chosen = [c for c in CASES if not arguments.case or any(text in c.name for text in arguments.case)]
    if not chosen:
        print(f"no such case: expected a part of {', '.join(c.name for c in CASES)}", file=sys.stderr)
        return 2
    try:
        emulator = emulated.load()
    except BuildError as error:
        print(error, file=sys.stderr)
        return 2
    known = resources.load(arguments.cubin)
    for case in chosen:
        show(case, emulator, known, arguments.lines)
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
