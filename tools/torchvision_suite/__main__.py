"""Run torchvision's own tests on the ops and on accelerated models.

    python -m tools.torchvision_suite PATH

PATH is the source of torchvision, of a release near the installed one, with its folder `test`: wheels have no tests.
The ops run the tests of test_ops.py that concern them. Accelerated detectors run those of the detection models. Both
run once with torchvision's own code, and once with ours. Tests that fail with both are not counted.

Exit status: 0 if the failures are those that `EXPECTED` lists with their reasons, else 1.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
#: By subject: the files, and what selects their tests.
SUITES = {
    "ops": (
        ["test_ops.py"],
        "TestNMS or TestBoxIou or TestGeneralized or TestDistance or TestComplete or TestFocalLoss",
    ),
    "models": (
        [
            "test_models.py",
            "test_models_detection_anchor_utils.py",
            "test_models_detection_negative_samples.py",
            "test_models_detection_utils.py",
        ],
        "test_detection_model or Negative or Tester or Utils",
    ),
}
#: Tests that fail, as regular expressions, and why.
EXPECTED = {
    r"_jit|test_jit": "TorchScript cannot compile the ops",
    r"test_qnms": "quantised tensors are refused",
    r"test_nms_input_errors": "wrong arguments raise ValueError or TypeError instead of RuntimeError",
    r"test_(giou|ciou|distance_iou)_loss|test_reduction_mode": "the message about an unknown reduction is another one",
    r"test_correct_ratio\[.*cpu-0-": "with gamma 0, the test demands a loss that is not above the cross-entropy of "
    "PyTorch, from which ours differs by a rounding error",
    r"test_detection_model\[cpu-(fasterrcnn_mobilenet|ssdlite320)": "the untrained network gives all candidates one "
    "score, and the order of equal scores is another one",
}


def failures(suite: str, tests: Path, ours: bool) -> set[str]:
    """Run a suite with torchvision's code or with ours, and return the names of the tests that failed."""
    files, selection = SUITES[suite]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", *files, "-k", selection]
    environment = os.environ | {"TORCHVISION_SUITE": suite, "PYTHONPATH": str(ROOT)}
    if ours:
        command += ["-p", "tools.torchvision_suite.plugin"]
    run = subprocess.run(command, cwd=tests, env=environment, capture_output=True, text=True)
    summary = run.stdout.strip().splitlines()[-1:]
    print(f"{suite}, {'ours' if ours else 'torchvision'}: {''.join(summary)}", flush=True)
    if run.returncode not in (0, 1) or " passed" not in "".join(summary):
        raise SystemExit(f"the tests did not run:\n{run.stdout[-2000:]}{run.stderr[-2000:]}")
    return set(re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", run.stdout, flags=re.MULTILINE))


def main() -> int:
    """Run both suites, and return the exit status."""
    parser = argparse.ArgumentParser(description="Run torchvision's own tests on the ops and on accelerated models.")
    parser.add_argument("path", type=Path, help="the source of torchvision, which has a folder test")
    tests = parser.parse_args().path / "test"
    if not (tests / "test_ops.py").is_file():
        parser.error(f"{tests} has no test_ops.py; pass the root of torchvision's source")
    found = {test for suite in SUITES for test in failures(suite, tests, True) - failures(suite, tests, False)}
    status = 0
    for pattern, reason in EXPECTED.items():
        matching = {test for test in found if re.search(pattern, test)}
        found -= matching
        print(f"{len(matching):4} {reason}")
        if not matching:
            print(f"     no test that matches {pattern} failed; remove it from EXPECTED")
            status = 1
    for test in sorted(found):
        print(f"unexpected failure: {test}")
    return 1 if found else status


if __name__ == "__main__":
    sys.exit(main())
