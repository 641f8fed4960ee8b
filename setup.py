"""Build script of the kernel libraries, `retinanet_ops/_C.so` (CPU) and `retinanet_ops/_cuda<MAJOR>.so`.

MAJOR is the major version of the CUDA toolkit. tools/wheels/merge.py puts the CUDA libraries of several builds into one
wheel. All are plain shared libraries on LibTorch's stable ABI, without the Python C API. They are loaded with
`torch.ops.load_library`, so one wheel serves every Python and every torch >= 2.10. Metadata is in pyproject.toml.

Environment variables:
    RETINANET_OPS_CUDA: 0 omits the CUDA library, 1 makes it an error if that library cannot be built.
    CUDA_HOME: CUDA toolkit to build with. Default: the toolkit of PyPI's CUDA wheels.
    TORCH_CUDA_ARCH_LIST: GPU architectures. Default: those of DEFAULT_ARCHS that nvcc knows, and PTX of the last.
    MAX_JOBS: Number of files that are compiled at a time.
    DEBUG: 1 builds without optimisation and with debug information.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import torch
from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel

ROOT = Path(__file__).resolve().parent
TORCH_TARGET = (2, 10)
DEFAULT_ARCHS = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
DEBUG = os.environ.get("DEBUG", "0") == "1"


class NoCuda(Exception):
    """The CUDA library cannot be built. The message states the reason and the remedy."""


def run(*command: str | Path) -> str:
    """Run a command that must succeed and return its standard output."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def toolkit_wheels() -> Path | None:
    """Return the toolkit that PyPI's CUDA wheels install into the package `nvidia`, None if it has no compiler."""
    spec = importlib.util.find_spec("nvidia")
    major = torch.version.cuda.split(".")[0]
    roots = [Path(root, f"cu{major}") for root in spec.submodule_search_locations or ()] if spec else []
    return next((root for root in roots if (root / "bin" / "nvcc").exists()), None)


def find_cuda() -> tuple[Path, str]:
    """Return folder and version of the toolkit, chosen by CUDA_HOME or torch's CUDA version, never by a GPU."""
    if torch.version.cuda is None:
        raise NoCuda(f"torch {torch.__version__} is built without CUDA; install a CUDA build of torch")
    major = torch.version.cuda.split(".")[0]
    if user_home := os.environ.get("CUDA_HOME"):
        home = Path(user_home)
        if not (home / "bin" / "nvcc").exists():
            raise NoCuda(f"CUDA_HOME={home} has no bin/nvcc; point it at a CUDA {major} toolkit or unset it")
    elif (home := toolkit_wheels()) is None:
        remedy = (
            f"pip install 'cuda-toolkit[nvcc,cccl]=={torch.version.cuda}.*'"
            if int(major) >= 13
            else f"set CUDA_HOME to a CUDA {major} toolkit (the wheels of CUDA {major} bring no nvcc)"
        )
        raise NoCuda(f"no nvcc found for torch {torch.__version__} (CUDA {torch.version.cuda}); {remedy}")
    version = re.search(r"release (\d+\.\d+)", run(home / "bin" / "nvcc", "--version")).group(1)
    if version.split(".")[0] != major:
        raise NoCuda(f"{home} is CUDA {version} but torch {torch.__version__} needs CUDA {major}; set CUDA_HOME")
    return home, version


def choose_cuda() -> tuple[Path | None, str]:
    """Return folder and version of the toolkit, or None and the reason why the CUDA library is omitted."""
    wish = os.environ.get("RETINANET_OPS_CUDA", "")
    if wish not in ("", "0", "1"):
        sys.exit(f"RETINANET_OPS_CUDA must be 0, 1 or unset, got {wish!r}")
    if wish == "0":
        return None, "built with RETINANET_OPS_CUDA=0"
    try:
        return find_cuda()
    except NoCuda as reason:
        if wish == "1":
            sys.exit(f"RETINANET_OPS_CUDA=1, but {reason}")
        print(f"retinanet-ops: building WITHOUT the CUDA kernels: {reason}", file=sys.stderr)
        return None, str(reason)


def arch_list(nvcc: Path) -> str:
    """Return TORCH_CUDA_ARCH_LIST or its default: every arch of DEFAULT_ARCHS that nvcc knows, and PTX of the last."""
    if chosen := os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return chosen
    known = set(run(nvcc, "--list-gpu-arch").split())
    return ";".join(a for a in DEFAULT_ARCHS if f"compute_{a.replace('.', '')}" in known) + "+PTX"


CUDA_HOME, CUDA_NOTE = choose_cuda()
CUDA_MAJOR = CUDA_NOTE.split(".")[0] if CUDA_HOME else None
CUDA_LIBRARY = f"_cuda{CUDA_MAJOR}" if CUDA_HOME else None
if CUDA_HOME:
    # cpp_extension reads CUDA_HOME when it is imported. Without CUDA_HOME it would take the first nvcc on PATH.
    os.environ["CUDA_HOME"] = str(CUDA_HOME)
    os.environ["TORCH_CUDA_ARCH_LIST"] = arch_list(CUDA_HOME / "bin" / "nvcc")

