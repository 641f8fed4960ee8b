"""Measures on a GPU what the cost model assumes: its constants, and the time of every case.

    python -m tools.kernel_times.calibrate [--small]

The last line of the output is JSON: the assumed and the measured constants, and the predicted and the measured times.
The predictions are those of docs/generated/kernel_times.json for this GPU, or none if the table has no such GPU. Each
case runs as a CUDA graph, or eagerly if it waits for the device.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tools.emulator.build import ROOT
from tools.kernel_times import results
from tools.kernel_times.cases import CASES, Call, Case
from tools.kernel_times.machines import MACHINES, Machine
from tools.toolchain import toolkit_bin

HERE = Path(__file__).resolve().parent
HEADER = ROOT / "tools" / "emulator" / "cost_thread.h"
#: Steps of the chains in calibration.cu, and the instructions of one step of its arithmetic.
STEPS, STEP_INSTRUCTIONS = 1024, 24
#: Bytes of the tables that are chased, by the cache that holds them.
CHASED = {"kL1": 16 << 10, "kL2": 8 << 20, "kMemory": 1 << 30}


def assumed_constants() -> dict[str, float]:
    """Return the constants of the emulator's latency model, in cycles."""
    return {name: float(value) for name, value in re.findall(r"\b(k[A-Z]\w*) = ([\d.]+)\b", HEADER.read_text())}


class Kernels:
    """The kernels of calibration.cu, compiled for this GPU."""

    def __init__(self, folder: Path) -> None:
        """Compile and load the library."""
        toolkit = toolkit_bin("nvcc")
        if toolkit is None:
            raise RuntimeError("calibration.cu: expected nvcc in CUDA_HOME, an installed wheel or in PATH, got none")
        library = folder / "calibration.so"
        arch = "sm_{}{}".format(*torch.cuda.get_device_capability())
        command = [str(toolkit / "nvcc"), "-shared", "-O3", "-Xcompiler=-fPIC", f"-arch={arch}"]
        subprocess.run([*command, "-o", str(library), str(HERE / "calibration.cu")], check=True)
        self.library = ctypes.CDLL(str(library))
        self.cycles = torch.zeros(4096, dtype=torch.int64)
        self.out = torch.zeros(1 << 20, dtype=torch.int32)

    def launch(self, name: str, *arguments: Tensor | int | ctypes.c_int64) -> None:
        """Launch a kernel on the current stream."""
        values = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else a for a in arguments]
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        if error := getattr(self.library, name)(*values, stream):
            raise RuntimeError(f"launch of {name} failed with CUDA error {error}")

    def cycles_of(self, name: str, *arguments: Tensor | int | ctypes.c_int64) -> float:
        """Return the cycles that the first block of a kernel measured, in the second of two runs."""
        for _ in range(2):
            self.launch(name, *arguments)
        return float(self.cycles[0])


def milliseconds(call: Call, repeats: int = 10) -> float:
    """Return the median time of a call, which runs twice before."""
    times = []
    for i in range(repeats + 2):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        times += [begin.elapsed_time(end)] if i >= 2 else []
    return statistics.median(times)


def chain(entries: int) -> Tensor:
    """Return indices that lead through a whole table of int32 in steps of a little more than 4 KiB."""
    step = 1057  # odd, so that it visits every entry of a table whose size is a power of two
    return ((torch.arange(entries, dtype=torch.int64) + step) % entries).to(torch.int32)


