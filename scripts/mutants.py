"""Changes the CUDA kernels, one small mutation at a time, and looks which emulated test stage notices.

    python scripts/mutants.py                     run what docs/mutants.json lacks, then write docs/mutants.md
    python scripts/mutants.py --fresh             forget earlier results: after changes of the tests
    python scripts/mutants.py --survivors         forget those that survived without a proof: after additions to them
    python scripts/mutants.py --files nms_cuda.cu --minutes 30
    python scripts/mutants.py --report            only write the page from what is known
    python scripts/mutants.py --check             the same, but leave the page as it is

Works in copies of the tree under build/mutants. A result holds as long as the sources of all ops that use the mutated
file stay as they are. Tests are not among these: after changes of tests, only --fresh tells the truth. A mutant that
survives all stages needs a one-line proof of equivalence in docs/mutants_equivalent.json; with one, it is tried in the
first stage only.

Exit status: 0 if every mutant has been run, and is killed, proven equivalent or does not compile; else 1. --report and
--check also fail if the page was out of date.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import hashlib
import json
import os
import queue
import re
import shlex
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
from mutant_report import COMPILER, page
from mutations import Mutant, apply, mutants

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
    ("plain", "random:3"),
)
#: Tests of an op beside its own: `detect` alone reaches some options of nms.
MORE_TESTS = {"nms": ["detect"], "matching": ["matching_properties", "matching_statistics"]}


def included(source: Path) -> set[str]:
    """Names of the project's headers that a source includes, directly or not."""
    found: set[str] = set()
    waiting = [source]
    while waiting:
        for name in re.findall(r'#include "([\w.]+)"', waiting.pop().read_text()):
            if name not in found and (source.parent / name).exists():
                found.add(name)
                waiting.append(source.parent / name)
    return found


