"""Reads the registers, stack and 128-bit accesses of each CUDA kernel on each architecture from the built library.

    python -m tools.pages.kernel_resources            write docs/generated/kernels.json and kernels.md
    python -m tools.pages.kernel_resources --check    compare the library with docs/generated/kernels.json

The check fails if a kernel spills more or has fewer 128-bit accesses than the table says, if a streaming kernel has
fewer 128-bit accesses to global memory than the mark above it in csrc says, or if the table is out of date. Registers
and shared memory depend on the compiler, so they are compared only if the library and the table come from the same
compiler version.

A kernel's stack frame holds values that did not fit into registers, and arrays whose indices the compiler does not
know. No kernel of this project has such an array, so every stack frame and every access to local memory is a spill.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from tools.toolchain import toolkit_bin

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "docs" / "generated" / "kernels.json"
PAGE = ROOT / "docs" / "generated" / "kernels.md"

#: The mark above a kernel that streams through global memory: the required numbers of 128-bit loads and stores.
MARK = re.compile(
    r"^// 128-bit accesses: (\d+) loads?, (\d+) stores?(?: \([^\n]*\))?\n"
    r"(?:(?!\n\n).)*?__global__(?:(?!\n\n).)*?\b(\w+_kernel)\(",
    re.MULTILINE | re.DOTALL,
)

#: (kernel, architecture).
Key = tuple[str, str]


@dataclass
class Usage:
    """Resources of one kernel on one architecture.

    `stack` is in bytes. `shared` is the static shared memory in bytes, including the driver's share. The other fields
    except `registers` count instructions.
    """

    registers: int = 0
    stack: int = 0
    shared: int = 0
    local_loads: int = 0
    local_stores: int = 0
    global_loads_128: int = 0
    global_stores_128: int = 0
    shared_loads_128: int = 0
    shared_stores_128: int = 0

    @property
    def spills(self) -> tuple[int, int, int]:
        """Return the size of the stack frame and the numbers of loads from and stores to local memory."""
        return self.stack, self.local_loads, self.local_stores

    @property
    def wide(self) -> tuple[int, int, int, int]:
        """Return the numbers of 128-bit accesses: global loads and stores, shared loads and stores."""
        return self.global_loads_128, self.global_stores_128, self.shared_loads_128, self.shared_stores_128


COLUMNS = ["kernel", "arch", *(field.name for field in fields(Usage))]


class ToolError(Exception):
    """The library or the table cannot be read. The message states the remedy."""


def cuobjdump(library: Path, *options: str) -> Iterator[str]:
    """Yield the lines that cuobjdump prints."""
    folder = toolkit_bin("cuobjdump", "nvdisasm")
    if folder is None:
        raise ToolError(
            "no cuobjdump and nvdisasm; pip install 'nvidia-cuda-cuobjdump>=13.2' 'nvidia-cuda-nvdisasm>=13.2'"
        )
    environment = {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ.get('PATH', '')}"}
    command = [str(folder / "cuobjdump"), *options, str(library)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout
        yield from process.stdout
    if process.returncode:
        raise ToolError(f"{' '.join(command)} failed with exit status {process.returncode}")


def compiler_version(library: Path) -> str:
    """Return the version of the assembler that wrote the kernels."""
    versions = {
        match[1] for line in cuobjdump(library, "-elf") if (match := re.search(r"Tool Version:.* V(\d+(\.\d+)+)", line))
    }
    if len(versions) != 1:
        raise ToolError(f"{library}: expected kernels of one compiler version, got {sorted(versions)}; rebuild")
    return versions.pop()


def short_names(symbols: Iterable[str]) -> dict[str, str]:
    """Map the mangled names of our kernels to readable ones, such as `focal_loss_kernel<Half, ClassTargets<int>>`."""
    ours = sorted({symbol for symbol in symbols if symbol.startswith("_ZN9retinanet")})
    demangled = subprocess.run(["c++filt"], input="\n".join(ours), capture_output=True, text=True, check=True).stdout
    names = {}
    for symbol, name in zip(ours, demangled.splitlines(), strict=True):
        name = name.removeprefix("void ").replace("(anonymous namespace)::", "")
        name = re.sub(r"\b(retinanet|c10)::", "", name).replace("> >", ">>")
        name = re.sub(r"\((\w+)\)(\d+)", r"\1 \2", name)  # `(kind)1` stands for a value of an enumeration
        names[symbol] = name[: name.index("(")]
    if len(set(names.values())) != len(names):
        raise ToolError("two kernels have the same short name")
    return names


def parse_usage(lines: Iterable[str]) -> dict[Key, Usage]:
    """Parse registers, stack and shared memory from `cuobjdump --dump-resource-usage`, by (symbol, architecture)."""
    table: dict[Key, Usage] = {}
    arch = symbol = ""
    for line in lines:
        if match := re.match(r"arch = (\w+)", line):
            arch = match[1]
        elif match := re.match(r" Function (\S+):", line):
            symbol = match[1]
        elif match := re.match(r"\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            registers, stack, shared, local = map(int, match.groups())
            table[symbol, arch] = Usage(registers, stack + local, shared)
    return table


#: Load or store, its memory space, and its modifiers, which name the width unless it is 32 bits.
ACCESS = re.compile(r"\b(LD|ST)(G|S|L)((?:\.[A-Z0-9]+)*)\s")


def count_accesses(lines: Iterable[str], table: dict[Key, Usage]) -> None:
    """Add the numbers of memory instructions from `cuobjdump --dump-sass` to a table of `parse_usage`."""
    arch = ""
    usage = Usage()
    for line in lines:
        if match := re.search(r"Function : (\S+)", line):
            usage = table[match[1], arch]
        elif match := re.match(r"arch = (\w+)", line):
            arch = match[1]
        elif match := ACCESS.search(line):
            loads, space, modifiers = match[1] == "LD", match[2], match[3].split(".")
            if space == "L":
                name = "local_loads" if loads else "local_stores"
            elif "128" in modifiers or "256" in modifiers:
                name = ("global" if space == "G" else "shared") + ("_loads_128" if loads else "_stores_128")
            else:
                continue
            setattr(usage, name, getattr(usage, name) + 1)


def read_library(library: Path) -> dict[Key, Usage]:
    """Return the resources of each of our kernels, by (short name, architecture)."""
    by_symbol = parse_usage(cuobjdump(library, "--dump-resource-usage"))
    count_accesses(cuobjdump(library, "--dump-sass"), by_symbol)
    names = short_names(symbol for symbol, _ in by_symbol)
    if not names:
        raise ToolError(f"{library} holds no kernels of this project")
    return {(names[symbol], arch): usage for (symbol, arch), usage in by_symbol.items() if symbol in names}


def arch_number(arch: str) -> int:
    """Return the number in `sm_<number>`, by which architectures are sorted."""
    return int(re.sub(r"\D", "", arch))


def dump_table(compiler: str, table: dict[Key, Usage]) -> str:
    """Return the table as JSON, one row per line."""
    keys = sorted(table, key=lambda key: (key[0], arch_number(key[1])))
    rows = ",\n".join("  " + json.dumps([*key, *astuple(table[key])]) for key in keys)
    head = f'{{"compiler": {json.dumps(compiler)},\n "columns": {json.dumps(COLUMNS)},\n "rows": [\n'
    return head + rows + "\n]}\n"


def load_table(text: str) -> tuple[str, dict[Key, Usage]]:
    """Return the compiler and the table from the text that `dump_table` wrote."""
    content = json.loads(text)
    if content["columns"] != COLUMNS:
        raise ToolError(
            f"{TABLE.name}: expected the columns {COLUMNS}, got {content['columns']}; run `make kernel-resources`"
        )
    return content["compiler"], {(row[0], row[1]): Usage(*row[2:]) for row in content["rows"]}


def span(values: Iterable[int]) -> str:
    """Format numbers as their range: one number, or the smallest and the largest."""
    numbers = sorted(values)
    return str(numbers[0]) if numbers[0] == numbers[-1] else f"{numbers[0]}–{numbers[-1]}"


def page(compiler: str, table: dict[Key, Usage]) -> str:
    """Return the page as Markdown, one row per kernel with the range over all architectures."""
    archs = sorted({arch for _, arch in table}, key=arch_number)
    lines = [
        "# Resources of the kernels",
        "",
        f"Written by `make kernel-resources` from the library that nvcc {compiler} built for",
        f"{', '.join(archs)}. A range covers these architectures.",
        "`make check-kernels` compares a build with [kernels.json](kernels.json), which has one row per kernel and",
        "architecture. It fails if a kernel spills more or has fewer 128-bit accesses than the table says, or if a",
        "kernel that streams through global memory has fewer than the mark above it in csrc says. The numbers of",
        "accesses are numbers of instructions in the machine code.",
        "",
        "| kernel | registers | shared bytes | global loads, stores of 128 bits | shared loads, stores of 128 bits |",
        "|---|---|---|---|---|",
    ]
    for kernel in sorted({kernel for kernel, _ in table}):
        rows = [table[kernel, arch] for arch in archs if (kernel, arch) in table]
        cells = [
            f"`{kernel}`",
            span(row.registers for row in rows),
            span(row.shared for row in rows),
            f"{span(row.global_loads_128 for row in rows)}, {span(row.global_stores_128 for row in rows)}",
            f"{span(row.shared_loads_128 for row in rows)}, {span(row.shared_stores_128 for row in rows)}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "## Spills", ""]
    spilling = sorted((key for key in table if any(table[key].spills)), key=lambda key: (key[0], arch_number(key[1])))
    if not spilling:
        return "\n".join([*lines, "No kernel spills on any of these architectures.", ""])
    lines += [
        f"{len(spilling)} of the {len(table)} builds of a kernel keep some registers in local memory:",
        "",
        "| kernel | architecture | bytes of stack | loads | stores |",
        "|---|---|---|---|---|",
    ]
    lines += [f"| `{key[0]}` | {key[1]} | {' | '.join(map(str, table[key].spills))} |" for key in spilling]
    return "\n".join([*lines, ""])


def streaming_kernels() -> dict[str, tuple[int, int]]:
    """Return the required numbers of 128-bit loads and stores of each kernel in csrc that has such a mark."""
    texts = [path.read_text() for path in sorted((ROOT / "csrc").glob("*_cuda.cu"))]
    return {match[3]: (int(match[1]), int(match[2])) for text in texts for match in MARK.finditer(text)}


def streaming_faults(table: dict[Key, Usage]) -> list[str]:
    """Return a fault for each streaming kernel without the 128-bit accesses to global memory that it needs."""
    streaming = streaming_kernels()
    faults = []
    for (kernel, arch), usage in table.items():
        loads, stores = streaming.get(kernel.split("<")[0], (0, 0))
        if usage.global_loads_128 < loads or usage.global_stores_128 < stores:
            faults.append(
                f"{kernel} on {arch}: {usage.global_loads_128} loads and {usage.global_stores_128} stores of 128 bits, "
                f"expected at least {loads} and {stores}"
            )
    names = {kernel.split("<")[0] for kernel, _ in table}
    return faults + [f"{name}: no such kernel in the library" for name in sorted(streaming.keys() - names)]


def table_faults(compiler: str, table: dict[Key, Usage], old_compiler: str, old: dict[Key, Usage]) -> list[str]:
    """Return a fault for each kernel that is worse than the table says, and for each row that is missing or wrong."""
    faults = [f"{kernel} on {arch}: in the table, not in the library" for kernel, arch in old.keys() - table.keys()]
    for (kernel, arch), usage in table.items():
        before = old.get((kernel, arch))
        if before is None:
            faults.append(f"{kernel} on {arch}: not in the table")
        if any(new > was for new, was in zip(usage.spills, before.spills if before else (0, 0, 0), strict=True)):
            was = f"{before.stack} bytes" if before else "none"
            faults.append(
                f"{kernel} on {arch}: spills {usage.stack} bytes of stack (the table: {was}), "
                f"{usage.local_loads} loads, {usage.local_stores} stores"
            )
        elif before and any(new < was for new, was in zip(usage.wide, before.wide, strict=True)):
            faults.append(
                f"{kernel} on {arch}: accesses of 128 bits (global loads, stores, shared loads, stores): {usage.wide}, "
                f"the table: {before.wide}"
            )
        elif before and compiler == old_compiler and usage != before:
            faults.append(f"{kernel} on {arch}: {usage}, the table: {before}")
    return sorted(faults)


def main() -> int:
    """Write the table and the page, or check the library against the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the committed table")
    parser.add_argument("--library", type=Path, default=ROOT / "retinanet_ops" / "_cuda.so", help="the built library")
    arguments = parser.parse_args()
    try:
        if not arguments.library.exists():
            raise ToolError(f"{arguments.library} does not exist; build the CUDA kernels first")
        compiler, table = compiler_version(arguments.library), read_library(arguments.library)
        faults = streaming_faults(table)
        if arguments.check:
            old_compiler, old = load_table(TABLE.read_text())
            faults += table_faults(compiler, table, old_compiler, old)
            if compiler != old_compiler:
                print(
                    f"registers and shared memory are not compared: compiler {compiler}, the table's is {old_compiler}"
                )
            if PAGE.read_text() != page(old_compiler, old):
                faults.append(f"{PAGE.name} is out of date; run `make kernel-resources`")
        else:
            TABLE.write_text(dump_table(compiler, table))
            PAGE.write_text(page(compiler, table))
    except (ToolError, OSError) as error:
        print(f"kernel_resources: {error}", file=sys.stderr)
        return 2
    for fault in faults:
        print(fault, file=sys.stderr)
    if faults and arguments.check:
        print("if intended, run `make kernel-resources` and commit docs/generated/kernels.*", file=sys.stderr)
    spilling = sum(any(usage.spills) for usage in table.values())
    print(f"{len(table)} kernel builds, {spilling} of them spill, {len(faults)} faults (compiler {compiler})")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
