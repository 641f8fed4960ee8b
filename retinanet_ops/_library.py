"""The compiled kernels: loading them, and information about what was built.

Importing this module registers the operators (`torch.ops.retinanet_ops`) with their CPU kernels, and the CUDA
kernels for the CUDA major version of the installed torch, if they were built. It never initialises CUDA.
"""

import copy
import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent


def _read_build() -> dict[str, Any]:
    """Return the build information that setup.py wrote beside the libraries."""
    try:
        return json.loads((FOLDER / "_build_info.json").read_text())
    except FileNotFoundError:
        if (FOLDER.parent / "setup.py").exists():
            remedy = (
                "it is the source tree. After `pip install .`, run Python in another folder to import the installed "
                "package, or build in place with `pip install --no-build-isolation -e .`"
            )
        else:
            remedy = "install the package again"
        raise ImportError(f"{FOLDER} holds no built kernels: {remedy}") from None


def _load_cpu(build: dict[str, Any]) -> str | None:
    """Register the operators and their CPU kernels; return None, or the reason why they do not load."""
    try:
        torch.ops.load_library(str(FOLDER / "_C.so"))
    except OSError as error:
        return (
            f"the kernels (for torch >= {build['torch_target']}, built with {build['torch']}) do not load "
            f"into torch {torch.__version__}; reinstall retinanet-ops ({error})"
        )
    return None


def cuda_major(torch_cuda: str | None) -> str:
    """Return the major version of torch's CUDA, which names the library to load, "" if torch is built without CUDA."""
    return (torch_cuda or "").split(".")[0]


def _cuda_obstacle(build: dict[str, Any], torch_version: str, torch_cuda: str | None) -> str | None:
    """Return why no CUDA kernels of this build work with a torch, and the remedy; None if some do."""
    builds = build.get("cuda_builds")
    if builds is None:
        return f"the libraries in {FOLDER} are older than this version of retinanet-ops; build or install it again"
    if not builds:
        return (
            f"retinanet-ops was built without its CUDA kernels ({build['cuda_omitted']}); "
            "reinstall it with RETINANET_OPS_CUDA=1"
        )
    majors = " or ".join(builds)
    if torch_cuda is None:
        return f"torch {torch_version} is built without CUDA; install a build of torch for CUDA {majors}"
    if cuda_major(torch_cuda) not in builds:
        versions = " and ".join(cuda["version"] for cuda in builds.values())
        return (
            f"retinanet-ops was built for CUDA {versions} but torch {torch_version} for CUDA {torch_cuda}; "
            f"install a build of torch for CUDA {majors}, or build retinanet-ops for this torch: "
            "`pip install 'setuptools>=77' ninja && pip install --no-build-isolation .` in its source tree"
        )
    return None


def _load_cuda(build: dict[str, Any]) -> str | None:
    """Register the CUDA kernels for torch's CUDA version; return None, or the reason why they are not available."""
    if obstacle := _cuda_obstacle(build, torch.__version__, torch.version.cuda):
        return obstacle
    name = f"_cuda{cuda_major(torch.version.cuda)}.so"
    try:
        torch.ops.load_library(str(FOLDER / name))
    except OSError as error:
        return f"{name} does not load into torch {torch.__version__}; reinstall retinanet-ops ({error})"
    return None


_BUILD = _read_build()
_CPU_MISSING = _load_cpu(_BUILD)
_CUDA_MISSING = _CPU_MISSING or _load_cuda(_BUILD)


def require_cuda() -> None:
    """Raise if the CUDA kernels are not loaded.

    Raises:
        RuntimeError: The CUDA kernels are not loaded; the message names the reason and the remedy in one line.
    """
    if _CUDA_MISSING is not None:
        raise RuntimeError(f"no CUDA kernels: {_CUDA_MISSING}")


def kernels_available(device_type: str) -> bool:
    """Return whether the operators have kernels for devices of this type.

    A CUDA tensor without CUDA kernels is an error and does not fall back, so that a slow path is never silent.

    Args:
        device_type: Type of the device, as in `tensor.device.type`.

    Returns:
        True for "cpu", "meta" and "cuda". False for every other type, whose tensors fall back to `reference`.

    Raises:
        RuntimeError: The type is "cuda" and the CUDA kernels are not loaded.
    """
    if device_type == "cuda":
        require_cuda()
    return device_type in ("cpu", "cuda", "meta")


def cpu_capability() -> str:
    """Return the instruction set of the vectorised CPU kernels: "default", "avx2" or "avx512".

    It is the best set that the machine supports, up to the one that PyTorch's environment variable ATEN_CPU_CAPABILITY
    names.
    """
    name = ctypes.CDLL(str(FOLDER / "_C.so")).retinanet_ops_cpu_capability
    name.restype = ctypes.c_char_p
    return str(name().decode())


def build_info() -> dict[str, Any]:
    """Return what was built and what the installed torch can use.

    Returns:
        A dictionary with these keys.

        - `version`: version of retinanet-ops
        - `torch`: version of the torch whose headers were used
        - `torch_target`: oldest version of torch that the libraries load into
        - `compiler`: first line of the C++ compiler's `--version`
        - `debug`: whether it was built with DEBUG=1
        - `cuda_builds`: the CUDA libraries by their CUDA major version, such as "13", each a dictionary with the keys
          `version` (of its CUDA toolkit) and `archs` (the compute capabilities compiled for, as in
          TORCH_CUDA_ARCH_LIST); empty if none was built
        - `cuda_omitted`: why no CUDA library was built, None if one was
        - `cuda_loaded`: whether the library for torch's CUDA major version is loaded into this process
        - `cuda_missing`: why it is not, with the remedy, None if it is
    """
    return {
        "cuda_builds": {},
        **copy.deepcopy(_BUILD),
        "cuda_loaded": _CUDA_MISSING is None,
        "cuda_missing": _CUDA_MISSING,
    }


def _is_diagnosis() -> bool:
    """Return whether this import is the first step of `python -m retinanet_ops`."""
    # Until Python has found the module to run, "-m" stands in sys.argv for the module and what precedes it.
    module = sys.orig_argv[-len(sys.argv) :][:1]
    return sys.argv[:1] == ["-m"] and module in ([__package__], [f"-m{__package__}"])


if _CPU_MISSING is not None:
    # The other modules need the operators, so the package cannot be imported. The diagnosis can do without them.
    if _is_diagnosis():
        from . import __main__ as diagnosis

        sys.exit(diagnosis.run())
    raise ImportError(_CPU_MISSING)
