"""The race detector accepts blocks that hand data over with fences and a ticket, and finds each mistake in that."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.backends("emulated"), pytest.mark.once]  # they choose variants themselves

SOURCE = (Path(__file__).resolve().parents[2] / "tools" / "emulator" / "handover_bugs.cu").read_text().splitlines()
SCHEDULES = (("fifo", 1), ("lifo", 1), ("random", 1), ("random", 2))

PROGRAM = """
import json, sys
sys.path.insert(0, {folder!r})
import planted_bugs as emulator

emulator.set_schedule({order!r}, {seed})
results = {{}}
for name in {names!r}:
    results[name] = [emulator.run_handover(name), emulator.take_races()]
print(json.dumps(results))
"""

RIGHT = ("kNone", "reuse", "warps", "chain")
#: The line that the message names, by its text after "BUG: ".
BUGS = {
    "kNoReleaseFence": "read of the values",
    "kReleaseFenceBeforeBarrier": "read of the values",
    "kReleaseFenceOfTheBlock": "read of the values",
    "kNoAcquireFence": "read of the values",
    "kAcquireFenceBeforeTicket": "read of the values",
    "kAcquireFenceAfterBarrier": "read of the values",
    "kReleaseOfAnotherTicket": "read of the values",
    "kPlainReadOfTicket": "kPlainReadOfTicket",
    "kReadBeforeTicket": "kReadBeforeTicket",
    "broken_chain": "read of the values",
}


@pytest.fixture(scope="module", params=SCHEDULES, ids=lambda schedule: f"{schedule[0]}:{schedule[1]}")
def results(request):
    """Return the sum and the races of each kernel."""
    from tools.emulator import build

    order, seed = request.param
    (folder,) = build.build("races")
    program = PROGRAM.format(folder=str(folder), order=order, seed=seed, names=[*RIGHT, *BUGS])
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return json.loads(result.stdout)


@pytest.mark.parametrize("name", RIGHT)
def test_right_handovers_are_no_races(results, name):
    expected = sum(block + thread % 7 for block in range(5) for thread in range(64))
    assert results[name] == [expected, []]


@pytest.mark.parametrize("name", BUGS)
def test_mistakes_are_races(results, name):
    (line,) = (number for number, text in enumerate(SOURCE, 1) if text.endswith(f"// BUG: {BUGS[name]}"))
    _, races = results[name]
    assert any(f"handover_bugs.cu:{line}" in race for race in races), races
    for race in races:
        assert f"in global memory, kernel {name}: " in race
        assert re.search(r"(read|write) by block \d, thread \d+ at .*; (read|write) by block \d, thread \d+ at ", race)
        assert "of another block without a handover (fence, atomic, atomic, fence)" in race