def ops_of(file: str, csrc: Path) -> list[str]:
    """Ops whose kernels hold code of this file, the one of the same name first."""
    stem = re.sub(r"(_cuda)?\.\w+$", "", file)
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
    """A copy of the project in which one mutant at a time is built and tested."""

    def __init__(self, root: Path) -> None:
        """Copy what the emulated tests need."""
        self.root = root
        for name in ("csrc", "tests", "retinanet_ops"):
            shutil.rmtree(root / name, ignore_errors=True)
            shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("*.so", "__pycache__", "data"))
        shutil.rmtree(root / "mutant", ignore_errors=True)
        shutil.copy2(ROOT / "pyproject.toml", root)
        self.links: dict[str, str] = {}
        self.compilations: dict[tuple[str, str], str] = {}
        self.seconds: dict[tuple[str, str, str], float] = {}
        self.built: dict[tuple[str, str], str] = {}  # what mutant_folder holds: the mutant's id, "" if unchanged
        self.servers: dict[str, subprocess.Popen[str]] = {}

    def folder(self, variant: str) -> Path:
        """Where the unchanged variant is built."""
        return self.root / "build" / "emulated" / variant

    def prepare(self, variant: str) -> None:
        """Build the unchanged variant, and keep its commands."""
        if variant in self.links:
            return
        build = self.root / "tests" / "emulation" / "build.py"
        subprocess.run([sys.executable, build, variant], check=True, stdout=subprocess.DEVNULL)
        ninja = shutil.which("ninja", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
        command = [ninja or "ninja", "-C", str(self.folder(variant)), "-t", "commands", "retinanet_ops/_C.so"]
        lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
        self.links[variant] = lines[-1]
        for line in lines:
            if match := re.search(r"(\w+)_cuda\.cu -o ", line):
                # A mutant is compiled for a few runs of its tests: a third less time is worth slower code.
                quick = line.replace(" -g ", " -g0 ").replace(" -O2 ", " -O1 ") if variant == "plain" else line
                self.compilations[variant, match[1]] = quick

    def mutant_folder(self, variant: str, op: str) -> Path:
        """Where the mutant's library is built that holds the changed kernels of one op."""
        return self.root / "mutant" / variant / op

    def build(self, variant: str, op: str, name: str) -> bool:
        """Compile one op's kernels as csrc has them now, and link them with the other ops' unchanged ones.

        Does nothing if that is done: `name` says what csrc has, the mutant's id or "".
        """
        if self.built.pop((variant, op), None) == name or self.compile(variant, op):
            self.built[variant, op] = name
        return (variant, op) in self.built

    def compile(self, variant: str, op: str) -> bool:
        """What `build` does where it has to."""
        folder, target = self.folder(variant), self.mutant_folder(variant, op)
        if not target.exists():
            (target / "retinanet_ops").mkdir(parents=True)
            for path in (folder / "retinanet_ops").iterdir():
                if path.name != "_C.so":
                    (target / "retinanet_ops" / path.name).symlink_to(path.resolve())
        item = f"{op}_cuda.cu.o"
        compilation = re.sub(
            rf"(?<= -o ){re.escape(item)}", shlex.quote(str(target / item)), self.compilations[variant, op]
        )
        link = self.links[variant].replace(f" {item}", f" {shlex.quote(str(target / item))}")
        link = link.replace("-o retinanet_ops/_C.so", f"-o {shlex.quote(str(target / 'retinanet_ops' / '_C.so'))}")
        compilation = re.sub(r"-MMD -MF \S+", "", compilation)
        return all(
            subprocess.run(command, shell=True, cwd=folder, capture_output=True, check=False).returncode == 0
            for command in (compilation, link)
        )

    def test(self, variant: str, schedule: str, op: str, limit: float) -> str | None:
        """What fails when the op's tests run on the mutant's library, or None."""
        files = [f"tests/test_{name}.py" for name in (op, *MORE_TESTS.get(op, []))]
        if variant == "races":
            files.append("tests/test_kernels.py")  # what the kernels move
        # -s: what a sanitizer says before it ends the process has to reach the log.
        options = ["-q", "-x", "-s", "--tb=short", "-p", "no:cacheprovider"]
        # Tests of the tests, and slow ones of what PyTorch makes of an op.
        options += ["-k", "not AssertionsAreWorthSomething and not TestCompile"]
        options += ["--backend", "emulated", "--emulation", variant, "--schedule", schedule]
        log = self.mutant_folder(variant, op) / "log"
        request = {"folder": str(log.parent), "arguments": [*options, *files], "limit": limit, "log": str(log)}
        answer = self.ask(variant, json.dumps(request))
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

    def ask(self, variant: str, request: str) -> str:
        """The answer of the variant's process with torch in it, which is started at the first request."""
        server = self.servers.get(variant)
        if server is None or server.poll() is not None:
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
            if variant == "asan":
                environment |= load(self.root / "tests" / "emulation" / "run.py").sanitizer_environment()
            server = self.servers[variant] = subprocess.Popen(
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

    def limit(self, variant: str, schedule: str, op: str) -> float:
        """Seconds that the tests may take, from a run on the unchanged kernels, which must pass."""
        name = variant, schedule, op
        if name not in self.seconds:
            self.prepare(variant)
            if not self.build(variant, op, ""):
                raise RuntimeError(f"{op}: the unchanged kernels do not build as {variant}")
            start = time.monotonic()
            if failure := self.test(variant, schedule, op, 1800):
                raise RuntimeError(f"{op}: the unchanged kernels fail {failure} as {variant}, {schedule}")
            self.seconds[name] = time.monotonic() - start
        return 30 + 5 * self.seconds[name]

    def judge(self, mutant: Mutant, proven: bool) -> dict[str, str]:
        """The stage that kills a mutant, and by what; an empty stage if none does."""
        source = self.root / "csrc" / mutant.file
        text = source.read_text()
        ops = ops_of(mutant.file, source.parent)
        for variant, schedule in STAGES[:1] if proven else STAGES:
            for op in ops if variant == "plain" else ops[:2]:
                limit = self.limit(variant, schedule, op)
                source.write_text(apply(text, mutant))
                try:
                    if not self.build(variant, op, mutant.id):
                        return {"stage": COMPILER, "by": "does not compile"}
                    failure = self.test(variant, schedule, op, limit)
                finally:
                    source.write_text(text)
                if failure:
                    return {"stage": f"{variant} {schedule}" if variant == "plain" else variant, "by": failure}
        return {"stage": "", "by": ""}


def store(results: dict[str, Any]) -> None:
    """Write the results, a line each."""
    lines = [f"{json.dumps(key)}: {json.dumps(results[key])}" for key in sorted(results)]
    RESULTS.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def run(
    waiting: Iterable[Mutant],
    keys: dict[str, str],
    proven: Container[str],
    results: dict[str, Any],
    jobs: int,
    deadline: float,
) -> None:
    """Judge mutants until the deadline, and store each result at once."""
    WORK.mkdir(parents=True, exist_ok=True)
    trees = [Tree(WORK / f"tree{job}") for job in range(jobs)]
    free: queue.Queue[Tree] = queue.Queue()
    for tree in trees:
        free.put(tree)
    lock = threading.Lock()
    failed = threading.Event()

    def one(mutant: Mutant) -> None:
        if failed.is_set() or time.monotonic() > deadline:
            return
        tree = free.get()
        try:
            result = tree.judge(mutant, mutant.id in proven)
        except BaseException:
            failed.set()
            raise
        finally:
            free.put(tree)
        with lock:
            results[keys[mutant.id]] = result
            store(results)
            print(f"{result['stage'] or 'SURVIVES':<15} {mutant.id}  {result['by']}", flush=True)

    try:
        with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
            for future in [pool.submit(one, mutant) for mutant in waiting]:
                future.result()
    finally:
        for tree in trees:
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
        run(waiting, keys, proofs, results, arguments.jobs, deadline)
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