def graph_of(call: Call) -> Call:
    """Capture a call in a CUDA graph and return its replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def copy_bandwidth(kernels: Kernels, blocks: int) -> float:
    """Return how many bytes per microsecond a copy of 1 GiB reads and writes."""
    size = 1 << 30
    source, target = torch.empty(size, dtype=torch.uint8), torch.empty(size, dtype=torch.uint8)
    duration = milliseconds(lambda: kernels.launch("copy", source, target, ctypes.c_int64(size), blocks))
    return 2 * size / duration / 1e3


def measure_constants(kernels: Kernels) -> dict[str, float]:
    """Return the measured constants by their names in the model. Times are in cycles unless the name says otherwise."""
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    measured = {"copy bytes per us": copy_bandwidth(kernels, multiprocessors * 4)}
    floats = torch.empty(1 << 20)
    alone = kernels.cycles_of("arithmetic", floats, kernels.cycles, 1, 32)

    def full() -> None:
        kernels.launch("arithmetic", floats, kernels.cycles, multiprocessors, 1024)

    full()
    cycles = float(kernels.cycles[0])
    measured["kPace"] = alone / STEPS / STEP_INSTRUCTIONS
    measured["kIssueRate"] = 32 * STEPS * STEP_INSTRUCTIONS / cycles
    measured["clock cycles per us"] = cycles / (milliseconds(full) * 1e3)  # a little low: the launch is in the time

    for name, chased in CHASED.items():
        table = chain(chased // 4)
        steps = min(len(table), 1 << 14)
        measured[name] = kernels.cycles_of("chase", table, kernels.out, kernels.cycles, steps) / steps
        del table
    measured["kShared"] = kernels.cycles_of("shared_chase", kernels.out, kernels.cycles) / STEPS
    measured["kBarrier"] = kernels.cycles_of("barrier", kernels.cycles, 1024) / STEPS
    measured["kCollective"] = kernels.cycles_of("shuffle", kernels.out, kernels.cycles) / STEPS
    measured["shared atomic, waited for"] = kernels.cycles_of("shared_atomic", kernels.out, kernels.cycles) / STEPS

    blocks = multiprocessors * 4
    us = milliseconds(lambda: kernels.launch("global_atomic", kernels.out, blocks)) * 1e3
    measured["atomic interval"] = us * measured["clock cycles per us"] / (blocks * 256 * 64)

    nodes = 1000

    def empty() -> None:
        for _ in range(nodes):
            kernels.launch("empty")

    measured["graph node us"] = milliseconds(graph_of(empty)) * 1e3 / nodes
    return measured


def assumed(machine: Machine) -> dict[str, float]:
    """Return what the model assumes, by the names of `measure_constants`."""
    of_machine = {
        "copy bytes per us": machine.copy,
        "clock cycles per us": machine.clock,
        "atomic interval": machine.atomic_interval,
        "graph node us": machine.launch,
    }
    return assumed_constants() | of_machine


def measure_case(case: Case, predicted: float | None, images: int) -> dict[str, Any]:
    """Return the predicted and the measured time of a case in microseconds."""
    torch.manual_seed(0)
    call = case.prepare(images)
    us = milliseconds(call if case.waits else graph_of(call)) * 1e3
    row = {"predicted_us": predicted, "measured_us": round(us, 1), "graph": not case.waits}
    return row | ({"ratio": round(us / predicted, 2)} if predicted else {})


def worst(cases: dict[str, dict[str, Any]]) -> str:
    """Name the cases that are furthest from their predictions."""
    ratios = {name: row["ratio"] for name, row in cases.items() if row.get("ratio")}
    far = sorted(ratios, key=lambda name: -max(ratios[name], 1 / ratios[name]))[:3]
    return ", ".join(f"{name} {ratios[name]} x" for name in far) or "no prediction for this GPU"


def main() -> int:
    """Measure the constants and the cases, and print them as one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="one image per case")
    arguments = parser.parse_args()
    name = torch.cuda.get_device_name()
    machine = next((m for m in MACHINES if m.name in name), None)
    table = results.load()["cases"]
    torch.set_default_device("cuda")
    with tempfile.TemporaryDirectory() as folder:
        measured = measure_constants(Kernels(Path(folder)))
    expected = assumed(machine or MACHINES[0])
    constants = {key: {"assumed": expected.get(key), "measured": round(value, 2)} for key, value in measured.items()}
    cases: dict[str, dict[str, Any]] = {}
    errors: dict[str, str] = {}
    for case in CASES:
        predicted = table[case.name]["us"][machine.name] if machine and case.name in table else None
        images = 1 if arguments.small else case.images
        try:
            cases[case.name] = measure_case(case, None if arguments.small else predicted, images)
        except RuntimeError as error:
            errors[case.name] = str(error).splitlines()[0]
        torch.cuda.empty_cache()
        print(f"{case.name}: {cases.get(case.name) or errors[case.name]}", flush=True)
    note = f"furthest from the prediction: {worst(cases)}"
    print(json.dumps({"machine": name, "constants": constants, "cases": cases, "errors": errors, "note": note}))
    return int(bool(errors))


if __name__ == "__main__":
    sys.exit(main())
