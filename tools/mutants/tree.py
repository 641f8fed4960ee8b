"""A copy of the project whose kernels hold all mutants, and the processes that test them."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tools.emulator.run import sanitizer_environment
from tools.mutants.mutations import Mutant, switched
from tools.mutants.sources import ops_of

ROOT = Path(__file__).resolve().parents[2]


class Stage(NamedTuple):
    """A run of the tests in one variant of the emulator's build and one schedule."""

    variant: str
    schedule: str
    #: pytest's expression of markers. The tests marked `once` take far longer than all others.
    markers: str = "not once"

    @property
    def name(self) -> str:
        """The name of the stage in the results."""
        if self.variant != "plain":
            return self.variant
        return f"plain {self.schedule}" + (", once" if self.markers == "once" else "")


class Measured(NamedTuple):
    """A test on the unchanged kernels."""

    seconds: float
    #: Numbers of the mutants whose place it reaches.
    mutants: frozenset[int]


FIFO = Stage("plain", "fifo")
#: The stages besides `FIFO`: in all files, in files where threads interact, and for barriers and masks.
ASAN, RACES = Stage("asan", "fifo"), Stage("races", "fifo")
ORDERS = (Stage("plain", "lifo"), Stage("plain", "random:1"), Stage("plain", "random:2"))
#: The last stages have the property tests, and tests of numbers and of the largest sizes. The second is for barriers
#: and masks.
LAST, LAST_ORDER = Stage("plain", "fifo", "once"), Stage("plain", "lifo", "once")
#: Code in which threads interact. A file without it cannot have races.
INTERACTION = re.compile(r"threadIdx|__shared__|__sync|_sync\(|atomic")
#: A condition that holds in one thread, without which several threads do the same.
ONE_THREAD = re.compile(r"\b(threadIdx\.x|t|c|i|lane|warp)( % kWarp)? [!=]= (0|kWarp - 1)")
#: pytest's exit status when it has selected no test.
NO_TESTS = str(int(pytest.ExitCode.NO_TESTS_COLLECTED))
#: How many tests `judge` starts with.
MOST_KILLERS = 8
#: By op: the ops that call its kernels with options that its own tests do not reach.
CALLERS = {"nms": ("detect",)}
#: The header that tells a `switched` file which mutant runs. 0 stands for the unchanged code, which notes the mutants
#: whose place it reaches. The race detector must not trace these accesses, which are not to the memory of the kernels.
SWITCH = "switch.h"
SWITCH_TEXT = """#pragma once
#include <cstdlib>

inline const int kMutant = [] {
  const char* number = std::getenv("RETINANET_OPS_MUTANT");
  return number ? std::atoi(number) : 0;
}();
extern "C" __attribute__((used, visibility("default"))) inline bool reached_mutants[%d] = {};

__attribute__((no_sanitize("thread"))) inline bool mutant_is(int number) {
  if (kMutant == 0) reached_mutants[number] = true;
  return kMutant == number;
}
"""


def tests_of(op: str) -> list[str]:
    """Return the test files of an op, `test_<op>.py` and `test_<op>_*.py`, followed by those of its callers."""
    folder = ROOT / "tests" / "ops"
    files: list[Path] = []
    for name in (op, *CALLERS.get(op, ())):
        files += [folder / f"test_{name}.py", *sorted(folder.glob(f"test_{name}_*.py"))]
    return [str(path.relative_to(ROOT)) for path in files]


def time_limit(seconds: float) -> float:
    """Return the seconds that a test may take on a mutant, from those that it takes on the unchanged kernels."""
    return 10 + 5 * seconds


def stages_of(mutant: Mutant, proven: bool) -> list[Stage]:
    """Return the stages that a mutant must survive: only `FIFO` if it is `proven` equivalent."""
    if proven:
        return [FIFO]
    stages = [FIFO, ASAN]
    if INTERACTION.search((ROOT / "csrc" / mutant.file).read_text()):
        # What races in one schedule rarely fails in another.
        races_first = mutant.kind == "barrier" or ONE_THREAD.search(mutant.id.split(" | ")[-1])
        stages.insert(0 if races_first else len(stages), RACES)
    # Other orders of threads matter only for barriers and masks.
    if mutant.kind in ("barrier", "mask"):
        return [*stages, *ORDERS, LAST, LAST_ORDER]
    return [*stages, LAST]


