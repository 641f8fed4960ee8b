"""The compiled kernels: loading them, and information about what was built.

Importing this module registers the operators (`torch.ops.retinanet_ops`) with their CPU kernels, and the CUDA
kernels if the installed torch has the CUDA major version that they were built for. It never initialises CUDA.
"""

import ctypes
import json
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


def _load_cpu(build: dict[str, Any]) -> None:
    """Register the operators and their CPU kernels."""
    try:
        torch.ops.load_library(str(FOLDER / "_C.so"))
    except OSError as error:
        raise ImportError(
            f"the kernels (for torch >= {build['torch_target']}, built with {build['torch']}) do not load "
            f"into torch {torch.__version__}; reinstall retinanet-ops ({error})"
        ) from error


def _cuda_obstacle(build: dict[str, Any], torch_version: str, torch_cuda: str | None) -> str | None:
    """Return why this build's CUDA kernels do not work with a torch, and the remedy; None if they do."""
    if build["cuda"] is None:
        return (
            f"retinanet-ops was built without its CUDA kernels ({build['cuda_omitted']}); "
            "reinstall it with RETINANET_OPS_CUDA=1"
        )
    major = build["cuda"].split(".")[0]
    if torch_cuda is None:
        return f"torch {torch_version} is built without CUDA; install a build of torch for CUDA {major}"
    if torch_cuda.split(".")[0] != major:
        return (
            f"retinanet-ops was built for CUDA {build['cuda']} but torch {torch_version} for CUDA {torch_cuda}; "
            f"install a build of torch for CUDA {major}, or build retinanet-ops for this torch: "
            "`pip install 'setuptools>=77' ninja && pip install --no-build-isolation .` in its source tree"
        )
    return None


def _load_cuda(build: dict[str, Any]) -> str | None:
    """Register the CUDA kernels; return None, or the reason why they are not available."""
    obstacle = _cuda_obstacle(build, torch.__version__, torch.version.cuda)
    if obstacle is None:
        try:
            torch.ops.load_library(str(FOLDER / "_cuda.so"))
        except OSError as error:
            return f"_cuda.so does not load into torch {torch.__version__}; reinstall retinanet-ops ({error})"
    return obstacle


_BUILD = _read_build()
_load_cpu(_BUILD)
_CUDA_MISSING = _load_cuda(_BUILD)


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
        A dictionary with the keys
            version: version of retinanet-ops;
            torch: version of the torch whose headers were used;
            torch_target: oldest version of torch that the libraries load into;
            compiler: first line of the C++ compiler's `--version`;
            debug: whether it was built with DEBUG=1;
            cuda: CUDA version of the CUDA kernels, None if they were not built;
            cuda_archs: the compute capabilities compiled for, as in TORCH_CUDA_ARCH_LIST, None without CUDA;
            cuda_omitted: why the CUDA kernels were not built, None if they were;
            cuda_loaded: whether they are loaded into this process;
            cuda_missing: why they are not, with the remedy, None if they are.
    """
    return {**_BUILD, "cuda_loaded": _CUDA_MISSING is None, "cuda_missing": _CUDA_MISSING}
