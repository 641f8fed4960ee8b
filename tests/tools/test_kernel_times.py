"""Predicted times: the check objects to planted kernels that waste time, and the parts of the model count correctly."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = [pytest.mark.backends("emulated"), pytest.mark.once]  # they choose variants themselves

ROOT = Path(__file__).resolve().parents[2]
# The planted kernels need a process of their own, because they replace the tracer of other variants.
PROGRAM = """
import json, sys
from tools.kernel_times import check, emulated, predict, resources, results
from tools.kernel_times.machines import H200, MACHINES
from tools.pages.kernel_resources.library import Usage
from tools.pages.kernel_resources.loops import Loop

def row(predictions):
    us = predictions[0].us
    return {"us": {"H200": us}, "kernels": {"planted": results.kernel_row(predictions)}}

emulator = emulated.load("planted_costs")
kernels = {}
for name in ("even", "more_instructions", "one_block", "one_warp", "independent_loads", "dependent_loads"):
    launches = emulated.run(emulator, lambda: emulator.run(name), blocks=4)
    predictions = [predict.predict(launch, H200, resources.Resources({}), name) for launch in launches]
    kernels[name] = {
        "us": predictions[0].us,
        "binds": predictions[0].binds,
        "row": row(predictions),
        "shape_faults": check.shape_faults("planted", predictions),
    }
launches = emulated.run(emulator, lambda: emulator.run("packs"))
loads = launches[0].cost.wide_loads
kernels["loads"] = {"count": loads.count, "instructions": loads.shortest(1)}
steps = emulated.run(emulator, lambda: emulator.run("steps"))[0].cost.wide_loads
kernels["steps"] = [steps.shortest(n) for n in range(1, 9)]
for name, count in (("unmarked", 20), ("hot", 20), ("longer", 24), ("other", 300)):
    usage = Usage(registers=32, loops=[Loop(0, 50, 0, 0, 0, 0), Loop(1, 99, 1, 0, 0, 0, count, 1)])
    known = resources.Resources({("packs", "sm_90"): usage}, [] if name == "unmarked" else ["packs"])
    predictions = [predict.predict(launch, H200, known, "packs") for launch in launches]
    kernels[name] = {"row": row(predictions), "loop_faults": check.loop_faults("planted", predictions)}