class Tree:
    """A copy of the project whose kernels hold all mutants, with one test process for each job and variant."""

    def __init__(self, root: Path, numbers: dict[Mutant, int]) -> None:
        """Copy everything that the emulated tests need.

        Args:
            root: Folder of the copy. Files of csrc that are already there are written only if they differ.
            numbers: Number of each mutant, from 1.
        """
        self.root = root
        self.numbers = numbers
        self.lock = threading.Lock()
        self.measured: dict[tuple[Stage, str], dict[str, Measured]] = {}
        self.folders: dict[str, Path] = {}
        self.servers: dict[tuple[int, str], subprocess.Popen[str]] = {}
        self.killers: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
        for name in ("tests", "tools", "retinanet_ops"):
            shutil.rmtree(root / name, ignore_errors=True)
            shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("*.so", "__pycache__", "fixtures"))
        shutil.copy2(ROOT / "pyproject.toml", root)
        (root / "csrc" / "common").mkdir(parents=True, exist_ok=True)
        csrc = ROOT / "csrc"
        files = {str(path.relative_to(csrc)): path.read_text() for path in csrc.rglob("*") if path.is_file()}
        for name in {mutant.file for mutant in numbers}:
            in_file = {mutant: number for mutant, number in numbers.items() if mutant.file == name}
            files[name] = f'#include "{os.path.relpath(SWITCH, Path(name).parent)}"\n' + switched(files[name], in_file)
        files[SWITCH] = SWITCH_TEXT % (len(numbers) + 1)
        for path in (root / "csrc").rglob("*"):
            if path.is_file() and str(path.relative_to(root / "csrc")) not in files:
                path.unlink()
        for name, text in files.items():
            path = root / "csrc" / name
            if not path.exists() or path.read_text() != text:  # writing the same text would compile the file again
                path.write_text(text)

    def folder(self, variant: str) -> Path:
        """Return the folder of a variant's library, which the first call builds."""
        with self.lock:
            if variant not in self.folders:
                command = [sys.executable, "-m", "tools.emulator.build", variant]
                output = subprocess.run(command, cwd=self.root, check=True, stdout=subprocess.PIPE, text=True).stdout
                self.folders[variant] = Path(output.strip())
            return self.folders[variant]

    def run_tests(
        self,
        job: int,
        stage: Stage,
        tests: Iterable[str],
        number: int,
        seconds: Mapping[str, float],
        reached: Path | None = None,
    ) -> str | None:
        """Run tests on a mutant.

        Args:
            job: Number of the job that calls.
            stage: Variant, schedule and markers of the tests.
            tests: Files, or pytest's names of tests.
            number: Number of the mutant, or 0.
            seconds: Those that the tests take on the unchanged kernels. Number 0 has no such limit.
            reached: File for the seconds of each test and the mutants that it reaches. Only with number 0.

        Returns:
            The test that fails or the way in which the process ends. None if all tests pass.
        """
        # -s turns capturing off, so that a sanitizer's message reaches the log before the sanitizer ends the process.
        options = ["-q", "-x", "-s", "--tb=short", "-p", "no:cacheprovider"]
        # Leave out the tests of the assertions, and the slow tests of torch.compile.
        options += ["-k", "not TestTrafficAssertions and not TestCompile", "-m", stage.markers]
        options += ["--backend", "emulated", "--emulation", stage.variant, "--schedule", stage.schedule]
        options += ["--with-once"] if stage.markers == "once" else []
        log = self.root / f"log{job}"
        request = {
            "folder": str(self.folder(stage.variant)),
            "mutant": number,
            "arguments": [*options, *tests],
            "limits": {test: time_limit(taken) for test, taken in seconds.items()},
            "limit": 300 if number else 1800,
            "log": str(log),
            "reached": str(reached or ""),
            "mutants": len(self.numbers),
        }
        answer = self.ask(job, stage.variant, json.dumps(request))
        if answer in ("0", NO_TESTS):
            return None
        if answer == str(-signal.SIGALRM):
            return "does not end"
        output = log.read_text(errors="replace")
        if match := re.search(r"^(?:FAILED|ERROR) tests/ops/(\S+?)(?:\[| |$)", output, re.MULTILINE):
            return match[1]
        if match := re.search(r"ERROR: AddressSanitizer: (\S+)|runtime error: ([^\n]+)", output):
            return f"AddressSanitizer, {match[1]}" if match[1] else "UndefinedBehaviorSanitizer"
        return signal.Signals(-int(answer)).name if answer.startswith("-") else f"exit status {answer}"

    def ask(self, job: int, variant: str, request: str) -> str:
        """Send a request to the test process of a job and return its answer. The first request starts the process."""
        server = self.servers.get((job, variant))
        if server is None or server.poll() is not None:
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
            if variant == "asan":
                environment |= sanitizer_environment()
            server = self.servers[job, variant] = subprocess.Popen(
                [sys.executable, "-m", "tools.mutants.server"],
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
        """Read one line from a test process. Raise `RuntimeError` if the process has ended."""
        assert server.stdout
        if line := server.stdout.readline().strip():
            return line
        raise RuntimeError("the process that runs the tests has ended")

    def close(self) -> None:
        """End the test processes."""
        for server in self.servers.values():
            assert server.stdin
            server.stdin.close()
            server.wait()

    def measure(self, job: int, stage: Stage, op: str) -> dict[str, Measured]:
        """Return an op's tests, with their seconds and reach. The first call runs them on the unchanged kernels.

        Raises:
            RuntimeError: A test fails on the unchanged kernels.
        """
        name = stage, op
        if name not in self.measured:
            files = tests_of(op)
            if stage.variant == "races":
                files.append("tests/ops/test_traffic.py")  # counts the bytes that the kernels move
            reached = self.root / f"reached{job}.json"
            if failure := self.run_tests(job, stage, files, 0, {}, reached):
                raise RuntimeError(f"{op}: the unchanged kernels fail {failure} as {stage.name}")
            tests = json.loads(reached.read_text()).items()
            self.measured[name] = {test: Measured(seconds, frozenset(numbers)) for test, (seconds, numbers) in tests}
        return self.measured[name]

    def tests_reaching(self, job: int, stage: Stage, ops: Iterable[str], number: int) -> dict[str, float]:
        """Return the tests of the ops that reach the place of a mutant, the fastest first, each with its seconds."""
        tests = {test: measured for op in ops for test, measured in self.measure(job, stage, op).items()}
        seconds = {test: measured.seconds for test, measured in tests.items() if number in measured.mutants}
        return dict(sorted(seconds.items(), key=lambda item: item[1]))

    def judge(self, job: int, mutant: Mutant, stages: Sequence[Stage], passed: Sequence[str] = ()) -> dict[str, Any]:
        """Try the stages on a mutant.

        Args:
            job: Number of the job that calls.
            mutant: The mutant.
            stages: Stages in the order in which they are tried.
            passed: Names of the stages that the mutant is known to survive.

        Returns:
            The stage that kills the mutant and the test that fails there, two empty strings if the mutant survives, and
            the names of the stages that it has `passed`.
        """
        ops = ops_of(mutant.file, ROOT / "csrc")
        survived = list(passed)
        for stage in stages:
            if stage.name in survived:
                continue
            users = ops if stage.variant == "plain" else ops[:2]
            tests = self.tests_reaching(job, stage, users, self.numbers[mutant])
            # Start with the tests that have killed most mutants of the file. They kill most of the others, too.
            killers = self.best_killers(mutant.file, stage.name)
            order = sorted(tests, key=lambda test: test.partition("[")[0] not in killers)
            if order and (failure := self.run_tests(job, stage, order, self.numbers[mutant], tests)):
                return self.killed(mutant, stage.name, failure)
            survived.append(stage.name)
        return {"stage": "", "by": "", "passed": survived}

    def killed(self, mutant: Mutant, stage: str, failure: str) -> dict[str, Any]:
        """Return the result of a killed mutant. Remember the test that has killed it."""
        if "::" in failure:
            with self.lock:
                self.killers[mutant.file, stage][failure] += 1
        return {"stage": stage, "by": failure}

    def best_killers(self, file: str, stage: str) -> list[str]:
        """Return the tests that have killed most mutants of a file in a stage, without their parameters."""
        with self.lock:
            return [f"tests/ops/{name}" for name, _ in self.killers[file, stage].most_common(MOST_KILLERS)]
