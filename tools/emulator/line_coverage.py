"""Measures which lines of the CUDA kernels the tests of the ops run, by gcov on the emulated backend.

The tests run as in `make emulated-asan` and fail for the same reasons. The program covers the host and device code of
csrc/*_cuda.cu and of the headers that these files share with the CPU kernels. It lists the lines that did not run, and
fails if less than 98 % of the lines ran. With CXX=g++-13, set GCOV=gcov-13.

Usage: python -m tools.emulator.line_coverage [PYTEST-ARGUMENT ...]
"""

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "emulated" / "asan"
REQUIRED = 0.98


def run_counts() -> dict[str, dict[int, int]]:
    """Return how often each line ran, by file. For a line of a template, count its most frequent instantiation."""
    counts: dict[str, dict[int, int]] = defaultdict(dict)
    for data in sorted(FOLDER.glob("*_cuda.cu.gcda")):
        command = [os.environ.get("GCOV", "gcov"), "--json-format", "--stdout", str(data)]
        report = json.loads(subprocess.run(command, cwd=FOLDER, check=True, capture_output=True).stdout)
        for file in report["files"]:
            path = Path(report["current_working_directory"], file["file"]).resolve()
            if not path.is_relative_to(ROOT / "csrc"):
                continue
            lines = counts[str(path.relative_to(ROOT / "csrc"))]
            for line in file["lines"]:
                lines[line["line_number"]] = max(lines.get(line["line_number"], 0), line["count"])
    return counts


def main() -> int:
    """Run the tests, print a table and return the exit status, which is 1 if too few lines ran."""
    for data in FOLDER.glob("*.gcda"):
        data.unlink()
    status = subprocess.run(
        [sys.executable, "-m", "tools.emulator.run", "asan", "lifo", "--", *sys.argv[1:]], cwd=ROOT, check=False
    )
    if status.returncode != 0:
        return status.returncode
    counts = run_counts()
    covered = total = 0
    for name, lines in sorted(counts.items()):
        missing = sorted(number for number, count in lines.items() if count == 0)
        covered += len(lines) - len(missing)
        total += len(lines)
        print(f"{name:20} {len(lines) - len(missing):4}/{len(lines):4}", *(f"{name}:{number}" for number in missing))
    share = covered / max(total, 1)
    print(f"{share:.1%} of {total} lines of the kernels ran, required: {REQUIRED:.0%}")
    return 0 if share >= REQUIRED else 1


if __name__ == "__main__":
    sys.exit(main())
