"""Runs pytest on emulated kernels once per request, each time in a fork of a process that has already imported torch.

A request is one line of JSON, an object with these entries:

- `folder`: the folder of the built package
- `mutant`: the number of the mutant
- `arguments`: the arguments of pytest
- `limits`: the seconds that each test may take
- `limit`: the seconds that any other test may take, and all that comes before the first
- `log`: the file for the output
- `reached`: the file for the seconds of each test and the numbers of the mutants that it reaches, or ""
- `mutants`: how many mutants the library has

The answer is one line: the exit status, which is negative for a signal. A time limit ends the run by SIGALRM.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import hypothesis  # noqa: F401  imported once here, because the tests import it
import pytest
import torch._dynamo
import torch.library
import torch.testing
import torchvision.models.detection  # noqa: F401

from tools.emulator import build


class Limits:
    """A plugin of pytest that ends the process if a test takes too long."""

    def __init__(self, limits: dict[str, float], limit: float) -> None:
        """Start the time for all that comes before the first test."""
        self.limits, self.limit = limits, limit
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # a handler in Python would wait for the kernel to end
        signal.setitimer(signal.ITIMER_REAL, limit)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        """Start the time for a test, with its fixtures."""
        signal.setitimer(signal.ITIMER_REAL, self.limits.get(item.nodeid, self.limit))
        return (yield)


class Reached:
    """A plugin of pytest that writes how long each test takes and the mutants whose place in the kernels it reaches."""

    def __init__(self, library: Path, mutants: int, file: Path) -> None:
        """Read the flags of this many mutants from the library, and write `file` at the end."""
        self.library, self.mutants, self.file = library, mutants, file
        self.by_test: dict[str, tuple[float, list[int]]] = {}
        self.at_import: set[int] = set()

    def take(self) -> set[int]:
        """Return the numbers that were reached since the last call."""
        flags = (ctypes.c_bool * (self.mutants + 1)).in_dll(ctypes.CDLL(str(self.library)), "reached_mutants")
        numbers = {number for number, reached in enumerate(flags) if reached}
        ctypes.memset(flags, 0, len(flags))
        return numbers

    def pytest_collection_finish(self) -> None:
        """Keep what the modules reach when they are imported. Every test may depend on it."""
        self.at_import = self.take()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        """Note what this test takes and reaches, with its fixtures."""
        start = time.perf_counter()
        result = yield
        self.by_test[item.nodeid] = time.perf_counter() - start, sorted(self.take() | self.at_import)
        return result

    def pytest_sessionfinish(self) -> None:
        """Write the seconds and the numbers."""
        self.file.write_text(json.dumps(self.by_test))


def run_tests(request: dict[str, Any]) -> int:
    """Run pytest in this process and return its exit status."""
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ["RETINANET_OPS_MUTANT"] = str(request["mutant"])
    # tests/conftest.py calls `build`. The request names the folder of a finished build instead.
    build.build = lambda *variants: [Path(request["folder"])]  # type: ignore[assignment]
    library = Path(request["folder"], "retinanet_ops", "_C.so")
    plugins: list[object] = [Limits(request["limits"], request["limit"])]
    if request["reached"]:
        plugins.append(Reached(library, request["mutants"], Path(request["reached"])))
    return int(pytest.main(request["arguments"], plugins))


def serve_one(request: dict[str, Any]) -> str:
    """Run the tests in a child process and return the answer."""
    child = os.fork()
    if child == 0:
        status = 70
        try:
            status = run_tests(request)
        finally:
            sys.stdout.flush()
            os._exit(status)
    _, status = os.waitpid(child, 0)
    return str(os.waitstatus_to_exitcode(status))


def main() -> None:
    """Serve requests until the input ends."""
    torch.set_num_threads(1)
    print("ready", flush=True)
    for line in sys.stdin:
        print(serve_one(json.loads(line)), flush=True)


if __name__ == "__main__":
    main()