from torch.utils.cpp_extension import BuildExtension, get_cxx_compiler, include_paths, library_paths  # noqa: E402


def compile_flags() -> dict[str, list[str]]:
    """Return the flags of the C++ compiler and of nvcc."""
    version = f"-DTORCH_TARGET_VERSION=0x{TORCH_TARGET[0]:02x}{TORCH_TARGET[1]:02x}000000000000"
    common = ["-std=c++20", version, *(["-O0", "-g"] if DEBUG else ["-O3"])]
    # -ffp-contract=off forbids contraction to FMA, because the IoU of two boxes must have the same bits on CPU and GPU
    # (csrc/common/boxes.h). -fno-math-errno and -fno-trapping-math let the compiler vectorise loops with square roots
    # and selections, and change no result.
    host = [
        "-ffp-contract=off",
        "-fno-math-errno",
        "-fno-trapping-math",
        "-fvisibility=hidden",
        "-Wall",
        f"-ffile-prefix-map={ROOT}=.",
    ]
    host += [] if DEBUG else ["-g0"]  # overrides the -g of Python's own CFLAGS
    host += [f"-ffile-prefix-map={path}=torch/include" for path in include_paths()[:1]]
    nvcc = ["-DUSE_CUDA", "--expt-relaxed-constexpr", "--threads=2", *(["-lineinfo"] if DEBUG else [])]
    if CUDA_MAJOR and int(CUDA_MAJOR) >= 13:
        nvcc += ["--compress-mode=size"]  # every driver of CUDA 13 can load it
    return {"cxx": common + host, "nvcc": common + nvcc + [f"-Xcompiler={flag}" for flag in host]}


def library(name: str, pattern: str, device_type: str, libraries: list[str]) -> Extension:
    """Return the extension of one shared library, built from the sources in csrc/ that match the pattern."""
    linux = ["-Wl,--no-undefined", "-Wl,--as-needed", "-Wl,--exclude-libs,ALL"] if sys.platform == "linux" else []
    return Extension(
        f"retinanet_ops.{name}",
        sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(f"csrc/**/{pattern}")),
        include_dirs=include_paths(device_type),
        library_dirs=library_paths(device_type),
        libraries=libraries,
        extra_compile_args=compile_flags(),
        extra_link_args=linux,
        language="c++",
    )


class BuildLibraries(BuildExtension.with_options(no_python_abi_suffix=True, use_ninja=True)):
    """The build_ext command, which builds the libraries and writes _build_info.json beside them."""

    def finalize_options(self):
        """Keep the object files in one folder, so that the next build of any kind compiles only changed files."""
        super().finalize_options()
        self.build_temp = str(ROOT / "build" / "objects")

    def run(self):
        """Build the libraries, after removing build information and the other CUDA libraries of an earlier build."""
        targets = {Path(self.build_lib, "retinanet_ops")}
        if self.inplace:
            targets.add(ROOT / "retinanet_ops")
        for target in targets:
            (target / "_build_info.json").unlink(missing_ok=True)
            for old in target.glob("_cuda*.so"):
                if old.stem != CUDA_LIBRARY:
                    old.unlink()
        super().run()
        cuda_builds = {}
        if CUDA_HOME:
            cuda_builds[CUDA_MAJOR] = {"version": CUDA_NOTE, "archs": os.environ["TORCH_CUDA_ARCH_LIST"]}
        info = {
            "version": self.distribution.get_version(),
            "torch": torch.__version__,
            "torch_target": ".".join(map(str, TORCH_TARGET)),
            "compiler": run(get_cxx_compiler(), "--version").splitlines()[0],
            "debug": DEBUG,
            "cuda_builds": cuda_builds,
            "cuda_omitted": None if CUDA_HOME else CUDA_NOTE,
        }
        for target in targets:
            target.mkdir(parents=True, exist_ok=True)
            (target / "_build_info.json").write_text(json.dumps(info, indent=2) + "\n")


class PlatformWheel(bdist_wheel):
    """The bdist_wheel command, which makes one wheel for every Python 3: the libraries do not use the Python C API."""

    def get_tag(self):
        """Return the tag py3-none-<platform>."""
        return "py3", "none", super().get_tag()[2]


libraries = [library("_C", "*.cpp", "cpu", ["c10", "torch_cpu"])]
if CUDA_HOME:
    cuda_libraries = ["c10", "torch_cpu", "torch_cuda", "cudart_static", "dl", "rt", "pthread"]
    libraries.append(library(CUDA_LIBRARY, "*_cuda.cu", "cuda", cuda_libraries))

setup(ext_modules=libraries, cmdclass={"build_ext": BuildLibraries, "bdist_wheel": PlatformWheel})
