"""Builds the ops for `pytest --backend emulated`, with the kernels of csrc/*_cuda.cu compiled by the C++ compiler.

Each folder `build/emulated/<variant>/` contains:

- `retinanet_ops/`, a package like the real one. Its Python files are links. Its `_C.so` holds the CUDA kernels,
  registered for CPU tensors, and the emulator's Python module.
- `planted_bugs.so`, kernels with bugs that test the emulator itself. The variant `cost` has `planted_costs.so`, kernels
  that waste time, in its place.

The libraries of the variant `cost` have a table of weights beside them, which tools/emulator/cost_weights.py makes.

Only changed files are compiled, and files that several variants share are compiled once.

Usage: python -m tools.emulator.build [plain|asan|races|cost|ucontext ...]
"""

import fcntl
import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
BUILD = ROOT / "build" / "emulated"
TORCH = Path(torch.__file__).resolve().parent

SANITIZE = "-fsanitize=address,undefined -fno-sanitize-recover=undefined"
# By variant: compiler flags for the kernels, compiler flags for the emulator, linker flags.
VARIANTS = {
    "plain": ("-O2", "-O2", ""),
    # It counts lines as well, for tools/emulator/line_coverage.py, because one run of the tests takes less than two.
    # bounds-strict also checks arrays at the end of a struct. Python's headers violate it, so only the kernels use it.
    "asan": (
        f"-O1 {SANITIZE} -fsanitize=bounds-strict -fno-sanitize-recover=bounds-strict --coverage",
        f"-O1 {SANITIZE}",
        "-fsanitize=address,undefined --coverage",
    ),
    # tsan_hooks.cpp replaces libtsan, so libtsan is not linked. Scalar replacement would split accesses of 16 bytes.
    "races": ("-O1 -fno-tree-sra -fsanitize=thread", "-O2", ""),
    # The same hooks, and one for each basic block. Vector instructions would count several elements as one.
    "cost": ("-O2 -fno-tree-sra -fno-tree-vectorize -fsanitize=thread -fsanitize-coverage=trace-pc", "-O2", ""),
    # Tests the fibers for processors other than x86-64. Only the planted bugs are built, not the ops.
    "ucontext": ("-O2", "-O2 -DEMULATOR_UCONTEXT", ""),
}

# Debug information with the lines of functions, also of inlined ones, which messages and pages name. That of variables
# and types takes a third of the time of compilation.
LINES = "-g1"

# By variant: files that only it needs.
TRACERS = {"races": ("tracer", "tsan_hooks"), "cost": ("cost_tracer", "tsan_hooks")}


class BuildError(Exception):
    """The emulated ops cannot be built. The message states the reason and the remedy."""


def toolkit_headers() -> Path:
    """Return the folder of the CUDA toolkit's headers, from CUDA_HOME or from PyPI's wheels. nvcc is not needed."""
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
    """Return the compiler flags that all files share.

    -ffp-contract=off is needed for the reason given in setup.py. -fno-strict-aliasing allows casts that nvcc accepts.
    """
    try:
        import pybind11
    except ImportError:
        raise BuildError("no pybind11, which binds the emulator to Python; `pip install pybind11`") from None
    flags = "-std=c++20 -fPIC -fvisibility=hidden -fno-gnu-unique -ffp-contract=off -fno-strict-aliasing -Wall"
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


