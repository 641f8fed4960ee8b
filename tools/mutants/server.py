"""Runs pytest again and again on emulated kernels, each time in a fork of a process that has imported torch already.

Reads one JSON object a line: {"folder": of the built package, "mutant": its number, "arguments": of pytest,
"limit": seconds, "log": file}.
Answers each with one line: the exit status, negative for a signal; "late" if it had to be stopped.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import types
from pathlib import Path
from typing import Any

import hypothesis  # noqa: F401  what the tests import is imported once, here
import pytest
import torch._dynamo
import torch.library
import torch.testing
import torchvision.models.detection  # noqa: F401


def run_tests(request: dict[str, Any]) -> int:
    """Exit status of pytest in this process."""
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ["RETINANET_OPS_MUTANT"] = str(request["mutant"])
    # tests/conftest.py builds the emulator by this module; here it is built.
    stand_in: Any = types.ModuleType("build")
    stand_in.BuildError = RuntimeError
    stand_in.build = lambda variant: Path(request["folder"])
    sys.modules["build"] = stand_in
    return int(pytest.main(request["arguments"]))


def serve_one(request: dict[str, Any]) -> str:
    """Run the tests in a child; its exit status."""
    child = os.fork()
    if child == 0:
        status = 70
        try:
            status = run_tests(request)
        finally:
            sys.stdout.flush()
            os._exit(status)
    handle = os.pidfd_open(child)
    try:
        in_time, _, _ = select.select([handle], [], [], request["limit"])
        if not in_time:
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    finally:
        os.close(handle)
    return str(os.waitstatus_to_exitcode(status)) if in_time else "late"


def main() -> None:
    """Serve until the input ends."""
    torch.set_num_threads(1)
    print("ready", flush=True)
    for line in sys.stdin:
        print(serve_one(json.loads(line)), flush=True)


if __name__ == "__main__":
    main()
