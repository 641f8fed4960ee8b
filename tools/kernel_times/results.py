"""Runs the cases and keeps their predictions in docs/generated/kernel_times.json."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from tools.emulator.build import ROOT
from tools.kernel_times import emulated, torch_calls
from tools.kernel_times.cases import Case
from tools.kernel_times.machines import MACHINES
from tools.kernel_times.predict import Prediction, predict
from tools.kernel_times.resources import Resources, instances

TABLE = ROOT / "docs" / "generated" / "kernel_times.json"


class Outcome:
    """The predictions of one case.

    Attributes:
        case: The case.
        launches: Launches of the emulator.
        predictions: One per launch, by the name of the machine.
        torch_calls: What the call asked of torch.
    """

    def __init__(self, case: Case, emulator: ModuleType, known: Resources, profile: bool = False) -> None:
        """Run a case."""
        self.case = case
        torch.manual_seed(0)
        call = case.prepare(case.images)
        counted: list[torch_calls.TorchCalls] = []
        self.launches = emulated.run(
            emulator,
            lambda: counted.append(torch_calls.count(call)),
            profile,
            blocks=case.sampled_blocks,
            images=case.images,
            first_images=case.emulated_images,
        )
        (self.torch_calls,) = counted
        names = instances(self.launches, Path(emulator.__file__ or ""))
        self.predictions = {
            machine.name: [
                predict(launch, machine, known, names.get(launch.function, launch.kernel)) for launch in self.launches
            ]
            for machine in MACHINES
        }

    def us(self, machine: str) -> float:
        """Return the predicted time of the case: its launches, and the launches of torch's own kernels."""
        launch = next(m.launch for m in MACHINES if m.name == machine)
        return sum(p.us for p in self.predictions[machine]) + launch * self.torch_calls.operations.total()

    def row(self) -> dict[str, Any]:
        """Return the entry of the table."""
        first = MACHINES[0].name
        return {
            "goal": self.case.goal,
            "us": {machine: round(self.us(machine), 1) for machine in self.predictions},
            "launches": len(self.launches),
            "torch_operations": dict(self.torch_calls.operations),
            "dispatcher_calls": self.torch_calls.dispatcher_calls,
            "kernels": {group[0].kernel: kernel_row(group) for group in groups(self.predictions[first])},
        }


def groups(predictions: Sequence[Prediction]) -> list[list[Prediction]]:
    """Return the predictions in groups of the same kernel, in the order of its first launch."""
    by_kernel: dict[str, list[Prediction]] = {}
    for prediction in predictions:
        by_kernel.setdefault(prediction.kernel, []).append(prediction)
    return list(by_kernel.values())


def kernel_row(group: list[Prediction]) -> dict[str, Any]:
    """Return the entry of one kernel: sums over its launches, the rest of the longest one."""
    longest = max(group, key=lambda p: p.us)
    hot_loop = {"hot_loop": [round(number, 1) for number in longest.hot_loop]} if longest.hot_loop else {}
    return {
        "launches": len(group),
        "us": round(sum(p.us for p in group), 1),
        "binds": longest.binds,
        "terms": {name: round(us, 1) for name, us in longest.terms.items()},
        "blocks": longest.blocks,
        "multiprocessors": longest.multiprocessors,
        "warps": longest.resident_warps,
        "instructions": round(sum(p.instructions for p in group)),
        "bytes": round(sum(p.bytes for p in group)),
        "span": round(longest.span, 1),
        "one_warp": round(longest.one_warp, 2),
        "registers": longest.registers,
        "registers_known": longest.known,
        **hot_loop,
    }


def compiler() -> str:
    """Return the version of the C++ compiler, whose code is counted."""
    return subprocess.run(["c++", "-dumpfullversion"], capture_output=True, text=True, check=True).stdout.strip()


def dump(rows: dict[str, dict[str, Any]]) -> str:
    """Return the table as JSON, one line per case and kernel."""
    lines = []
    for name, row in rows.items():
        kernels = ",\n".join(
            f"   {json.dumps(kernel)}: {json.dumps(value)}" for kernel, value in row["kernels"].items()
        )
        head = json.dumps({key: value for key, value in row.items() if key != "kernels"})[:-1]
        lines.append(f'  {json.dumps(name)}: {head}, "kernels": {{\n{kernels}}}}}')
    body = ",\n".join(lines)
    return f'{{"compiler": {json.dumps(compiler())},\n "cases": {{\n{body}\n}}}}\n'


def load(path: Path = TABLE) -> dict[str, Any]:
    """Return the committed table, without cases if there is none."""
    return json.loads(path.read_text()) if path.exists() else {"compiler": "", "cases": {}}
