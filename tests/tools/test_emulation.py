"""The emulator finds every planted bug, names its line, and reports nothing else."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.backends("emulated"), pytest.mark.once]  # they choose variants themselves

EMULATION = Path(__file__).resolve().parents[2] / "tools" / "emulator"
BUGS = (EMULATION / "bugs.cu").read_text().splitlines()
SCHEDULES = ("fifo", "lifo", "random:1")

PROGRAM = """
import json, sys
sys.path.insert(0, {folder!r})
import planted_bugs as emulator

emulator.set_schedule({order!r}, {seed})
emulator.set_strict({strict})
result = {{"error": None, "out": None}}
try:
    result["out"] = emulator.run({bug!r})
except RuntimeError as error:
    result["error"] = str(error)
result["races"] = emulator.take_races()
print(json.dumps(result))
"""


VARIANTS = ("plain", "asan", "races", "ucontext")


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request):
    return request.param


@pytest.fixture(scope="module")
def folders():
    from tools.emulator import build

    return dict(zip(VARIANTS, build.build(*VARIANTS), strict=True))


def run_bug(folders, variant, bug, schedule="fifo", strict=True):
    """Run a planted bug in a new process. Return its report, or the text with which a sanitizer ended the process."""
    from tools.emulator import run

    order, _, seed = schedule.partition(":")
    program = PROGRAM.format(folder=str(folders[variant]), order=order, seed=int(seed or 1), strict=strict, bug=bug)
    environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    if variant == "asan":
        environment |= run.sanitizer_environment()
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if result.returncode == 0:
        return json.loads(result.stdout)
    assert "ERROR: AddressSanitizer" in result.stderr or "runtime error" in result.stderr, result.stderr
    return result.stderr


def line_of(bug):
    (line,) = [i for i, text in enumerate(BUGS, 1) if re.search(rf"BUG: {bug}$", text)]
    return f"bugs.cu:{line}"


RACES = {
    "missing_barrier": "read",
    "missing_barrier_in_order": "read after write|write after read",
    "missing_barrier_in_loop": "write after read",
    "missing_barrier_of_bools": "read after write|write after read",
    "missing_barrier_of_halves": "read after write",
    "missing_syncwarp": "read",
    "two_threads_race": "read after write|write after read",
    "race_of_blocks": "global memory",
    "plain_read_of_atomic": "global memory",
    "uninitialised_shared": "read of uninitialised in shared memory",
    "uninitialised_bools": "read of uninitialised in shared memory",
}
OVERRUNS = {
    "shared_overrun": "index 256 out of bounds",
    "shared_overrun_by_pointer": "global-buffer-overflow|insufficient space",
    "dynamic_shared_overrun": "use-after-poison|heap-buffer-overflow",
    "global_overrun": "heap-buffer-overflow",
    "misaligned_load": "misaligned address",
}
VIOLATIONS = {
    "divergent_barrier": "divergent __syncthreads: here at",
    "early_return": "a thread returned while others wait in __syncthreads at|__syncthreads at .* after",
    "full_mask_in_half_a_warp": "__shfl_xor_sync at .* lanes 0xffff0000 returned without it",
    "outside_of_its_mask": "__any_sync at .* which leaves out the calling lane",
    "different_masks": "__ballot_sync at .* with mask 0x1ffff, but lanes 0x10000 returned without it",
    "different_collectives": "where other lanes of the warp are in",
    "shuffles_of_two_lines": "__shfl_xor_sync at .* where other lanes of the warp are in __shfl_xor_sync",
    "deadlock": "deadlock: a thread waits at",
    "misaligned_load": "misaligned access of 16 bytes",
}
BAD_LAUNCHES = {
    "too_many_threads": "launch of race_of_blocks: a block of 2048 x 1 x 1 threads",
    "no_blocks": "launch of race_of_blocks: a grid of 0 x 1 x 1 blocks",
    "too_many_blocks": "launch of race_of_blocks: a grid of 1 x 65536 x 1 blocks",
    "too_much_shared_memory": "launch of race_of_blocks: 49153 bytes of dynamic shared memory",
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("bug", RACES)
def test_race_detector(folders, bug, schedule):
    races = run_bug(folders, "races", bug, schedule)["races"]
    assert any(re.search(RACES[bug], race) and line_of(bug) in race for race in races), races
    assert all(f"kernel {bug}:" in race and "block" in race and "thread" in race for race in races)


@pytest.mark.parametrize("bug", OVERRUNS)
def test_sanitizers(folders, bug):
    report = run_bug(folders, "asan", bug)
    assert re.search(OVERRUNS[bug], report) and line_of(bug) in report, report


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("bug", VIOLATIONS)
def test_strict_checks(folders, bug, schedule):
    error = run_bug(folders, "races" if bug == "misaligned_load" else "plain", bug, schedule)["error"]
    assert re.search(VIOLATIONS[bug], error) and line_of(bug) in error, error
    assert re.search(rf"\[kernel {bug}, block \(0, 0, 0\), thread \(\d+, 0, 0\)\]$", error), error


@pytest.mark.parametrize("bug", BAD_LAUNCHES)
def test_bad_launches(folders, bug):
    assert run_bug(folders, "plain", bug)["error"].startswith(BAD_LAUNCHES[bug])


def test_another_schedule_reveals_a_missing_barrier(folders):
    right = [0.0] + [float(i) for i in range(255)]
    for schedule, is_right in (("fifo", True), ("lifo", False), ("random:1", False), ("random:2", False)):
        out = run_bug(folders, "plain", "missing_barrier_in_order", schedule)["out"]
        assert (out[:256] == right) == is_right, schedule


@pytest.mark.parametrize("bug", ("early_return", "full_mask_in_half_a_warp"))
def test_without_strictness_barriers_ignore_threads_that_returned(folders, bug):
    assert run_bug(folders, "plain", bug, strict=False)["error"] is None


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_correct_kernel_has_no_findings(folders, variant, schedule):
    result = run_bug(folders, variant, "no_bug", schedule)
    assert result["error"] is None and result["races"] == []
    assert result["out"] == run_bug(folders, "plain", "no_bug")["out"]
    assert result["out"][-1] == 3 * sum(31 + 32 * warp for warp in range(8)) * 32


@pytest.mark.parametrize("variant", ("plain", "ucontext"), indirect=True)
def test_a_failed_launch_leaves_nothing_behind(folders, variant):
    """After a failed launch the process continues, and the next kernels run as if the launch had not happened."""
    program = f"""
import sys
sys.path.insert(0, {str(folders[variant])!r})
import planted_bugs as emulator

expected = emulator.run("no_bug")
for bug in {list(VIOLATIONS)[:-1]!r} * 3:
    try:
        emulator.run(bug)
    except RuntimeError:
        pass
    else:
        raise AssertionError(bug)
    assert emulator.run("no_bug") == expected, bug
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_missing_toolkit_is_a_clear_error(monkeypatch, tmp_path):
    from tools.emulator import build

    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(build.BuildError, match=r"no CUDA toolkit headers \(cuda_runtime.h\) in .*set CUDA_HOME"):
        build.toolkit_headers()
