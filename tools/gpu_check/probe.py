"""Runs the ops on one backend for gpu_check. Each command prints one line of JSON last and reports by its exit status.

    describe      describe the device and the versions
    kernels       list which kernels run: from torch.profiler, or from the emulator's launch log
    small         run every op once at small sizes, under a sanitizer
    results FILE  run every op twice with several seeds and store the results; fail if the two runs differ in a bit
    compare FILE  run the same cases on this backend; fail if a result differs from the stored one

The JSON of every command but `describe` also says which build of the kernels ran.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import statistics
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from tools.emulator.build import build
from tools.gpu_check.cases import Outcome, cases

ROOT = Path(__file__).resolve().parents[2]


def load_backend(name: str, emulation: str) -> torch.device:
    """Load the kernels of a backend and return the device of their tensors."""
    if name == "emulated":
        (folder,) = build(emulation)
        sys.path.insert(0, str(folder))
    import retinanet_ops

    if name == "emulated" and not Path(retinanet_ops.__file__).is_relative_to(folder):
        raise RuntimeError(f"expected the emulated kernels of {folder}, but {retinanet_ops.__file__} is imported")
    warnings.simplefilter("error", retinanet_ops.FallbackWarning)
    return torch.device("cuda" if name == "cuda" else "cpu")


def kernels_used() -> dict[str, Any]:
    """Return the package that the kernels come from and the compiler that built them."""
    import retinanet_ops

    return {"package": str(Path(retinanet_ops.__file__).parent), "compiler": retinanet_ops.build_info()["compiler"]}


def synchronize(device: torch.device) -> None:
    """Wait for the device, which raises the errors of its kernels."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def nvidia_smi(field: str) -> str | None:
    """Return one field of nvidia-smi, or None if it cannot be read."""
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def copy_bandwidth(device: torch.device, megabytes: int) -> float:
    """Measure the bytes per second, read plus written, of a copy within the device: the median of 20."""
    source = torch.rand(megabytes * 2**18, device=device)
    target = torch.empty_like(source)
    times = []
    for _ in range(23):
        synchronize(device)
        start = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        times.append(time.perf_counter() - start)
    return 2 * source.numel() * source.element_size() / statistics.median(times[3:])


