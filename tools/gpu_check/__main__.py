"""Check the CUDA kernels on a machine with a GPU: stages with time limits, one JSON report, one summary.

    python -m tools.gpu_check               check the kernels on the GPU
    python -m tools.gpu_check --rehearse    check emulated kernels (tools/emulator) at small sizes, without a GPU

The check needs torch, nvcc and a C++ compiler, but no network. A stage whose tool is missing is skipped, and the
summary says so.

Exit status: 0 if every stage that the machine can run has passed. 1 if a stage failed or ran out of time, or if
nothing could be built. 2 without a GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from tools.gpu_check.report import not_passed
from tools.gpu_check.requirements import find_toolkit
from tools.gpu_check.runner import ROOT, Runner, Stage, search_path
from tools.gpu_check.stages import SANITIZER, probe, read_probe, stages
from tools.toolchain import toolkit_bin


def describe(runner: Runner) -> bool:
    """Add the description of the machine to the report. Return False if torch cannot use the device of the check."""
    command = probe("describe", "--backend", "cpu" if runner.rehearse else "cuda")
    result = runner.run(Stage("machine", 60, lambda: [command], read_probe))
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
    """Run all stages and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu_check", help="folder of the report")
    parser.add_argument("--budget", type=float, help="seconds for all stages; default: 480, in a rehearsal 2280")
    parser.add_argument("--rehearse", action="store_true", help="run emulated kernels at small sizes, without a GPU")
    arguments = parser.parse_args()
    budget = arguments.budget or (2280 if arguments.rehearse else 480)
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
