"""Runs the tests of the ops on the emulated backend, once for each schedule.

Usage: python -m tools.emulator.run plain|asan|races [SCHEDULE ...] [-- PYTEST-ARGUMENT ...]

A schedule is fifo (the default), lifo or random:SEED, as for `pytest --schedule`. The variant `asan` needs this program
because AddressSanitizer must be loaded before Python itself.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def sanitizer_environment() -> dict[str, str]:
    """Return the variables that preload the sanitizers. Leak detection is off, because Python itself leaks."""
    compiler = os.environ.get("CXX", "c++")
    libraries = [
        subprocess.run([compiler, f"-print-file-name={name}"], check=True, capture_output=True, text=True).stdout
        for name in ("libasan.so", "libubsan.so")
    ]
    return {
        "LD_PRELOAD": " ".join(path.strip() for path in libraries),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


def main() -> int:
    """Run pytest for each schedule. Return the first exit status that is not 0, or 0."""
    arguments = sys.argv[1:]
    split = arguments.index("--") if "--" in arguments else len(arguments)
    (variant, *schedules), pytest_arguments = arguments[:split] or [""], arguments[split + 1 :]
    if variant not in ("plain", "asan", "races"):
        print(__doc__, file=sys.stderr)
        return 2
    # Build without the preloaded sanitizers, which would slow the compiler down.
    if subprocess.run([sys.executable, "-m", "tools.emulator.build", variant], cwd=ROOT, check=False).returncode:
        return 1
    environment = {**os.environ, **(sanitizer_environment() if variant == "asan" else {})}
    for schedule in schedules or ["fifo"]:
        command = [sys.executable, "-m", "pytest", "-q", "--backend", "emulated", "--emulation", variant]
        start = time.monotonic()
        print(f"--- {variant}, {schedule}", flush=True)
        status = subprocess.run(
            [*command, "--schedule", schedule, *pytest_arguments], cwd=ROOT, env=environment, check=False
        ).returncode
        print(f"--- {variant}, {schedule}: {time.monotonic() - start:.0f} s", flush=True)
        if status != 0:
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
