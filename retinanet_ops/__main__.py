"""Diagnosis of the installation: what was built, what this torch and this machine can use, and how to fix problems.

Run it with `python -m retinanet_ops`, or with `--json` for a form that programs can read and bug reports can hold. The
exit code is 0 if every operator has a CPU kernel and, with a CUDA build of torch, a CUDA kernel that runs on every
visible GPU. Otherwise it is 1. Where `_C.so` does not load, importing the package raises an error, except for this
command: `_library.py` runs this module before it raises.
"""

import argparse
import json
import os
import platform
import sys
from typing import Any

import torch
from torch.utils import collect_env

from . import _library


def _runs_on(archs: str, capability: tuple[int, int]) -> bool:
    """Return whether code for these archs (as in TORCH_CUDA_ARCH_LIST) runs on a GPU of that compute capability."""
    for arch in archs.replace(" ", ";").split(";"):
        major, minor = map(int, arch.rstrip("af").removesuffix("+PTX").split("."))
        if major == capability[0] and minor <= capability[1]:
            return True
        if arch.endswith("+PTX") and (major, minor) <= capability:
            return True
    return False


def _libraries(info: dict[str, Any]) -> list[dict[str, Any]]:
    """Return each library in the package: its name, for CUDA what it is for, whether it is loaded and why not."""
    missing = _library._CPU_MISSING
    libraries: list[dict[str, Any]] = [{"name": "_C.so", "loaded": missing is None, "missing": missing}]
    for major, cuda in info["cuda_builds"].items():
        missing = info["cuda_missing"]
        if torch.version.cuda and major != _library.cuda_major(torch.version.cuda):
            missing = f"torch {torch.__version__} is for CUDA {torch.version.cuda}"
        libraries.append({"name": f"_cuda{major}.so", "cuda": cuda, "loaded": missing is None, "missing": missing})
    return libraries


def _gpus(archs: str) -> list[dict[str, Any]]:
    """Return name and compute capability of each visible GPU, and whether the CUDA kernels run on it."""
    gpus = []
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        version = ".".join(map(str, capability))
        runs = _runs_on(archs, capability)
        gpus.append({"name": torch.cuda.get_device_name(index), "compute_capability": version, "supported": runs})
    return gpus


def _operators(keys: list[str]) -> dict[str, dict[str, bool]]:
    """Return for each operator whether it has a kernel for each dispatch key."""
    names = torch._C._dispatch_get_all_op_names()
    operators = sorted({name.split(".")[0] for name in names if name.startswith("retinanet_ops::")})
    has_kernel = torch._C._dispatch_has_computed_kernel_for_dispatch_key
    return {operator: {key: has_kernel(operator, key) for key in keys} for operator in operators}


def diagnose() -> dict[str, Any]:
    """Return what was built, what this torch and this machine can use, and the problems with their remedies."""
    info = _library.build_info()
    report: dict[str, Any] = {
        "folder": str(_library.FOLDER),
        "build": info,
        "libraries": _libraries(info),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "glibc": platform.libc_ver()[1] or None,
        "nvidia_driver": collect_env.get_nvidia_driver_version(collect_env.run),
        "cpu": {
            "capability": _library.cpu_capability() if _library._CPU_MISSING is None else None,
            "torch_capability": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
        },
        "gpus": [],
        "operators": _operators(["CPU", "CUDA"] if info["cuda_loaded"] else ["CPU"]),
    }
    problems = []
    if _library._CPU_MISSING is not None:
        problems.append(_library._CPU_MISSING)
    elif info["cuda_loaded"]:
        archs = info["cuda_builds"][_library.cuda_major(torch.version.cuda)]["archs"]
        report["gpus"] = _gpus(archs)
        for index, gpu in enumerate(report["gpus"]):
            version = gpu["compute_capability"]
            if not gpu["supported"]:
                problems.append(
                    f"the CUDA kernels ({archs}) do not run on GPU {index} ({version}): "
                    f'build retinanet-ops from source with TORCH_CUDA_ARCH_LIST="{version}"'
                )
    elif torch.version.cuda is not None:
        problems.append(info["cuda_missing"])
    for operator, kernels in report["operators"].items():
        problems += [f"{operator} has no {key} kernel: reinstall retinanet-ops" for key in kernels if not kernels[key]]
    return {**report, "problems": problems}


def _print_text(report: dict[str, Any]) -> None:
    """Print the diagnosis for people."""
    build, cpu = report["build"], report["cpu"]
    print(f"retinanet-ops {build['version']} in {report['folder']}")
    print(f"  built with     torch {build['torch']}, {build['compiler']}{', DEBUG=1' if build['debug'] else ''}")
    print(f"  serves         torch >= {build['torch_target']}")
    for library in report["libraries"]:
        cuda = f"CUDA {library['cuda']['version']} for {library['cuda']['archs']}; " if "cuda" in library else ""
        print(f"  {library['name']:<14} {cuda}{'loaded' if library['loaded'] else 'not loaded: ' + library['missing']}")
    if not build["cuda_builds"]:
        print(f"  CUDA kernels   not built: {build['cuda_omitted']}")

    print(f"torch {report['torch']}, Python {report['python']}, {report['platform']}")
    print(
        f"  CPU            {cpu['torch_capability']}, {cpu['threads']} threads; "
        f"our kernels {'use ' + cpu['capability'] if cpu['capability'] else 'are not loaded'}\n"
        f"  glibc          {report['glibc'] or 'none'}\n"
        f"  NVIDIA driver  {report['nvidia_driver'] or 'none found'}"
    )
    if build["cuda_loaded"]:
        for index, gpu in enumerate(report["gpus"]):
            print(f"  GPU {index}          {gpu['name']}, compute capability {gpu['compute_capability']}")
        if not report["gpus"]:
            print("  GPU            none visible")

    operators = report["operators"]
    width = max(map(len, operators), default=0)
    keys = ["CPU", "CUDA"] if build["cuda_loaded"] else ["CPU"]
    if operators:
        print(f"{'operators':<{width}}  {'  '.join(keys)}")
    for operator, kernels in operators.items():
        row = "  ".join(f"{'yes' if kernels[key] else 'NO':<{len(key)}}" for key in keys)
        print(f"{operator:<{width}}  {row}".rstrip())
    for problem in report["problems"]:
        print(f"PROBLEM: {problem}")
    if not report["problems"]:
        print("No problem found.")


def main(as_json: bool) -> int:
    """Print the diagnosis and return the exit code."""
    report = diagnose()
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        _print_text(report)
    return 1 if report["problems"] else 0


def run() -> int:
    """Print the diagnosis and return the exit code, even if the reader of the output ends early (`| head`)."""
    parser = argparse.ArgumentParser(
        prog="python -m retinanet_ops", description="Say what this installation of retinanet-ops can use, and why not."
    )
    parser.add_argument("--json", action="store_true", help="print JSON, for programs and bug reports")
    arguments = parser.parse_args()
    try:
        code = main(arguments.json)
        sys.stdout.flush()
    except BrokenPipeError:
        # Python would report the closed pipe once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = main(arguments.json)
    return code


if __name__ == "__main__":
    sys.exit(run())
