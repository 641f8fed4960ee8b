"""Makes a manylinux_2_28 wheel from a wheel that needs the glibc of this machine, without compiling again.

    python -m tools.wheels.manylinux --output-dir dist dist/retinanet_ops-0.1.0-py3-none-linux_x86_64.whl

It links the object files of the build (build/objects) once more, with zig's linker, which knows the symbols of older
versions of glibc. The wheel must be of the same build: it holds at most one CUDA library, and each object file is newer
than its source and older than the wheel. The release workflow needs no such step, because it builds in containers with
glibc 2.28.
"""

from __future__ import annotations

import argparse
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tools.toolchain import toolkit_bin
from tools.wheels.archive import WheelError, pack, read_build_info, unpack

ROOT = Path(__file__).resolve().parents[2]
GLIBC = "2.28"
#: The newest versions of symbols that the platform manylinux_2_28 has.
LIMITS = {"GLIBC": GLIBC, "GLIBCXX": "3.4.24", "CXXABI": "1.3.11"}
#: libstdc++'s headers of GCC >= 11 read this variable of glibc >= 2.32. False lets std::shared_ptr count atomically.
SINGLE_THREADED = '__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;\n'
#: zig knows no --exclude-libs, which hides the symbols of static libraries.
EXPORTS = "{ global: retinanet_ops_*; local: *; };\n"
#: A version of a symbol and its name in the output of `objdump -T`, which puts hidden versions in parentheses.
VERSIONED_SYMBOL = re.compile(r"\s\(?(GLIBC|GLIBCXX|CXXABI)_([\d.]+)\)?\s.*?(\S+)$", re.MULTILINE)
TORCH_LIBRARIES = ("libc10.so", "libtorch_cpu.so", "libtorch_cuda.so")


def _run(*command: str | Path) -> str:
    """Run a command and return its output."""
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise WheelError(f"`{' '.join(map(str, command))}` failed: {(result.stderr or result.stdout).strip()}")
    return result.stdout


def symbol_faults(library: str, symbols: str) -> list[str]:
    """Return one line for each version of a symbol that manylinux_2_28 lacks.

    Args:
        library: Name of the library, for the messages.
        symbols: What `objdump -T` prints of it.

    Returns:
        The faults, each with the symbol and the version that it needs.

    Raises:
        WheelError: The output names no version of a symbol, although every library of the package uses glibc.
    """

    def number(version: str) -> tuple[int, ...]:
        return tuple(map(int, version.split(".")))

    versioned = VERSIONED_SYMBOL.findall(symbols)
    if not versioned:
        raise WheelError(f"`objdump -T` names no version of a symbol of {library}, so they cannot be checked")
    faults = []
    for prefix, version, symbol in versioned:
        if number(version) > number(LIMITS[prefix]):
            faults.append(
                f"{library} needs {symbol} of {prefix} {version}, but manylinux_2_28 ends at {LIMITS[prefix]}"
            )
    return faults


def _objects(pattern: str, wheel: Path) -> list[Path]:
    """Return the object files of the sources that match a pattern, after checking that the wheel is made of them."""
    sources = sorted(ROOT.glob(f"csrc/**/{pattern}"))
    objects = [(ROOT / "build" / "objects" / path.relative_to(ROOT)).with_suffix(".o") for path in sources]
    for source, path in zip(sources, objects, strict=True):
        if not path.exists():
            raise WheelError(f"{path} does not exist; build {source.name} first, for example with `make wheel`")
        modified = path.stat().st_mtime_ns
        if modified < source.stat().st_mtime_ns:
            raise WheelError(f"{path} is older than {source}; build the wheel again, for example with `make wheel`")
        if modified > wheel.stat().st_mtime_ns:
            raise WheelError(f"{path} is newer than {wheel}; build the wheel again, for example with `make wheel`")
    return objects