def describe(device: torch.device) -> dict[str, Any]:
    """Describe the device and the versions. This works without built kernels."""
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }
    if device.type != "cuda":
        return {**facts, "device": platform.processor() or platform.machine()}
    properties = torch.cuda.get_device_properties(device)
    return {
        **facts,
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "driver": nvidia_smi("driver_version"),
        "copy_bytes_per_s": copy_bandwidth(device, min(2048, properties.total_memory // 8 // 2**20)),
    }


def kernels_in_source() -> set[str]:
    """Return the names of all kernels in csrc."""
    text = "\n".join(path.read_text() for path in sorted((ROOT / "csrc").rglob("*.*")))
    bounds = r"__launch_bounds__\((?:[^()]|\([^()]*\))*\)\s*"
    return set(re.findall(rf"__global__\s+void\s+(?:{bounds})?(\w+)\s*\(", text))


def run_all(device: torch.device, small: bool) -> None:
    """Run every case once, and wait for the device."""
    for case in cases(small):
        case.run(device, None)
    synchronize(device)


def run_small(device: torch.device, backend: str) -> tuple[dict[str, Any], bool]:
    """Run every case at small sizes. An emulated run fails if the race detector, in the `races` build, finds a race."""
    run_all(device, small=True)
    if backend != "emulated":
        return {}, True
    races = import_module("retinanet_ops._C").take_races()
    return {"races": races}, not races


def launches(device: torch.device, backend: str) -> dict[str, int]:
    """Count how often one run of all cases launches each of our kernels."""
    if backend == "emulated":
        emulator = import_module("retinanet_ops._C")
        emulator.take_launches()
        run_all(device, small=True)
        return dict(Counter(launch.kernel for launch in emulator.take_launches()))
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        run_all(device, small=True)
    counts: dict[str, int] = {}
    for event in profiler.events():
        on_device = event.device_type == torch.autograd.DeviceType.CUDA
        if on_device and (match := re.search(r"retinanet::.*?(\w+_kernel)\b", event.name)):
            counts[match[1]] = counts.get(match[1], 0) + 1
    return counts


def prove_kernels(device: torch.device, backend: str) -> tuple[dict[str, Any], bool]:
    """Count the launches of each kernel, and return whether every kernel in the source is launched."""
    counts = launches(device, backend)
    missing = sorted(kernels_in_source() - counts.keys())
    return {"launches": dict(sorted(counts.items())), "never_launched": missing}, not missing


def difference(actual: torch.Tensor, expected: torch.Tensor) -> str | None:
    """Describe where two tensors differ in a bit, or return None."""
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return f"{actual.dtype} {list(actual.shape)} instead of {expected.dtype} {list(expected.shape)}"
    if actual.numel() == 0:
        return None
    rows = [t.contiguous().view(-1, 1).view(torch.uint8) for t in (actual, expected)]
    wrong = (rows[0] != rows[1]).any(1).nonzero().flatten()
    if len(wrong) == 0:
        return None
    first = int(wrong[0])
    values = actual.flatten()[first].item(), expected.flatten()[first].item()
    return f"{len(wrong)} of {actual.numel()} differ, the first at {first}: {values[0]!r} instead of {values[1]!r}"


def distance(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> str | None:
    """Describe where floating-point results differ by more than the tolerance, or return None."""
    try:
        torch.testing.assert_close(actual.double(), expected.double(), rtol=tolerance, atol=tolerance, equal_nan=True)
    except AssertionError as error:
        return " ".join(str(error).split())
    return None


def store_results(device: torch.device, small: bool, path: Path) -> tuple[dict[str, Any], bool]:
    """Run every case twice and store the results of the first run."""
    stored: dict[str, Outcome] = {}
    faults: dict[str, str] = {}
    bits = 0
    for case in cases(small):
        first, second = case.run(device, None), case.run(device, None)
        stored[case.name] = first
        for name, value in {**first.exact, **first.close}.items():
            bits += 8 * value.numel() * value.element_size()
            if fault := difference({**second.exact, **second.close}[name], value):
                faults[f"{case.name}, {name}"] = fault
    torch.save({name: (outcome.exact, outcome.close) for name, outcome in stored.items()}, path)
    return {"cases": len(stored), "bits_compared": bits, "differences_between_runs": faults}, not faults


def compare_results(device: torch.device, small: bool, path: Path) -> tuple[dict[str, Any], bool]:
    """Run every case and compare the results with those that another backend stored."""
    stored = torch.load(path)
    faults: dict[str, str] = {}
    exact = integers = 0
    for case in cases(small):
        theirs = Outcome(*stored.pop(case.name))
        ours = case.run(device, theirs)
        for name, value in ours.exact.items():
            exact += value.numel()
            integers += 0 if value.is_floating_point() else value.numel()
            if fault := difference(theirs.exact[name], value):
                faults[f"{case.name}, {name}"] = fault
        for name, value in ours.close.items():
            if fault := distance(theirs.close[name], value, case.tolerance):
                faults[f"{case.name}, {name}"] = fault
    for name in stored:
        faults[name] = "not computed here"
    return {"values_compared_bit_for_bit": exact, "integers_among_them": integers, "differences": faults}, not faults


def main() -> int:
    """Run one command, print its result and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("describe", "kernels", "small", "results", "compare"))
    parser.add_argument("file", type=Path, nargs="?")
    parser.add_argument("--backend", default="cuda", choices=("cpu", "cuda", "emulated"))
    parser.add_argument("--emulation", default="plain", help="variant of the emulated kernels")
    parser.add_argument("--small", action="store_true", help="small sizes")
    arguments = parser.parse_args()
    backend = arguments.backend
    if arguments.command == "describe":
        print(json.dumps(describe(torch.device("cuda" if backend == "cuda" else "cpu"))))
        return 0
    device = load_backend(backend, arguments.emulation)
    commands: dict[str, Callable[[], tuple[dict[str, Any], bool]]] = {
        "kernels": lambda: prove_kernels(device, backend),
        "small": lambda: run_small(device, backend),
        "results": lambda: store_results(device, arguments.small, arguments.file),
        "compare": lambda: compare_results(device, arguments.small, arguments.file),
    }
    result, passed = commands[arguments.command]()
    print(json.dumps({**result, "kernels": kernels_used()}))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
