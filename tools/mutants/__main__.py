"""Mutate the CUDA kernels, one small change at a time, and record which emulated test stage notices each mutant.

    python -m tools.mutants                 run the mutants without a result and write docs/generated/mutants.md
    python -m tools.mutants --fresh         discard all results first (after changes of the tests)
    python -m tools.mutants --survivors     discard the results of survivors without a proof first (after new tests)
    python -m tools.mutants --quick         try the first stage only, and leave the others for a later run
    python -m tools.mutants --files nms_cuda.cu common/boxes.h --minutes 30
    python -m tools.mutants --report        run nothing, write the page from the results
    python -m tools.mutants --check         run nothing and write nothing

The work is done in a copy of the tree under build/mutants. The copy's kernels hold all mutants at once, and an
environment variable selects one when the library is loaded, so each variant of the emulator is built only once.

Results are kept in docs/generated/mutants.json. A result is valid as long as the code of all ops that use the mutated
file stays the same, apart from comments, blank lines and layout. A change of the tests does not invalidate results, so
use --fresh after one. A mutant that survives its stages needs a one-line proof of equivalence in
tools/mutants/equivalent.json. A mutant with a proof is tried in the FIFO schedule only. Survivors take nearly all of
the time, so find those that need a proof with --quick first.

Exit status: 0 if every mutant has been run and is killed or proven equivalent, else 1. --report and --check also fail
if the page was out of date.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import queue
import sys
import threading
import time
from collections.abc import Container, Iterable
from pathlib import Path
from typing import Any

from tools.mutants.mutations import Mutant, mutants
from tools.mutants.report import page
from tools.mutants.sources import key_of, mutated_files, sources_of
from tools.mutants.tree import Tree, stages_of

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "build" / "mutants"
#: Results by `key_of`.
RESULTS = ROOT / "docs" / "generated" / "mutants.json"
#: Proofs of equivalence by the id of the mutant.
EQUIVALENT = ROOT / "tools" / "mutants" / "equivalent.json"
PAGE = ROOT / "docs" / "generated" / "mutants.md"


def store(results: dict[str, Any]) -> None:
    """Write the results, one per line."""
    lines = [f"{json.dumps(key)}: {json.dumps(results[key])}" for key in sorted(results)]
    RESULTS.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def is_decided(mutant: Mutant, result: dict[str, Any] | None, proven: bool, quick: bool = False) -> bool:
    """Return whether a mutant was killed or has passed all its stages, or the first of them if `quick`."""
    if result is None:
        return False
    stages = stages_of(mutant, proven)[: 1 if quick else None]
    return bool(result["stage"]) or all(stage.name in result["passed"] for stage in stages)


def run(
    tree: Tree,
    waiting: Iterable[Mutant],
    keys: dict[str, str],
    proven: Container[str],
    results: dict[str, Any],
    jobs: int,
    deadline: float,
    quick: bool = False,
) -> None:
    """Judge mutants until the deadline. Store each result as soon as it is known.

    A stage that a mutant has passed is not tried again. A `quick` run tries the first stage only.
    """
    free: queue.Queue[int] = queue.Queue()
    for job in range(jobs):
        free.put(job)
    lock = threading.Lock()
    failed = threading.Event()

    def one(mutant: Mutant) -> None:
        if failed.is_set() or time.monotonic() > deadline:
            return
        job = free.get()
        try:
            passed = results.get(keys[mutant.id], {}).get("passed", [])
            stages = stages_of(mutant, mutant.id in proven)[: 1 if quick else None]
            result = tree.judge(job, mutant, stages, passed)
        except BaseException:
            failed.set()
            raise
        finally:
            free.put(job)
        with lock:
            results[keys[mutant.id]] = result
            store(results)
            print(f"{result['stage'] or 'SURVIVES':<15} {mutant.id}  {result['by']}", flush=True)

    try:
        with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
            for future in [pool.submit(one, mutant) for mutant in waiting]:
                future.result()
    finally:
        tree.close()


def main() -> int:
    """Run the mutants, write the page and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", nargs="*", help="files of csrc; default: all with device code")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="mutants tested at a time")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no mutant after this time")
    parser.add_argument("--fresh", action="store_true", help="discard all results first")
    parser.add_argument("--survivors", action="store_true", help="discard results of survivors without a proof first")
    parser.add_argument("--quick", action="store_true", help="try the first stage only; leave its survivors for later")
    parser.add_argument("--report", action="store_true", help="run nothing; fail if the page was out of date")
    parser.add_argument("--check", action="store_true", help="run nothing and write nothing; fail as --report does")
    arguments = parser.parse_args()
    deadline = time.monotonic() + 60 * arguments.minutes
    csrc = ROOT / "csrc"
    sources = {name: sources_of(name, csrc) for name in mutated_files(csrc)}
    everything = [mutant for name in sources for mutant in mutants(name, sources[name][name])]
    keys = {mutant.id: key_of(mutant, sources[mutant.file]) for mutant in everything}
    proofs: dict[str, str] = json.loads(EQUIVALENT.read_text()) if EQUIVALENT.exists() else {}
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() and not arguments.fresh else {}
    # Results of code that has changed are dropped.
    results = {key: results[key] for key in keys.values() if key in results}
    if arguments.survivors:
        unproven = {keys[mutant.id] for mutant in everything if mutant.id not in proofs}
        results = {key: result for key, result in results.items() if result["stage"] or key not in unproven}
    chosen = [mutant for mutant in everything if not arguments.files or mutant.file in arguments.files]
    waiting = [m for m in chosen if not is_decided(m, results.get(keys[m.id]), m.id in proofs, arguments.quick)]
    print(f"{len(everything)} mutants, {len(waiting)} of them to be run")
    run_nothing = arguments.report or arguments.check
    if waiting and not run_nothing:
        WORK.mkdir(parents=True, exist_ok=True)
        tree = Tree(WORK, {mutant: number for number, mutant in enumerate(everything, 1)})
        for mutant in everything:
            if result := results.get(keys[mutant.id]):
                tree.killed(mutant, result["stage"], result["by"])
        run(tree, waiting, keys, proofs, results, arguments.jobs, deadline, arguments.quick)
    decided = [m for m in everything if is_decided(m, results.get(keys[m.id]), m.id in proofs)]
    judged = {mutant.id: results[keys[mutant.id]] for mutant in decided}
    text, faults = page(everything, judged, proofs)
    if run_nothing and (not PAGE.exists() or PAGE.read_text() != text):
        faults.append(f"{PAGE.name} is out of date")
    if not arguments.check:
        PAGE.write_text(text)
    for fault in faults:
        print(fault, file=sys.stderr)
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
