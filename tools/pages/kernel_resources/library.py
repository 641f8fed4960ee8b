"""Reads the resources and loops of each kernel from the built library, with the toolkit's cuobjdump."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tools.pages.kernel_resources.loops import Instruction, Loop, find_loops, parse_instruction
from tools.toolchain import toolkit_bin

#: (kernel, architecture).
Key = tuple[str, str]

#: The architectures whose loops are recorded: the oldest one, and that of the H100 and H200.
LOOP_ARCHS = ("sm_75", "sm_90")


@dataclass
class Usage:
    """Resources of one kernel on one architecture.

    `stack` is in bytes. `shared` is the static shared memory in bytes, including the driver's share. The other fields
    except `registers` count instructions. `loops` is empty on architectures other than `LOOP_ARCHS`.
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
    instructions: int = 0
    loops: list[Loop] = field(default_factory=list)

    @property
    def spills(self) -> tuple[int, int, int]:
        """Return the size of the stack frame and the numbers of loads from and stores to local memory."""
        return self.stack, self.local_loads, self.local_stores

    @property
    def wide(self) -> tuple[int, int, int, int]:
        """Return the numbers of 128-bit accesses: global loads and stores, shared loads and stores."""
        return self.global_loads_128, self.global_stores_128, self.shared_loads_128, self.shared_stores_128


class ToolError(Exception):
    """The library or the table cannot be read. The message states the remedy."""


def cuobjdump(library: Path, *options: str) -> Iterator[str]:
    """Yield the lines that cuobjdump prints."""
    folder = toolkit_bin("cuobjdump", "nvdisasm")
    if folder is None:
        raise ToolError(
            "nothing was checked, because there is no disassembler: expected cuobjdump and nvdisasm in CUDA_HOME, an "
            "installed wheel or in PATH; pip install 'nvidia-cuda-cuobjdump>=13.2' 'nvidia-cuda-nvdisasm>=13.2' "
            "(cuda-toolkit 13.0 has no extras for them, and pip ignores unknown extras)"
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
ACCESS = re.compile(r"(LD|ST)(G|S|L)((?:\.[A-Z0-9]+)*)$")


def parse_functions(lines: Iterable[str]) -> Iterator[tuple[Key, list[Instruction]]]:
    """Yield (symbol, architecture) and the instructions of each function from `cuobjdump --dump-sass`."""
    arch = symbol = ""
    code: list[Instruction] = []
    for line in lines:
        if instruction := parse_instruction(line):
            code.append(instruction)
        elif match := re.search(r"Function : (\S+)", line):
            if code:
                yield (symbol, arch), code
            symbol, code = match[1], []
        elif match := re.match(r"arch = (\w+)", line):
            if code:
                yield (symbol, arch), code
            arch, code = match[1], []
    if code:
        yield (symbol, arch), code


def count_instructions(code: list[Instruction], usage: Usage) -> None:
    """Add the numbers of instructions and of memory accesses to a kernel's resources."""
    for instruction in code:
        usage.instructions += instruction.opcode != "NOP"
        match = ACCESS.match(instruction.opcode)
        if match is None:
            continue
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
    names = short_names(symbol for symbol, _ in by_symbol)
    if not names:
        raise ToolError(f"{library} holds no kernels of this project")
    table: dict[Key, Usage] = {}
    for (symbol, arch), code in parse_functions(cuobjdump(library, "--dump-sass")):
        if symbol not in names:
            continue
        usage = table[names[symbol], arch] = by_symbol[symbol, arch]
        count_instructions(code, usage)
        if arch in LOOP_ARCHS:
            usage.loops = find_loops(code)
    return table
