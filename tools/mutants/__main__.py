"""Changes the CUDA kernels, one small mutation at a time, and looks which emulated test stage notices.

    python scripts/mutants.py                     run what docs/mutants.json lacks, then write docs/mutants.md
    python scripts/mutants.py --fresh             forget earlier results: after changes of the tests
    python scripts/mutants.py --survivors         forget those that survived without a proof: after additions to them
    python scripts/mutants.py --files nms_cuda.cu --minutes 30
    python scripts/mutants.py --report            only write the page from what is known
    python scripts/mutants.py --check             the same, but leave the page as it is

Works in a copy of the tree under build/mutants, whose kernels hold all mutants at once, to be chosen when the library
is loaded: it is built once for each kind of stage. A result holds as long as the sources of all ops that use the
mutated file stay as they are. Tests are not among these: after changes of tests, only --fresh tells the truth. A mutant
that survives its stages needs a one-line proof of equivalence in docs/mutants_equivalent.json; with one, it is tried in
the first stage only.

Exit status: 0 if every mutant has been run, and is killed or proven equivalent; else 1. --report and --check also fail
if the page was out of date.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import hashlib
import json
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Container, Iterable
from pathlib import Path
from typing import Any

from locating import load
from mutant_report import page
from mutations import Mutant, apply, mutants, switched

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "mutants"
RESULTS = ROOT / "docs" / "mutants.json"  # by a hash of what is compiled
EQUIVALENT = ROOT / "docs" / "mutants_equivalent.json"
PAGE = ROOT / "docs" / "mutants.md"
SERVER = ROOT / "scripts" / "mutant_server.py"

#: Variant of the emulator's build, and schedule, in the order in which they are tried.
STAGES = (
    ("plain", "fifo"),
    ("asan", "fifo"),
    ("races", "fifo"),
    ("plain", "lifo"),
    ("plain", "random:1"),
    ("plain", "random:2"),
)
#: Code in which threads meet: without it in a mutant's file, races cannot arise.
MEETING = re.compile(r"threadIdx|__shared__|__sync|_sync\(|atomic")
#: How `switched` files know which mutant they are; 0 is none. It is not the kernels' memory: nothing traces it.
SWITCH = "switch.h"
SWITCH_TEXT = """#pragma once
#include <cstdlib>

inline const int kMutant = [] {
  const char* number = std::getenv("RETINANET_OPS_MUTANT");
  return number ? std::atoi(number) : 0;
}();
__attribute__((no_sanitize("thread"))) inline bool mutant_is(int number) { return kMutant == number; }
"""
#: Tests of an op beside its own: `detect` alone reaches some options of nms.
MORE_TESTS = {
    "detect": ["detect_threshold"],
    "nms": ["detect", "nms_many", "nms_properties"],
    "soft_nms": ["nms_properties"],
    "hard_negative_mask": ["nms_properties"],
    "matching": ["matching_grid", "matching_properties", "matching_statistics"],
}


def included(source: Path) -> set[str]:
    """Paths in csrc of the headers that a source of csrc includes, directly or not."""
    csrc = source.parent
    headers: set[str] = set()
    waiting = [source]
    while waiting:
        includer = waiting.pop()
        for name in re.findall(r'#include "([\w./]+)"', includer.read_text()):
            header = includer.parent / name
            path = str(header.relative_to(csrc))
            if path not in headers and header.exists():
                headers.add(path)
                waiting.append(header)
    return headers


def ops_of(file: str, csrc: Path) -> list[str]:
    """Ops whose kernels hold code of this file, the one of the same name first."""
    stem = re.sub(r"(_cuda)?\.\w+$", "", Path(file).name)
    ops = [path.name.removesuffix("_cuda.cu") for path in sorted(csrc.glob("*_cuda.cu"))]
    users = [op for op in ops if file == f"{op}_cuda.cu" or file in included(csrc / f"{op}_cuda.cu")]
    return sorted(users, key=lambda op: (op != stem, ("matching", "nms", "detect").count(op) == 0))


def mutated_files(csrc: Path) -> list[str]:
    """The kernels' files, and headers with device code."""
    kernels = sorted(csrc.glob("*_cuda.cu"))
    headers = {name for kernel in kernels for name in included(kernel)}
    return [path.name for path in kernels] + sorted(headers)


