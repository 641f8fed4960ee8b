"""Checks the CUDA kernels on a machine with a GPU: stages with time limits, one JSON, one summary.

Needs torch, nvcc and a C++ compiler; no network. A stage whose tool is missing is skipped and says so. Run through
gpu_check.sh. `--rehearse` lets the emulated kernels (tests/emulation) stand in for the device, at small sizes.

Exit status: 0 if every stage that the machine can run has passed, 1 if one failed or did not end in time or if nothing
could be built, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import ast
import functools
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gpu_report import benchmark_rows, last_json, not_passed, sanitizer_findings, summary, test_counts
from locating import load, toolkit_bin

ROOT = Path(__file__).resolve().parent.parent
HERE = ROOT / "scripts"
LOG_LINES = 40  # of a failed stage, in the JSON
LEAST_SECONDS = 5.0  # with less time left, a stage is not begun
REHEARSAL = 4  # how much longer stages may take in a rehearsal, on slower machines
SANITIZER = "compute-sanitizer"
#: Tools that watch our kernels alone. initcheck has to see the writes of torch's kernels too.
FILTERED = ("memcheck", "racecheck", "synccheck")
#: A test file, or a test, that names the backends it is for.
FOR_CUDA = re.compile(r'mark\.backends\([^)]*"cuda"')
SETUPTOOLS = 77  # the oldest that reads pyproject.toml


#: Makes results and a verdict of a stage's log and exit status; "note" and "missing" (skipped after all) are special.
Reader = Callable[[str, int], tuple[dict[str, Any], bool]]


class Missing(Exception):
    """The machine lacks something that a stage needs; the message names it."""


@dataclass
class Result:
    """How one stage ended: passed, failed, skipped (something is missing), or unfinished (no time left)."""

    name: str
    status: str
    seconds: float = 0.0
    note: str = ""
    results: dict[str, Any] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)


@dataclass
class Stage:
    """Commands that run one after the other, up to the first that fails."""

    name: str
    limit: float  # seconds
    commands: Callable[[], list[list[str]]]  # raises Missing
    read: Reader = lambda log, status: ({}, status == 0)
    environment: dict[str, str] = field(default_factory=dict)
    all_commands: bool = False  # go on after one that failed


class Runner:
    """Runs stages within a budget of time and keeps the report up to date."""

    def __init__(self, out: Path, budget: float, rehearse: bool) -> None:
        """Start the clock."""
        self.out, self.deadline, self.rehearse = out, time.monotonic() + budget, rehearse
        self.start = time.time()
        self.machine: dict[str, Any] = {}
        self.results: list[Result] = []
        out.mkdir(parents=True, exist_ok=True)
        (out / "gpu_check.log").write_text("")

    def run(self, stage: Stage) -> Result:
        """Run one stage, whatever happens in it."""
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
        """Output and exit status; None as the status if it had to be stopped."""
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
        """Write what is known so far."""
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
    """PATH of the stages. Some tools, such as ninja, stand beside the Python that they belong to."""
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"


def need(*modules: str) -> None:
    """Raise Missing unless Python finds the modules."""
    if missing := [name for name in modules if importlib.util.find_spec(name) is None]:
        raise Missing(f"no {', '.join(missing)}")


def need_setuptools() -> None:
    """Raise Missing unless setuptools can build the project."""
    need("setuptools")
    version = importlib.metadata.version("setuptools")
    if int(version.split(".")[0]) < SETUPTOOLS:
        raise Missing(f"setuptools {version} is older than {SETUPTOOLS}")


def missing_imports(path: Path) -> list[str]:
    """Packages that a test file, or what it imports of ours, needs and that are not installed."""
    seen, to_read, missing = {path}, [path], set()
    while to_read:
        body = ast.parse(to_read.pop().read_text()).body
        imports = [name.name for node in body if isinstance(node, ast.Import) for name in node.names]
        for node in body:
            if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                imports += [node.module, *(f"{node.module}.{name.name}" for name in node.names)]
        for name in imports:
            # Importing a.b imports a first.
            parts = name.split(".")
            prefixes = ["/".join(parts[:n]) for n in range(1, len(parts) + 1)]
            places = [
                base / (prefix + end)
                for base in (ROOT, path.parent)
                for prefix in prefixes
                for end in (".py", "/__init__.py")
            ]
            ours = {place for place in places if place.is_file()}
            to_read += ours - seen
            seen |= ours
            if not ours and importlib.util.find_spec(parts[0]) is None:
                missing.add(parts[0])
    return sorted(missing)


def op_tests() -> tuple[list[str], list[str]]:
    """Test files of ops with CUDA kernels or marked as for CUDA, and those that cannot run here, with the reason."""
    files, left_out = [], []
    of_kernels = {f"test_{source.name.removesuffix('_cuda.cu')}" for source in (ROOT / "csrc").glob("*_cuda.cu")}
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        if path.stem not in of_kernels and not FOR_CUDA.search(path.read_text()):
            continue
        if missing := missing_imports(path):
            left_out.append(f"{path.name} (no {', '.join(missing)})")
        else:
            files.append(str(path.relative_to(ROOT)))
    return files, left_out


def find_toolkit() -> str | None:
    """CUDA_HOME for the build: the user's, or the folder that the nvcc of PyPI's wheels or on PATH works from."""
    if home := os.environ.get("CUDA_HOME"):
        return home
    folder = toolkit_bin("nvcc")
    if folder is None:
        return None
    # It may be a link or a script that stands apart from the toolkit: nvcc itself knows best.
    command = [str(folder / "nvcc"), "--dryrun", "-x", "cu", os.devnull]
    dry_run = subprocess.run(command, capture_output=True, text=True, check=False)
    top = re.search(r"^#\$ TOP=(.*)$", dry_run.stderr, re.MULTILINE)
    return str(Path(top[1]).resolve()) if top else str((folder / "nvcc").resolve().parent.parent)


def emulation_environment(variant: str) -> list[str]:
    """Assignments with which Python can load a library built with AddressSanitizer."""
    if variant != "asan":
        return []
    run = load(ROOT / "tests" / "emulation" / "run.py")
    return [f"{name}={value}" for name, value in run.sanitizer_environment().items()]


def stages(runner: Runner, scratch: Path) -> list[Stage]:
    """All stages after the description of the machine."""
    python, rehearse = sys.executable, runner.rehearse
    backend = ["--backend", "emulated" if rehearse else "cuda"]
    small = ["--small"] if rehearse else []
    stored, junit = scratch / "results.pt", scratch / "tests.xml"

    def probe(*arguments: str) -> list[str]:
        return [python, str(HERE / "gpu_probe.py"), *arguments]

    def build() -> list[list[str]]:
        need_setuptools()
        if rehearse:  # the libraries in place stay as they are
            base = str(scratch / "build")
            return [[python, "setup.py", "build", "--build-base", base], [python, "tests/emulation/build.py", "plain"]]
        return [[python, "setup.py", "build_ext", "--inplace"], [python, "-m", "retinanet_ops"]]

    toolkit = find_toolkit()
    build_environment = {
        "TORCH_CUDA_ARCH_LIST": runner.machine.get("capability", "9.0"),
        **({"CUDA_HOME": toolkit} if toolkit else {}),
    }
    if not rehearse:
        flags = f"{os.environ.get('NVCC_APPEND_FLAGS', '')} -lineinfo".strip()  # findings then name lines
        build_environment |= {"RETINANET_OPS_CUDA": "1", "MAX_JOBS": str(os.cpu_count() or 1)}
        build_environment["NVCC_APPEND_FLAGS"] = flags

    def tests() -> list[list[str]]:
        need("pytest")
        options = ["-q", "-p", "no:cacheprovider", f"--junitxml={junit}"]
        return [[python, "-m", "pytest", *options, *backend, *op_tests()[0]]]

    def sanitize(tool: str) -> Callable[[], list[list[str]]]:
        def commands() -> list[list[str]]:
            folder = toolkit_bin(SANITIZER)
            if folder is None:
                raise Missing(f"no {SANITIZER}")
            ours = ["--kernel-name", "kns=retinanet"] if tool in FILTERED else []
            options = ["--tool", tool, "--error-exitcode", "9", "--print-limit", "20", *ours]
            return [[str(folder / SANITIZER), *options, *probe("small", *backend)]]

        return commands

    def emulated(variant: str) -> Callable[[], list[list[str]]]:
        return lambda: [
            [python, "tests/emulation/build.py", variant],
            ["env", *emulation_environment(variant), *probe("small", *backend, "--emulation", variant)],
        ]

    def benchmark(choice: str) -> tuple[Callable[[], list[list[str]]], Reader]:
        folder = scratch / choice.replace(" ", "-")
        device = "cpu" if rehearse else "cuda"
        files = [file for file in sorted((ROOT / "benchmarks").glob("*.py")) if "def test_" in file.read_text()]

        def commands() -> list[list[str]]:
            need("pytest", "pytest_benchmark")
            folder.mkdir()
            # One process per file: what was measured stays measured if the time runs out.
            options = ["-q", "-p", "no:cacheprovider", "-k", choice, "--device", device]
            return [
                [python, "-m", "pytest", *options, f"--benchmark-json={folder / file.stem}.json", str(file)]
                for file in files
                if choice in file.read_text() or choice.startswith("not ")  # pytest fails without a test
            ]

        def read(log: str, status: int) -> tuple[dict[str, Any], bool]:
            rows = [row for file in sorted(folder.glob("*.json")) for row in benchmark_rows(file)]
            return {"rows": rows, "note": f"{len(rows)} rows"}, status == 0 and bool(rows)

        return commands, read

    def read_tests(log: str, status: int) -> tuple[dict[str, Any], bool]:
        counts = test_counts(junit)
        left_out = op_tests()[1]
        note = f"{counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped"
        note += "".join(f"; left out: {file}" for file in left_out)
        return {**counts, "left_out": left_out, "note": note}, status == 0 and counts["passed"] > 0

    def read_probe(log: str, status: int) -> tuple[dict[str, Any], bool]:
        return last_json(log), status == 0

    no_cache = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # one allocation per tensor, so that its end is seen
    result = [
        Stage("build", 200, build, environment=build_environment),
        Stage("our kernels run", 60, lambda: [probe("kernels", *backend)], read_probe),
        Stage("equal from run to run", 90, lambda: [probe("results", str(stored), *backend, *small)], read_probe),
        Stage("equal to the CPU", 90, lambda: [probe("compare", str(stored), "--backend", "cpu", *small)], read_probe),
        Stage("tests", 200, tests, read_tests),
    ]
    if rehearse:
        result += [
            Stage("memcheck (stand-in: AddressSanitizer)", 300, emulated("asan"), read_probe),
            Stage("racecheck, initcheck, synccheck (stand-in: race build)", 300, emulated("races"), read_probe),
            Stage("benchmarks (stand-in: CPU kernels)", 600, *benchmark("ours"), all_commands=True),
        ]
    else:
        for tool in ("memcheck", "racecheck", "initcheck", "synccheck"):
            read = functools.partial(sanitizer_findings, filtered=tool in FILTERED)
            result.append(Stage(tool, 75, sanitize(tool), read, no_cache))
        result.append(Stage("benchmarks", 150, *benchmark("not compile"), all_commands=True))
        result.append(Stage("benchmarks of torch.compile", 150, *benchmark("compile"), all_commands=True))
    return result


def describe(runner: Runner) -> bool:
    """Put the machine's description into the report; False if there is nothing to test on."""
    backend = "cpu" if runner.rehearse else "cuda"
    command = [sys.executable, str(HERE / "gpu_probe.py"), "describe", "--backend", backend]
    result = runner.run(Stage("machine", 60, lambda: [command], lambda log, status: (last_json(log), status == 0)))
    runner.machine = {
        **result.results,
        "toolkit": find_toolkit(),
        "tools": {
            **{tool: toolkit_bin(tool) is not None for tool in (SANITIZER, "ncu")},
            **{tool: shutil.which(tool, path=search_path()) is not None for tool in ("ninja", "c++")},
        },
        "modules": {
            name: importlib.util.find_spec(name) is not None
            for name in ("pytest", "pytest_benchmark", "hypothesis", "torchvision", "triton")
        },
    }
    return result.status == "passed"


def main() -> int:
    """Run all stages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu_check", help="folder of the report")
    parser.add_argument("--budget", type=float, help="seconds for everything; default: 570, in a rehearsal 2280")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU: emulated kernels, small sizes")
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    budget = arguments.budget or (570 * REHEARSAL if arguments.rehearse else 570)
    runner = Runner(arguments.out.resolve(), budget, arguments.rehearse)
    if not describe(runner):
        print("gpu_check: torch cannot use a GPU here; --rehearse runs the emulated kernels", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as scratch:
        for stage in stages(runner, Path(scratch)):
            result = runner.run(stage)
            if stage.name == "build" and result.status != "passed":
                break
    runner.write()
    print((runner.out / "gpu_check.md").read_text())
    return int(bool(not_passed([asdict(result) for result in runner.results])))


if __name__ == "__main__":
    sys.exit(main())