def _libraries(name: str, wheel: Path) -> tuple[list[Path], list[str]]:
    """Return the object files and the linker's options of `_C.so` or `_cuda<MAJOR>.so` of a wheel, as in setup.py."""
    import torch

    options = [f"-L{Path(torch.__file__).parent / 'lib'}", "-lc10", "-ltorch_cpu"]
    if name == "_C.so":
        return _objects("*.cpp", wheel), options
    toolkit = toolkit_bin("nvcc")
    if toolkit is None:
        raise WheelError("no CUDA toolkit found, whose cudart is linked; set CUDA_HOME")
    folders = [f"-L{toolkit.parent / folder}" for folder in ("lib64", "lib")]
    return _objects("*_cuda.cu", wheel), [
        *options,
        *folders,
        "-ltorch_cuda",
        "-lcudart_static",
        "-ldl",
        "-lrt",
        "-lpthread",
    ]


def link(name: str, wheel: Path, output: Path, folder: Path) -> None:
    """Link a library of the package for glibc 2.28 and check the versions of its symbols.

    Args:
        name: `_C.so` or `_cuda<MAJOR>.so`.
        wheel: The wheel of the same build.
        output: The file to write.
        folder: A folder for the linker's inputs.
    """
    objects, options = _libraries(name, wheel)
    single_threaded, exports = folder / "single_threaded.c", folder / "exports.map"
    single_threaded.write_text(SINGLE_THREADED)
    exports.write_text(EXPORTS)
    # The compiler's runtime is named by its files, because zig would replace -lstdc++ by its own libc++. Without
    # libgcc.a, __builtin_cpu_supports would find no feature, because zig's runtime never fills in __cpu_model.
    files = ("libstdc++.so", "libgcc_s.so.1", "libgcc.a")
    runtime = [_run("c++", f"-print-file-name={file}").strip() for file in files]
    target = f"{platform.machine()}-linux-gnu.{GLIBC}"
    script = ["-s", "-Wl,--no-undefined", "-Wl,--as-needed", f"-Wl,--version-script={exports}"]
    zig = [sys.executable, "-m", "ziglang", "cc", "-target", target, "-shared"]
    _run(*zig, single_threaded, *objects, *options, *runtime, *script, "-o", output)
    if faults := symbol_faults(name, _run("objdump", "-T", output)):
        raise WheelError("\n".join(faults))


def make_manylinux(wheel: Path, output_dir: Path) -> Path:
    """Link the libraries of a wheel for glibc 2.28.

    Args:
        wheel: A wheel that was just built in this source tree.
        output_dir: Folder of the new wheel.

    Returns:
        The path of the new wheel, whose platform is manylinux_2_28.

    Raises:
        WheelError: The wheel has several CUDA libraries or others than its build information lists, an object file is
            missing or of another build, a program is missing, linking fails, or the result needs more than
            manylinux_2_28.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "unpacked").mkdir()
        contents = unpack(wheel, folder / "unpacked")
        builds = read_build_info(wheel, contents)["cuda_builds"]
        if len(builds) > 1:
            raise WheelError(
                f"{wheel} has libraries for CUDA {' and '.join(builds)}, but build/objects holds the objects of one; "
                "link each wheel before it is merged"
            )
        for library in sorted(contents.glob("retinanet_ops/*.so")):
            library.unlink()
            link(library.name, wheel, library, folder)
        packed = pack(contents, folder / "packed")
        excluded = [argument for library in TORCH_LIBRARIES for argument in ("--exclude", library)]
        tag = f"manylinux_2_28_{platform.machine()}"
        audit = [sys.executable, "-m", "auditwheel", "repair", "--plat", tag, "--only-plat", *excluded]
        _run(*audit, "--wheel-dir", folder / "repaired", packed)
        (repaired,) = (folder / "repaired").iterdir()
        output_dir.mkdir(parents=True, exist_ok=True)
        return Path(shutil.move(repaired, output_dir / repaired.name))


def main() -> int:
    """Make the wheel of the command line and print its path."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path, metavar="WHEEL", help="the wheel that was built in this source tree")
    parser.add_argument("--output-dir", type=Path, required=True, metavar="DIR", help="folder for the new wheel")
    arguments = parser.parse_args()
    try:
        print(make_manylinux(arguments.wheel, arguments.output_dir))
    except (WheelError, OSError) as error:
        print(f"wheels.manylinux: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
