"""Diagnosis of the installation: what was built, what this torch and this machine can use, and how to fix problems.

Run it with `python -m retinanet_ops`. The exit code is 0 if every operator has a CPU kernel and, with a CUDA build of
torch, a CUDA kernel that runs on every visible GPU. Otherwise it is 1.
"""

import os
import platform
import sys

import torch

from retinanet_ops import _library


def _runs_on(archs: str, capability: tuple[int, int]) -> bool:
    """Return whether code for these archs (as in TORCH_CUDA_ARCH_LIST) runs on a GPU of that compute capability."""
    for arch in archs.replace(" ", ";").split(";"):
        major, minor = map(int, arch.rstrip("af").removesuffix("+PTX").split("."))
        if major == capability[0] and minor <= capability[1]:
            return True
        if arch.endswith("+PTX") and (major, minor) <= capability:
            return True
    return False


def _gpu_problems(archs: str) -> list[str]:
    """Print the visible GPUs; return one line for each GPU on which the kernels do not run."""
    problems = []
    for index in range(torch.cuda.device_count()):
        name, capability = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
        version = ".".join(map(str, capability))
        print(f"  GPU {index}          {name}, compute capability {version}")
        if not _runs_on(archs, capability):
            problems.append(
                f"the CUDA kernels ({archs}) do not run on GPU {index} ({version}): "
                f'build retinanet-ops from source with TORCH_CUDA_ARCH_LIST="{version}"'
            )
    if not torch.cuda.device_count():
        print("  GPU            none visible")
    return problems


def _operator_problems(keys: list[str]) -> list[str]:
    """Print which operators have a kernel for each dispatch key; return one line for each missing kernel."""
    problems = []
    names = torch._C._dispatch_get_all_op_names()
    operators = sorted({name.split(".")[0] for name in names if name.startswith("retinanet_ops::")})
    width = max(map(len, operators), default=0)
    print(f"{'operators':<{width}}  {'  '.join(keys)}")
    for operator in operators:
        row = f"{operator:<{width}}"
        for key in keys:
            present = torch._C._dispatch_has_computed_kernel_for_dispatch_key(operator, key)
            row += f"  {'yes' if present else 'NO':<{len(key)}}"
            if not present:
                problems.append(f"{operator} has no {key} kernel: reinstall retinanet-ops")
        print(row.rstrip())
    return problems


def main() -> int:
    """Print the diagnosis and return the exit code."""
    info = _library.build_info()
    cuda_torch = torch.version.cuda is not None
    problems = []

    print(f"retinanet-ops {info['version']} in {_library.FOLDER}")
    print(f"  built with     torch {info['torch']}, {info['compiler']}{', DEBUG=1' if info['debug'] else ''}")
    print(f"  serves         torch >= {info['torch_target']}")
    for cuda in info["cuda_builds"].values():
        print(f"  CUDA kernels   CUDA {cuda['version']} for {cuda['archs']}")
    if not info["cuda_builds"]:
        print(f"  CUDA kernels   not built: {info['cuda_omitted']}")
    print(f"  CUDA loaded    {'yes' if info['cuda_loaded'] else 'no: ' + info['cuda_missing']}")

    print(f"torch {torch.__version__}, Python {platform.python_version()}, {platform.platform()}")
    print(
        f"  CPU            {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads; "
        f"our kernels use {_library.cpu_capability()}"
    )
    if info["cuda_loaded"]:
        problems += _gpu_problems(info["cuda_builds"][_library.cuda_major(torch.version.cuda)]["archs"])
    elif cuda_torch:
        problems.append(info["cuda_missing"])

    problems += _operator_problems(["CPU", "CUDA"] if info["cuda_loaded"] else ["CPU"])

    for problem in problems:
        print(f"PROBLEM: {problem}")
    if not problems:
        print("No problem found.")
    return 1 if problems else 0


def _run() -> int:
    """Print the diagnosis and return the exit code, even if the reader of the output ends early (`| head`)."""
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:
        # Python would report the closed pipe once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = main()
    return code


if __name__ == "__main__":
    sys.exit(_run())
