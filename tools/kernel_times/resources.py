"""What the compiled kernels need and execute: registers, shared memory, and the instructions of their hot loops."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tools.pages.kernel_resources.library import Key, Usage, cuobjdump, parse_functions, parse_usage, short_names
from tools.pages.kernel_resources.loops import Loop, find_loops, hot_loop
from tools.pages.kernel_resources.marks import streaming_kernels
from tools.pages.kernel_resources.table import TABLE, load_table

#: Assumed for a kernel that is in no table.
UNKNOWN = Usage(registers=64)
#: The architecture that stands in for one that the table lacks, or of which it has no loops.
STAND_IN = "sm_90"


def instances(launches: Iterable[Any], library: Path) -> dict[int, str]:
    """Return the names of the launched kernels with their template arguments, by offset in the emulated library."""
    offsets = {launch.function for launch in launches}
    output = subprocess.run(["nm", "--defined-only", str(library)], capture_output=True, text=True, check=True).stdout
    symbols = {int(line.split()[0], 16): line.split()[2] for line in output.splitlines()}
    symbols = {offset: symbol for offset, symbol in symbols.items() if offset in offsets}
    names = short_names(symbols.values())
    return {offset: names[symbol] for offset, symbol in symbols.items() if symbol in names}


class Resources:
    """The resources of each kernel, by its name with template arguments."""

    def __init__(self, table: dict[Key, Usage], hot: Iterable[str] = ()) -> None:
        """Store a table by (short name, architecture), and the names of the kernels whose hot loop is marked."""
        self.table = table
        self.hot = frozenset(hot)

    def _rows(self, kernel: str, arch: str) -> list[Usage]:
        """Return the rows of a kernel: that of the architecture, that of `STAND_IN`, and then all others."""
        archs = sorted(
            (its for name, its in self.table if name == kernel), key=lambda its: (its != arch, its != STAND_IN)
        )
        return [self.table[kernel, its] for its in archs]

    def of(self, kernel: str, arch: str) -> Usage | None:
        """Return the resources of a kernel, or None if it is in no table."""
        return next(iter(self._rows(kernel, arch)), None)

    def hot_loop(self, kernel: str, arch: str) -> Loop | None:
        """Return the hot loop of a kernel, or None if it has no mark, or if the machine code has no such loop."""
        if kernel.split("<")[0] not in self.hot:
            return None
        return next((hot_loop(usage.loops) for usage in self._rows(kernel, arch) if usage.loops), None)


def load(cubins: Iterable[Path] = ()) -> Resources:
    """Return the resources in docs/generated/kernels.json. Kernels of the cubins replace those of the same name."""
    table = load_table(TABLE.read_text())[1]
    for cubin in cubins:
        by_symbol = parse_usage(cuobjdump(cubin, "--dump-resource-usage"))
        names = short_names(symbol for symbol, _ in by_symbol)
        table = {key: usage for key, usage in table.items() if key[0] not in names.values()}
        for (symbol, arch), code in parse_functions(cuobjdump(cubin, "--dump-sass")):
            if symbol in names:
                by_symbol[symbol, arch].loops = find_loops(code)
                table[names[symbol], arch] = by_symbol[symbol, arch]
    return Resources(table, (kernel for kernel, mark in streaming_kernels().items() if mark.hot))