print(json.dumps(kernels))
"""


@pytest.fixture(scope="module")
def planted():
    command = [sys.executable, "-c", PROGRAM]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_that_a_good_kernel_is_bound_by_issue_and_has_no_fault(planted):
    assert planted["even"]["binds"] == "issue"
    assert planted["even"]["us"] > 20  # else the check would not look at its shape
    assert planted["even"]["shape_faults"] == []


def test_the_number_of_instructions(planted):
    from tools.kernel_times import check

    even = planted["even"]["row"]["kernels"]["planted"]
    # A step is a multiplication, an addition, and about two instructions for the loop.
    steps = 500 * (1 << 21) / 32
    assert 1.5 * steps < even["instructions"] < 5 * steps
    assert even["blocks"] == (1 << 21) / 256
    assert even["bytes"] == pytest.approx((1 << 21) * 8, rel=0.05)  # whole sectors
    assert not check.growth_faults("planted", planted["even"]["row"], planted["even"]["row"])


def test_that_20_percent_more_instructions_are_a_fault(planted):
    from tools.kernel_times import check

    new, old = planted["more_instructions"]["row"], planted["even"]["row"]
    ratio = new["kernels"]["planted"]["instructions"] / old["kernels"]["planted"]["instructions"]
    assert ratio == pytest.approx(1.2, abs=0.01)
    faults = check.growth_faults("planted", new, old)
    assert len(faults) == 2  # the case and its kernel
    assert all("the table" in fault for fault in faults)


def test_that_the_machine_code_of_a_hot_loop_counts(planted):
    loads, row = planted["loads"], {name: planted[name]["row"]["kernels"]["planted"] for name in ("unmarked", "hot")}
    assert loads["count"] == (1 << 21) / 4 / 32
    assert 4 < loads["instructions"] < 60  # the shortest iteration: without the polynomial that some evaluate
    assert row["hot"]["hot_loop"] == [20, pytest.approx(loads["instructions"], abs=0.05)]
    assert "hot_loop" not in row["unmarked"]
    # The other instructions are many, and stay as estimated.
    replaced = loads["count"] * (20 - loads["instructions"])
    assert row["hot"]["instructions"] == pytest.approx(row["unmarked"]["instructions"] + replaced, abs=2)
    assert row["hot"]["instructions"] > 2 * loads["count"] * 20
    # Shorter iterations take less time, in each of the terms that depend on them.
    sign = 1 if replaced > 0 else -1
    for term in ("issue", "latency"):
        assert sign * (row["hot"]["terms"][term] - row["unmarked"]["terms"][term]) >= 0
    assert row["hot"]["span"] != row["unmarked"]["span"]


def test_that_an_iteration_may_end_at_a_barrier(planted):
    between_loads, *_, of_step = planted["steps"][:4]
    assert 4 < between_loads < of_step  # the loads are one instruction in a loop, and the polynomial comes after it
    assert planted["steps"][4:] == [0, 0, 0, 0]


def test_that_a_longer_hot_loop_is_a_fault(planted):
    from tools.kernel_times import check

    longer, hot = (planted[name]["row"]["kernels"]["planted"] for name in ("longer", "hot"))
    more = planted["loads"]["count"] * 4
    assert longer["instructions"] - hot["instructions"] == pytest.approx(more, abs=2)
    assert planted["hot"]["loop_faults"] == planted["unmarked"]["loop_faults"] == []
    (fault,) = planted["other"]["loop_faults"]
    assert "300 instructions per 128-bit access in the machine code" in fault
    assert check.growth_faults("planted", planted["other"]["row"], planted["hot"]["row"])


def test_that_only_independent_loads_overlap(planted):
    latency = 900 / 1900  # of memory, in microseconds
    assert 1 * latency < planted["independent_loads"]["row"]["kernels"]["planted"]["terms"]["latency"] < 2 * latency
    assert 4 * latency < planted["dependent_loads"]["row"]["kernels"]["planted"]["terms"]["latency"] < 5 * latency


@pytest.mark.parametrize("kernel, text", [("one_block", "uses 1 of 132"), ("one_warp", "in one warp")])
def test_that_an_idle_machine_is_a_fault(planted, kernel, text):
    (fault,) = planted[kernel]["shape_faults"]
    assert text in fault


def test_that_accepted_launches_are_no_fault(planted, monkeypatch):
    from tools.kernel_times import check

    @dataclass
    class Launch:
        kernel: str = "slow_kernel"
        us: float = 30.0
        multiprocessors: int = 1
        one_warp: float = 0.0

    assert len(check.shape_faults("case", [Launch()])) == 1
    monkeypatch.setattr(check, "ACCEPTED", [("^case$", "^slow_", "a reason")])
    assert check.shape_faults("case", [Launch()]) == []
    assert len(check.shape_faults("another", [Launch()])) == 1


DISASSEMBLY = """
0000000000001000 <kernel(float*)>:
    1000:\tpush   %rbx
    1001:\tcall   900 <__sanitizer_cov_trace_pc@plt>
    1006:\tmulss  %xmm1,%xmm0
    100a:\tadd    %rcx,%rax
    100d:\tadd    $0x8,%rsp
    1010:\tcall   910 <__tsan_read4@plt>
    1015:\tjne    1030
    1017:\tcall   900 <__sanitizer_cov_trace_pc@plt>
    101c:\tlock incl (%rdi)
    101f:\tret