def ninja_file() -> str:
    """Return the text of build.ninja, which builds the libraries of all variants."""
    lines = [
        f"cxx = {os.environ.get('CXX', 'c++')}",
        f"flags = {compile_flags()}",
        f"torch = -L{TORCH / 'lib'} -ltorch_cpu -lc10",
        "rule compile",
        "  command = $cxx $flags $more -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = $out",
        "rule link",
        "  command = $cxx -shared $in $libraries -o $out",
        "rule weights",
        f"  command = PYTHONPATH={ROOT} {shlex.quote(sys.executable)} -m tools.emulator.cost_weights $in > $out",
    ]
    compiled: dict[tuple[Path, str], str] = {}

    def compile_once(folder: str, source: Path, flags: str) -> str:
        if (source, flags) not in compiled:
            target = compiled[source, flags] = f"{folder}/{source.name}.o"
            lines.extend([f"build {target}: compile {source}", f"  more = {flags}"])
        return compiled[source, flags]

    def link(target: str, objects: list[str], libraries: str) -> None:
        lines.extend([f"build {target}: link {' '.join(objects)}", f"  libraries = {libraries}"])
        if target.startswith("cost/"):
            programs = f"{HERE / 'cost_weights.py'} {HERE / 'cost_dataflow.py'}"
            lines.append(f"build {target}.weights: weights {target} | {programs}")

    def kernels(variant: str, sources: Iterable[Path], shim: str) -> list[str]:
        flags = f"{LINES} {VARIANTS[variant][0]} -include {HERE / shim} -x c++"
        return [compile_once(variant, source, flags) for source in sources]

    def shared(source: Path) -> str:
        return compile_once("shared", source, "-O1")

    for variant, (_, flags, link_flags) in VARIANTS.items():
        names = ("fiber", "scheduler", *TRACERS.get(variant, ()))
        emulator = [compile_once(variant, HERE / f"{name}.cpp", f"{LINES} {flags}") for name in names]
        emulator.append(shared(HERE / "bindings.cpp"))
        planted = "planted_costs" if variant == "cost" else "bugs"
        files = ["planted_costs.cu"] if variant == "cost" else ["bugs.cu", "handover_bugs.cu"]
        sources = kernels(variant, [HERE / file for file in files], "cuda_shim.h")
        sources.append(shared(HERE / f"{planted}_module.cpp"))
        ops = kernels(variant, sorted((ROOT / "csrc").glob("*_cuda.cu")), "ops_shim.h")
        ops += [shared(ROOT / "csrc" / "library.cpp"), shared(HERE / "ops_module.cpp")]
        link(f"{variant}/planted_{planted.removeprefix('planted_')}.so", emulator + sources, link_flags)
        link(f"{variant}/retinanet_ops/_C.so", emulator + ops, f"{link_flags} $torch")
    return "\n".join(lines) + "\n"


def link_package(package: Path) -> None:
    """Fill a package's folder with links to the files of `retinanet_ops`, and write its build information."""
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
        "cuda_builds": {},
        "cuda_omitted": "these are the CUDA kernels, emulated on the CPU",
    }
    (package / "_build_info.json").write_text(json.dumps(info, indent=2) + "\n")


def build(*variants: str) -> list[Path]:
    """Build variants and return their folders. Put a folder on sys.path to import its ops."""
    targets = []
    for variant in variants:
        link_package(BUILD / variant / "retinanet_ops")
        libraries = [f"{variant}/planted_{'costs' if variant == 'cost' else 'bugs'}.so"]
        if variant != "ucontext":
            libraries.append(f"{variant}/retinanet_ops/_C.so")
        targets += libraries
        if variant == "cost":
            targets += [f"{library}.weights" for library in libraries]
    beside_python = Path(sys.executable).parent / "ninja"
    ninja = str(beside_python) if beside_python.exists() else shutil.which("ninja")
    if ninja is None:
        raise BuildError("no ninja; `pip install ninja`")
    jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
    # Two concurrent runs of ninja in one folder would overwrite each other's objects.
    with (BUILD / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        rules, text = BUILD / "build.ninja", ninja_file()
        if not rules.exists() or rules.read_text() != text:
            rules.write_text(text)
        command = [ninja, "-C", str(BUILD), *jobs, *targets]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise BuildError(f"building the emulated kernels failed:\n{result.stdout}{result.stderr}")
    return [BUILD / variant for variant in variants]


def main() -> None:
    """Build the variants named on the command line, all of them by default."""
    unknown = set(sys.argv[1:]) - set(VARIANTS)
    if unknown:
        sys.exit(f"unknown variant {', '.join(sorted(unknown))}: expected {', '.join(VARIANTS)}")
    try:
        for folder in build(*(sys.argv[1:] or VARIANTS)):
            print(folder)
    except BuildError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
