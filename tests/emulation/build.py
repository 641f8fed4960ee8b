"""Builds the ops for `pytest --backend emulated`: the kernels of csrc/*_cuda.cu, compiled by the C++ compiler.

`build/emulated/<variant>/` receives `retinanet_ops/`, a package like the real one (its Python files are links) whose
`_C.so` holds the CUDA kernels, registered for CPU tensors, and the emulator's Python module; and `planted_bugs.so`,
with which the emulator itself is tested. Only what changed is compiled.

Usage: python tests/emulation/build.py [plain|asan|races|coverage|ucontext ...]
"""

import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
import torch

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
BUILD = ROOT / "build" / "emulated"
TORCH = Path(torch.__file__).resolve().parent

SANITIZE = "-fsanitize=address,undefined -fno-sanitize-recover=undefined"
# Flags of the kernels, of all else, and of the link.
VARIANTS = {
    "plain": ("-O2", "-O2", ""),
    # The strict bounds also know those of an array at the end of a struct; Python's headers do not respect them.
    "asan": (
        f"-O1 {SANITIZE} -fsanitize=bounds-strict -fno-sanitize-recover=bounds-strict",
        f"-O1 {SANITIZE}",
        "-fsanitize=address,undefined",
    ),
    # Not linked to libtsan: see tracer.cpp. Scalar replacement would split accesses of 16 bytes.
    "races": ("-O1 -fno-tree-sra -fsanitize=thread", "-O2 -DEMULATOR_TRACES", ""),
    "coverage": ("-O0 --coverage", "-O2", "--coverage"),
    # The fibers of other processors than x86-64; of the kernels, only the planted bugs are built.
    "ucontext": ("-O2", "-O2 -DEMULATOR_UCONTEXT", ""),
}


class BuildError(Exception):
    """The emulated ops cannot be built; the message says why and what to do."""


def toolkit_headers() -> Path:
    """The CUDA toolkit's headers, of CUDA_HOME or of PyPI's wheels (as setup.py finds them); no nvcc is needed."""
    if home := os.environ.get("CUDA_HOME"):
        candidates = [Path(home, "include")]
    else:
        spec = importlib.util.find_spec("nvidia")
        folders = spec.submodule_search_locations or () if spec else ()
        candidates = sorted((p for f in folders for p in Path(f).glob("cu*/include")), reverse=True)
    for candidate in candidates:
        if (candidate / "cuda_runtime.h").exists():
            return candidate
    raise BuildError(
        f"no CUDA toolkit headers (cuda_runtime.h) in {', '.join(map(str, candidates)) or 'any installed wheel'}; "
        "`pip install nvidia-cuda-runtime nvidia-cuda-crt` or set CUDA_HOME"
    )


def compile_flags() -> str:
    """Flags of every file. -ffp-contract=off as in setup.py; -fno-strict-aliasing for casts that nvcc accepts."""
    flags = "-std=c++20 -g -fPIC -fvisibility=hidden -fno-gnu-unique -ffp-contract=off -fno-strict-aliasing -Wall"
    folders = [HERE, ROOT / "csrc"]
    torch_headers = [TORCH / "include", TORCH / "include" / "torch" / "csrc" / "api" / "include"]
    system = [toolkit_headers(), *torch_headers, pybind11.get_include(), sysconfig.get_path("include")]
    return " ".join(
        [
            flags,
            "-Wno-unknown-pragmas -DTORCH_TARGET_VERSION=0x020a000000000000",
            *(f"-I{shlex.quote(str(f))}" for f in folders),
            *(f"-isystem {shlex.quote(str(f))}" for f in system),
        ]
    )


def write_ninja(variant: str, folder: Path) -> None:
    """Write build.ninja of a variant."""
    kernel_flags, host_flags, link_flags = VARIANTS[variant]
    lines = [
        f"cxx = {os.environ.get('CXX', 'c++')}",
        f"flags = {compile_flags()}",
        f"torch = -L{TORCH / 'lib'} -ltorch_cpu -lc10",
        "rule compile",
        "  command = $cxx $flags $variant -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = $in",
        "rule link",
        f"  command = $cxx -shared $in {link_flags} $libraries -o $out",
    ]

    def compiled(source: Path, flags: str) -> str:
        target = f"{source.name}.o"
        lines.extend([f"build {target}: compile {source}", f"  variant = {flags}"])
        return target

    def library(target: str, objects: list[str], libraries: str) -> None:
        lines.extend([f"build {target}: link {' '.join(objects)}", f"  libraries = {libraries}"])

    emulator = [HERE / f"{name}.cpp" for name in ("fiber", "scheduler", "bindings")]
    emulator += [HERE / "tracer.cpp"] if variant == "races" else []
    common = [compiled(source, host_flags) for source in emulator]
    ops = [
        compiled(source, f"{kernel_flags} -include {HERE / 'ops_shim.h'} -x c++")
        for source in sorted((ROOT / "csrc").glob("*_cuda.cu"))
    ]
    ops += [compiled(source, host_flags) for source in (ROOT / "csrc" / "library.cpp", HERE / "ops_module.cpp")]
    bugs = [
        compiled(HERE / "bugs.cu", f"{kernel_flags} -include {HERE / 'cuda_shim.h'} -x c++"),
        compiled(HERE / "bugs_module.cpp", host_flags),
    ]
    library("retinanet_ops/_C.so", common + ops, "$torch")
    library("planted_bugs.so", common + bugs, "")
    if variant == "ucontext":
        lines.append("default planted_bugs.so")
    text = "\n".join(lines) + "\n"
    file = folder / "build.ninja"
    if not file.exists() or file.read_text() != text:
        file.write_text(text)


def link_package(package: Path) -> None:
    """Fill the package's folder with links to the real one's files, and say what was built."""
    package.mkdir(parents=True, exist_ok=True)
    paths = (ROOT / "retinanet_ops").iterdir()
    sources = {path.name: path for path in paths if path.suffix in (".py", ".typed") or (path / "__init__.py").exists()}
    for link in package.iterdir():
        if link.is_symlink() and link.name not in sources:
            link.unlink()
    for name, source in sources.items():
        if not (package / name).exists():
            (package / name).symlink_to(source)
    info = {
        "version": "0",
        "torch": torch.__version__,
        "torch_target": "2.10",
        "compiler": "emulation of CUDA",
        "debug": False,
        "cuda": None,
        "cuda_archs": None,
        "cuda_omitted": "these are the CUDA kernels, emulated on the CPU",
    }
    (package / "_build_info.json").write_text(json.dumps(info, indent=2) + "\n")


def build(variant: str) -> Path:
    """Build a variant and return its folder, to be put on sys.path."""
    folder = BUILD / variant
    link_package(folder / "retinanet_ops")
    write_ninja(variant, folder)
    beside_python = Path(sys.executable).parent / "ninja"
    ninja = str(beside_python) if beside_python.exists() else shutil.which("ninja")
    if ninja is None:
        raise BuildError("no ninja; `pip install ninja`")
    jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
    result = subprocess.run([ninja, "-C", str(folder), *jobs], capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise BuildError(f"building the emulated kernels failed:\n{result.stdout}{result.stderr}")
    return folder


def main() -> None:
    """Build the variants named on the command line, by default all."""
    unknown = set(sys.argv[1:]) - set(VARIANTS)
    if unknown:
        sys.exit(f"no such variant: {', '.join(sorted(unknown))}; there are {', '.join(VARIANTS)}")
    try:
        for variant in sys.argv[1:] or VARIANTS:
            print(build(variant))
    except BuildError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