0000000000002000 <int __shfl_sync<int>(unsigned int, int)::{lambda(int)#1}::operator()(int) const>:
    2000:\tcall   900 <__sanitizer_cov_trace_pc@plt>
    2005:\tadd    %ecx,%eax
""".splitlines()


def test_the_weights_of_instructions():
    from tools.emulator.cost_weights import CALIBRATION, functions, weights

    found = {}
    for name, function in functions(DISASSEMBLY):
        found |= weights(name, function)
    expected = {0x1006: 0.6 + 2.0 + 0.0 + 2.0 + 1.0, 0x101C: 1.0, 0x2005: 0.0}
    assert found == {offset: pytest.approx(weight * CALIBRATION) for offset, weight in expected.items()}


def load(at, address, target):
    """Return the instructions of a load whose call returns to `at + 2`."""
    announce = [(at, "mov", f"{address},%rdi"), (at + 1, "call", "910 <__tsan_read4@plt>")]
    return [*announce, (at + 2, "mov", f"(%rbx),{target}")]


def test_that_a_load_waits_for_the_load_of_its_address():
    from tools.emulator.cost_dataflow import waits

    code = [*load(10, "%rbx", "%eax"), (13, "shl", "$0x2,%rax"), (14, "add", "%rbp,%rax"), *load(20, "%rax", "%ecx")]
    assert waits([*code, (30, "ret", "")]) == {22: {12}}


def test_that_a_load_waits_for_the_load_that_a_jump_needs():
    from tools.emulator.cost_dataflow import waits

    code = [*load(10, "%rbx", "%r12d"), (13, "test", "%r12d,%r12d"), (14, "jne", "50"), *load(20, "%rbp", "%ecx")]
    assert waits([*code, (30, "ret", "")]) == {22: {12}}


def test_that_a_chain_waits_for_itself():
    from tools.emulator.cost_dataflow import waits

    code = [*load(10, "%rbx", "%eax"), (13, "lea", "(%rbp,%rax,4),%rbx"), (14, "jne", f"{10:x}")]
    start = (1, "mov", "%rsi,%rbx")
    assert waits([start, *code, (30, "ret", "")]) == {12: {12}}


def test_that_loads_of_independent_addresses_do_not_wait():
    from tools.emulator.cost_dataflow import waits

    code = [*load(10, "%rbx", "%eax"), (13, "mov", "%eax,0x8(%rsp)"), (14, "cmp", "%r8,%r9"), (15, "jb", "50")]
    assert waits([*code, *load(20, "%rbp", "%ecx"), (30, "ret", "")]) == {}
    reloaded = [*code, (16, "mov", "0x8(%rsp),%eax"), (17, "lea", "(%rbp,%rax,4),%rbx"), *load(20, "%rbx", "%ecx")]
    assert waits([*reloaded, (30, "ret", "")])[22] == {12}


def test_what_a_call_asks_of_torch():
    import torch

    from tools.kernel_times import torch_calls

    rows = torch.rand(16, 50)
    counted = torch_calls.count(
        lambda: (rows.sort(1), rows[0].sort(), rows + 1, rows.view(-1), rows.contiguous(), rows.double(), rows.t() * 1)
    )
    expected = {"sort": torch_calls.SORT_ROWS + torch_calls.SORT, "add": 1, "mul": 1, "_to_copy": 1}
    assert counted.operations == expected
    assert counted.dispatcher_calls == 8  # those of select and t too, but not that of contiguous


def test_the_extrapolation_is_exact_for_its_own_model():
    from tools.kernel_times import extrapolation

    def value(boxes, kept):
        return 3.0 * boxes + 0.5 * boxes * kept

    emulated = [value(*size) for size in extrapolation.EMULATED.values()]
    assert extrapolation.extrapolate(emulated) == pytest.approx(value(extrapolation.BOXES, extrapolation.KEPT))


def test_the_extrapolated_launches_are_one_or_one_per_chunk():
    from tools.kernel_times import extrapolation, results

    row = extrapolation.nms_200k(results.load()["cases"])
    chunks = extrapolation.BOXES / 1024
    launches = {name: its["launches"] for name, its in row["kernels"].items()}
    assert launches["nms_long_masks_kernel"] == launches["rank_keys_kernel"] == 1
    assert launches["nms_long_resolve_kernel"] == pytest.approx(chunks, rel=0.03)
    assert row["us"]["H200"] >= sum(its["us"] for its in row["kernels"].values())


def test_the_constants_that_calibration_measures_exist():
    from tools.kernel_times import calibrate

    constants = calibrate.assumed_constants()
    measured = {"kPace", "kIssueRate", "kShared", "kBarrier", "kCollective", *calibrate.CHASED}
    assert measured <= constants.keys()