def sources_of(file: str, csrc: Path) -> dict[str, str]:
    """Texts, by name, of all files of which the ops that use this file are made."""
    kernels = {f"{op}_cuda.cu" for op in ops_of(file, csrc)}
    headers = {name for kernel in kernels for name in included(csrc / kernel)}
    return {name: (csrc / name).read_text() for name in sorted({file} | kernels | headers)}


def key_of(mutant: Mutant, sources: dict[str, str]) -> str:
    """Identifies a mutant by the texts of `sources_of`, its own among them."""
    changed = {**sources, mutant.file: apply(sources[mutant.file], mutant)}
    return hashlib.sha256(json.dumps([mutant.file, changed], sort_keys=True).encode()).hexdigest()[:20]


class Tree:
    """A copy of the project whose kernels hold all mutants, and the processes that test it, one for each job."""

    def __init__(self, root: Path, numbers: dict[Mutant, int]) -> None:
        """Copy what the emulated tests need; `numbers` are from 1."""
        self.root = root
        self.numbers = numbers
        self.lock = threading.Lock()
        self.seconds: dict[tuple[str, str, str], float] = {}
        self.folders: dict[str, Path] = {}
        self.servers: dict[tuple[int, str], subprocess.Popen[str]] = {}
        for name in ("tests", "retinanet_ops"):
            shutil.rmtree(root / name, ignore_errors=True)
            shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("*.so", "__pycache__", "data"))
        shutil.copy2(ROOT / "pyproject.toml", root)
        (root / "csrc" / "common").mkdir(parents=True, exist_ok=True)
        csrc = ROOT / "csrc"
        files = {str(path.relative_to(csrc)): path.read_text() for path in csrc.rglob("*") if path.is_file()}
        for name in {mutant.file for mutant in numbers}:
            found = {mutant: number for mutant, number in numbers.items() if mutant.file == name}
            files[name] = f'#include "{os.path.relpath(SWITCH, Path(name).parent)}"\n' + switched(files[name], found)
        files[SWITCH] = SWITCH_TEXT
        for path in (root / "csrc").rglob("*"):
            if path.is_file() and str(path.relative_to(root / "csrc")) not in files:
                path.unlink()
        for name, text in files.items():
            path = root / "csrc" / name
            if not path.exists() or path.read_text() != text:  # else it would be compiled again
                path.write_text(text)

    def folder(self, variant: str) -> Path:
        """Where the library of a variant is, built when it is first asked for."""
        with self.lock:
            if variant not in self.folders:
                build = self.root / "tests" / "emulation" / "build.py"
                command = [sys.executable, str(build), variant]
                output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                self.folders[variant] = Path(output.strip())
            return self.folders[variant]

    def test(self, job: int, variant: str, schedule: str, op: str, number: int, limit: float) -> str | None:
        """What fails when the op's tests run on a mutant, or None."""
        files = [f"tests/test_{name}.py" for name in (op, *MORE_TESTS.get(op, []))]
        if variant == "races":
            files.append("tests/test_kernels.py")  # what the kernels move
        # -s: what a sanitizer says before it ends the process has to reach the log.
        options = ["-q", "-x", "-s", "--tb=short", "-p", "no:cacheprovider"]
        # Tests of the tests, and slow ones of what PyTorch makes of an op.
        options += ["-k", "not AssertionsAreWorthSomething and not TestCompile"]
        options += ["--backend", "emulated", "--emulation", variant, "--schedule", schedule]
        log = self.root / f"log{job}"
        request = {"folder": str(self.folder(variant)), "mutant": number, "arguments": [*options, *files]}
        answer = self.ask(job, variant, json.dumps({**request, "limit": limit, "log": str(log)}))
        if answer == "0":
            return None
        if answer == "late":
            return "does not end"
        output = log.read_text(errors="replace")
        if match := re.search(r"^(?:FAILED|ERROR) tests/(\S+?)(?:\[| |$)", output, re.MULTILINE):
            return match[1]
        if match := re.search(r"ERROR: AddressSanitizer: (\S+)|runtime error: ([^\n]+)", output):
            return f"AddressSanitizer, {match[1]}" if match[1] else "UndefinedBehaviorSanitizer"
        return signal.Signals(-int(answer)).name if answer.startswith("-") else f"exit status {answer}"

    def ask(self, job: int, variant: str, request: str) -> str:
        """The answer of a job's process with torch in it, which is started at the first request."""
        server = self.servers.get((job, variant))
        if server is None or server.poll() is not None:
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
            if variant == "asan":
                environment |= load(self.root / "tests" / "emulation" / "run.py").sanitizer_environment()
            server = self.servers[job, variant] = subprocess.Popen(
                [sys.executable, str(SERVER)],
                cwd=self.root,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            self.read_line(server)
        assert server.stdin
        server.stdin.write(request + "\n")
        server.stdin.flush()
        return self.read_line(server)

    @staticmethod
    def read_line(server: subprocess.Popen[str]) -> str:
        """One line of a server that lives."""
        assert server.stdout
        if line := server.stdout.readline().strip():
            return line
        raise RuntimeError("the process that runs the tests has ended")

    def close(self) -> None:
        """End the servers."""
        for server in self.servers.values():
            assert server.stdin
            server.stdin.close()
            server.wait()

    def limit(self, job: int, variant: str, schedule: str, op: str) -> float:
        """Seconds that the tests may take, from a run on the unchanged kernels, which must pass."""
        name = variant, schedule, op
        if name not in self.seconds:
            self.folder(variant)
            start = time.monotonic()
            if failure := self.test(job, variant, schedule, op, 0, 1800):
                raise RuntimeError(f"{op}: the unchanged kernels fail {failure} as {variant}, {schedule}")
            self.seconds[name] = time.monotonic() - start
        return 30 + 2 * self.seconds[name]

    def judge(self, job: int, mutant: Mutant, proven: bool) -> dict[str, str]:
        """The stage that kills a mutant, and by what; an empty stage if none does."""
        ops = ops_of(mutant.file, ROOT / "csrc")
        number = len(STAGES) if mutant.kind in ("barrier", "mask") else 3  # other orders are for what orders threads
        if not MEETING.search((ROOT / "csrc" / mutant.file).read_text()):
            number = 2
        stages = STAGES[: 1 if proven else number]
        for variant, schedule in stages:
            for op in ops if variant == "plain" else ops[:2]:
                limit = self.limit(job, variant, schedule, op)
                if failure := self.test(job, variant, schedule, op, self.numbers[mutant], limit):
                    return {"stage": f"{variant} {schedule}" if variant == "plain" else variant, "by": failure}
        return {"stage": "", "by": ""}


def store(results: dict[str, Any]) -> None:
    """Write the results, a line each."""
    lines = [f"{json.dumps(key)}: {json.dumps(results[key])}" for key in sorted(results)]
    RESULTS.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def run(
    tree: Tree,
    waiting: Iterable[Mutant],
    keys: dict[str, str],
    proven: Container[str],
    results: dict[str, Any],
    jobs: int,
    deadline: float,
) -> None:
    """Judge mutants until the deadline, and store each result at once."""
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
            result = tree.judge(job, mutant, mutant.id in proven)
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
    """Run the mutants and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", nargs="*", help="files of csrc; default: all with device code")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no mutant after so many")
    parser.add_argument("--fresh", action="store_true", help="forget earlier results")
    parser.add_argument("--survivors", action="store_true", help="forget results that want a proof")
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
    # Of the kernels as they are.
    results = {key: results[key] for key in keys.values() if key in results}
    if arguments.survivors:
        unproven = {keys[mutant.id] for mutant in everything if mutant.id not in proofs}
        results = {key: result for key, result in results.items() if result["stage"] or key not in unproven}
    chosen = [mutant for mutant in everything if not arguments.files or mutant.file in arguments.files]
    waiting = [mutant for mutant in chosen if keys[mutant.id] not in results]
    print(f"{len(everything)} mutants, {len(waiting)} of them to be run")
    run_nothing = arguments.report or arguments.check
    if waiting and not run_nothing:
        WORK.mkdir(parents=True, exist_ok=True)
        tree = Tree(WORK, {mutant: number for number, mutant in enumerate(everything, 1)})
        run(tree, waiting, keys, proofs, results, arguments.jobs, deadline)
    judged = {mutant.id: results[keys[mutant.id]] for mutant in everything if keys[mutant.id] in results}
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
