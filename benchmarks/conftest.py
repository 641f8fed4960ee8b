"""Set-up of `pytest benchmarks/`: each op beside the alternatives in use today, checked before it is timed."""

from __future__ import annotations

import platform
from collections import defaultdict
from typing import Any

import pytest
import torch
from harness import Comparison, copy_bandwidth

import retinanet_ops
from retinanet_ops import _library


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of the benchmarks."""
    parser.addoption("--full", action="store_true", help="measure all shapes and dtypes, not only the quick ones")
    parser.addoption("--device", default=None, help="device to measure on; default: cuda if available, else cpu")


def pytest_configure(config: pytest.Config) -> None:
    """Add the markers, and make a fallback to plain PyTorch an error, because the wrong code would be timed."""
    config.addinivalue_line("filterwarnings", "error::retinanet_ops.FallbackWarning")
    config.addinivalue_line("markers", "full: measured with --full only")
    config.addinivalue_line("markers", "cuda: measured on a GPU only")
    config.addinivalue_line("markers", "last: measured after all other rows, because it changes the process")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip rows that need --full or a GPU, and move rows that change the process to the end."""
    items.sort(key=lambda item: item.get_closest_marker("last") is not None)
    for item in items:
        if item.get_closest_marker("cuda") and _device_of(config).type != "cuda":
            item.add_marker(pytest.mark.skip(reason="measured on a GPU only"))
        if item.get_closest_marker("full") and not config.getoption("--full"):
            item.add_marker(pytest.mark.skip(reason="measured with --full only"))


def _device_of(config: pytest.Config) -> torch.device:
    return torch.device(config.getoption("--device") or ("cuda" if torch.cuda.is_available() else "cpu"))


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """Return the device to measure on."""
    return _device_of(request.config)


@pytest.fixture
def compare(request: pytest.FixtureRequest, benchmark: Any, device: torch.device) -> Comparison:
    """Return a function that checks one row of a benchmark and times it."""
    torch.manual_seed(0)
    return Comparison(benchmark, device, group=request.node.name)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Describe the device and the versions in the JSON."""
    device = _device_of(config)
    cuda = device.type == "cuda"
    machine_info["retinanet_ops"] = retinanet_ops.build_info()
    machine_info["torch"] = torch.__version__
    machine_info["device"] = torch.cuda.get_device_name(device) if cuda else platform.processor() or platform.machine()
    machine_info["cpu_capability"] = _library.cpu_capability()
    machine_info["threads"] = torch.get_num_threads()
    machine_info["copy_bandwidth_bytes_per_s"] = copy_bandwidth(device)


def pytest_benchmark_update_json(output_json: dict[str, Any]) -> None:
    """Remove names of the host and the branch, and the times of single rounds, from the JSON."""
    info = output_json["machine_info"]
    for name in ("node", "release", "python_build"):
        info.pop(name, None)
    info["cpu"] = {name: info["cpu"].get(name) for name in ("brand_raw", "arch", "count", "hz_advertised_friendly")}
    output_json["commit_info"] = {name: output_json["commit_info"].get(name) for name in ("id", "time", "dirty")}
    for row in output_json["benchmarks"]:
        row["stats"].pop("data", None)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print each group, with the ratio of each row's median to that of our row."""
    session = getattr(config, "_benchmarksession", None)
    groups = defaultdict(list)
    for row in session.benchmarks if session else ():
        if not row.has_error and row.stats.rounds:
            groups[row.group].append(row)
    for group, rows in groups.items():
        ours = next((row.stats.median for row in rows if row.extra_info["row"] == "ours"), None)
        terminalreporter.write_sep("-", group)
        for row in rows:
            info = row.extra_info
            ratio = f"{row.stats.median / ours:8.2f} x ours" if ours else ""
            share = f"{info['copy_share']:6.1%} of copy" if info["copy_share"] else " " * 14
            resident = info["peak_resident_bytes"]
            process = f" ({resident / 2**20:.1f} of the process)" if resident is not None else ""
            turns = f"  rival in turns: {info['rival_ratio']:.2f}" if "rival_ratio" in info else ""
            terminalreporter.write_line(
                f"{info['row']:<22}{row.stats.median * 1e3:10.3f} ms  IQR {row.stats.iqr * 1e3:8.3f}  {share}"
                f"  {info['peak_extra_bytes'] / 2**20:9.1f} MiB extra{process}  {ratio}{turns}"
            )
