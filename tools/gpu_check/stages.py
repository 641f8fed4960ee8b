"""The stages of gpu_check: build, evidence that our kernels run, comparisons, tests, sanitizers, measured times."""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path
from typing import Any

from tools.emulator.run import sanitizer_environment
from tools.gpu_check.report import benchmark_rows, last_json, sanitizer_findings, test_counts
from tools.gpu_check.requirements import find_toolkit, need, need_setuptools, op_tests
from tools.gpu_check.runner import ROOT, Missing, Runner, Stage
from tools.toolchain import toolkit_bin

SANITIZER = "compute-sanitizer"
#: Tools that watch only our kernels. initcheck is not one of them, because it must also see what torch's kernels write.
FILTERED = ("memcheck", "racecheck", "synccheck")
#: One allocation per tensor, so that an access past a tensor's end is an access past an allocation's end.
NO_CACHE = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


def probe(*arguments: str) -> list[str]:
    """Return the command that runs `tools.gpu_check.probe`."""
    return [sys.executable, "-m", "tools.gpu_check.probe", *arguments]


def read_probe(log: str, status: int) -> tuple[dict[str, Any], bool]:
    """Read the JSON line that a probe prints last."""
    return last_json(log), status == 0


def build_stage(runner: Runner, scratch: Path) -> Stage:
    """Build in place for the GPU of this machine. A rehearsal builds in `scratch`, not in place."""

    def commands() -> list[list[str]]:
        need_setuptools()
        if runner.rehearse:
            base = str(scratch / "build")
            build = [sys.executable, "setup.py", "build", "--build-base", base]
            return [build, [sys.executable, "-m", "tools.emulator.build", "plain"]]
        return [[sys.executable, "setup.py", "build_ext", "--inplace"], [sys.executable, "-m", "retinanet_ops"]]

    environment = {"TORCH_CUDA_ARCH_LIST": runner.machine.get("capability", "9.0")}
    if toolkit := find_toolkit():
        environment["CUDA_HOME"] = toolkit
    if not runner.rehearse:
        # -lineinfo lets the sanitizers name source lines.
        flags = f"{os.environ.get('NVCC_APPEND_FLAGS', '')} -lineinfo".strip()
        environment |= {"RETINANET_OPS_CUDA": "1", "MAX_JOBS": str(os.cpu_count() or 1), "NVCC_APPEND_FLAGS": flags}
    return Stage("build", 200, commands, environment=environment)


def tests_stage(backend: list[str], scratch: Path) -> Stage:
    """Run the test files of tests/ops whose imports are installed."""
    junit = scratch / "tests.xml"

    def commands() -> list[list[str]]:
        need("pytest")
        options = ["-q", "-p", "no:cacheprovider", f"--junitxml={junit}"]
        return [[sys.executable, "-m", "pytest", *options, *backend, *op_tests()[0]]]

    def read(log: str, status: int) -> tuple[dict[str, Any], bool]:
        counts = test_counts(junit)
        left_out = op_tests()[1]
        note = f"{counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped"
        note += "".join(f"; left out: {file}" for file in left_out)
        return {**counts, "left_out": left_out, "note": note}, status == 0 and counts["passed"] > 0

    return Stage("tests", 200, commands, read)


def sanitizer_stage(tool: str, backend: list[str]) -> Stage:
    """Run every op at small sizes under one tool of compute-sanitizer."""

    def commands() -> list[list[str]]:
        folder = toolkit_bin(SANITIZER)
        if folder is None:
            raise Missing(f"no {SANITIZER}")
        ours = ["--kernel-name", "kns=retinanet"] if tool in FILTERED else []
        options = ["--tool", tool, "--error-exitcode", "9", "--print-limit", "20", *ours]
        return [[str(folder / SANITIZER), *options, *probe("small", *backend)]]

    return Stage(tool, 75, commands, functools.partial(sanitizer_findings, filtered=tool in FILTERED), NO_CACHE)


def emulated_stage(name: str, variant: str, backend: list[str]) -> Stage:
    """Run every op at small sizes on a variant of the emulated kernels, in place of compute-sanitizer."""

    def commands() -> list[list[str]]:
        # Python can only load a library with AddressSanitizer if the sanitizer is preloaded.
        variables = sanitizer_environment().items() if variant == "asan" else ()
        environment = [f"{key}={value}" for key, value in variables]
        build = [sys.executable, "-m", "tools.emulator.build", variant]
        return [build, ["env", *environment, *probe("small", *backend, "--emulation", variant)]]

    return Stage(name, 300, commands, read_probe)


def benchmark_stage(name: str, limit: float, choice: str, device: str, scratch: Path) -> Stage:
    """Run the benchmarks whose rows match `choice`, a pytest `-k` expression of the form "word" or "not word"."""
    folder = scratch / choice.replace(" ", "-")
    files = [file for file in sorted((ROOT / "benchmarks").glob("*.py")) if "def test_" in file.read_text()]

    def commands() -> list[list[str]]:
        need("pytest", "pytest_benchmark")
        folder.mkdir()
        # One process per file, so that finished files keep their results if the time runs out.
        options = ["-q", "-p", "no:cacheprovider", "-k", choice, "--device", device]
        return [
            [sys.executable, "-m", "pytest", *options, f"--benchmark-json={folder / file.stem}.json", str(file)]
            for file in files
            if choice in file.read_text() or choice.startswith("not ")  # pytest fails if it selects no test
        ]

    def read(log: str, status: int) -> tuple[dict[str, Any], bool]:
        rows = [row for file in sorted(folder.glob("*.json")) for row in benchmark_rows(file)]
        return {"rows": rows, "note": f"{len(rows)} rows"}, status == 0 and bool(rows)

    return Stage(name, limit, commands, read, all_commands=True)


def calibration_stage() -> Stage:
    """Measure the constants of the cost model, and the time of every case whose time it predicts."""

    def commands() -> list[list[str]]:
        if toolkit_bin("nvcc") is None:
            raise Missing("no nvcc")
        return [[sys.executable, "-m", "tools.kernel_times.calibrate"]]

    return Stage("calibration of the predicted times", 75, commands, read_probe)


def stages(runner: Runner, scratch: Path) -> list[Stage]:
    """Return all stages that follow the description of the machine."""
    rehearse = runner.rehearse
    backend = ["--backend", "emulated" if rehearse else "cuda"]
    small = ["--small"] if rehearse else []
    stored = str(scratch / "results.pt")
    common = [
        build_stage(runner, scratch),
        Stage("our kernels run", 60, lambda: [probe("kernels", *backend)], read_probe),
        Stage("equal from run to run", 90, lambda: [probe("results", stored, *backend, *small)], read_probe),
        Stage("equal to the CPU", 90, lambda: [probe("compare", stored, "--backend", "cpu", *small)], read_probe),
        tests_stage(backend, scratch),
    ]
    if rehearse:
        races = "racecheck, initcheck, synccheck (stand-in: race build)"
        return [
            *common,
            emulated_stage("memcheck (stand-in: AddressSanitizer)", "asan", backend),
            emulated_stage(races, "races", backend),
            benchmark_stage("benchmarks (stand-in: CPU kernels)", 600, "ours", "cpu", scratch),
        ]
    return [
        *common,
        *(sanitizer_stage(tool, backend) for tool in ("memcheck", "racecheck", "initcheck", "synccheck")),
        calibration_stage(),
        benchmark_stage("benchmarks", 120, "not compile", "cuda", scratch),
        benchmark_stage("benchmarks of torch.compile", 120, "compile", "cuda", scratch),
    ]
