"""Runs the stages of gpu_check within a time budget and keeps the report up to date."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tools.gpu_check.report import summary

ROOT = Path(__file__).resolve().parents[2]
#: Number of lines of a failed stage's output that the JSON keeps.
LOG_LINES = 40
#: A stage is not started with fewer seconds left.
LEAST_SECONDS = 5.0
#: Factor on the time limits in a rehearsal, because emulated kernels are slower.
REHEARSAL = 4

#: Function that turns the output and exit status of a stage into its results and whether it passed. Two keys of the
#: results are special: "note" goes into the summary, and "missing" marks the stage as skipped.
Reader = Callable[[str, int], tuple[dict[str, Any], bool]]


class Missing(Exception):
    """The machine lacks something that a stage needs. The message names it."""


@dataclass
class Result:
    """Outcome of one stage.

    `status` is passed, failed, skipped (the machine lacks something) or unfinished (the time ran out).
    """

    name: str
    status: str
    seconds: float = 0.0
    note: str = ""
    results: dict[str, Any] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)


@dataclass
class Stage:
    """Commands that run one after the other, until one of them fails.

    Attributes:
        name: Name in the report.
        limit: Time limit in seconds.
        commands: Function that returns the commands, or raises `Missing` if the machine cannot run them.
        read: Function that reads the results from the output.
        environment: Environment variables to add.
        all_commands: Whether to run the remaining commands after one has failed.
    """

    name: str
    limit: float
    commands: Callable[[], list[list[str]]]
    read: Reader = lambda log, status: ({}, status == 0)
    environment: dict[str, str] = field(default_factory=dict)
    all_commands: bool = False


class Runner:
    """Runs stages and rewrites the report after each."""

    def __init__(self, out: Path, budget: float, rehearse: bool) -> None:
        """Start the clock.

        Args:
            out: Folder of the report.
            budget: Seconds for all stages together.
            rehearse: Whether emulated kernels stand in for the GPU.
        """
        self.out, self.deadline, self.rehearse = out, time.monotonic() + budget, rehearse
        self.start = time.time()
        self.machine: dict[str, Any] = {}
        self.results: list[Result] = []
        out.mkdir(parents=True, exist_ok=True)
        (out / "gpu_check.log").write_text("")

    def run(self, stage: Stage) -> Result:
        """Run one stage and record its outcome. A failing stage does not raise."""
        print(f"=== {stage.name}", flush=True)
        result = self._run(stage)
        print(f"    {result.status} {result.seconds:.0f} s {result.note}", flush=True)
        self.results.append(result)
        self.write()
        return result

    def _run(self, stage: Stage) -> Result:
        limit = min(stage.limit * (REHEARSAL if self.rehearse else 1), self.deadline - time.monotonic())
        if limit < LEAST_SECONDS:
            return Result(stage.name, "unfinished", note="no time left")
        try:
            commands = stage.commands()
        except Missing as missing:
            return Result(stage.name, "skipped", note=str(missing))
        start = time.monotonic()
        log, status = "", 0
        stopped = False
        for command in commands:
            text, ended = self._execute(command, stage.environment, start + limit - time.monotonic())
            log, stopped, status = log + text, ended is None, status or ended or 0
            if stopped or status and not stage.all_commands:
                break
        seconds = round(time.monotonic() - start, 1)
        late = f"stopped after {limit:.0f} s" if stopped else ""
        try:
            results, passed = stage.read(log, status)
        except (ValueError, KeyError, OSError) as error:
            results, passed = {"unreadable": repr(error)}, False
        note = "; ".join(part for part in (late, results.pop("note", "")) if part)
        if results.pop("missing", False):
            return Result(stage.name, "skipped", seconds, note)
        verdict = "unfinished" if stopped else "passed" if passed else "failed"
        tail = [] if verdict == "passed" else [line[:400] for line in log.splitlines()[-LOG_LINES:]]
        return Result(stage.name, verdict, seconds, note, results, tail)

    def _execute(self, command: list[str], environment: dict[str, str], limit: float) -> tuple[str, int | None]:
        """Run a command and return its output and exit status, which is None if the time limit ended it."""
        ours = {"PATH": search_path(), "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT)}
        with tempfile.TemporaryFile("w+", errors="replace") as output:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, **ours, **environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            status: int | None = None
            try:
                status = process.wait(max(limit, 0.1))
            except subprocess.TimeoutExpired:
                pass
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
            output.seek(0)
            text = output.read()
        with (self.out / "gpu_check.log").open("a") as file:
            file.write(f"$ {' '.join(command)}\n{text}\n")
        return text, status

    def write(self) -> None:
        """Write the report as JSON and as Markdown."""
        report = {
            "date": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(self.start)),
            "rehearsal": self.rehearse,
            "seconds": round(time.time() - self.start, 1),
            "machine": self.machine,
            "stages": [asdict(result) for result in self.results],
        }
        (self.out / "gpu_check.json").write_text(json.dumps(report, indent=1) + "\n")
        (self.out / "gpu_check.md").write_text(summary(report))


def search_path() -> str:
    """Return PATH for the stages. It starts with Python's own folder, where pip installs tools such as ninja."""
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
