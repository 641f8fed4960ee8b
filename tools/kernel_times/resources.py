"""Registers and static shared memory of the kernels, which bound the blocks that a multiprocessor holds at once."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tools.pages.kernel_resources.library import Key, Usage, cuobjdump, parse_usage, short_names
from tools.pages.kernel_resources.table import TABLE, load_table

#: Assumed for a kernel that is in no table.
UNKNOWN = Usage(registers=64)


class Resources:
    """The resources of each kernel, by the name that its launch has."""

    def __init__(self, table: dict[Key, Usage]) -> None:
        """Store a table by (short name, architecture)."""
        self.table = table

    def of(self, kernel: str, arch: str, dtype: str) -> Usage | None:
        """Return the registers and shared memory of a kernel, or None if it is in no table.

        A launch does not tell which instance of a template it runs, so this is the most that any instance for this
        dtype needs. Another architecture stands in for a missing one.
        """
        rows = {key: usage for key, usage in self.table.items() if key[0].split("<")[0] == kernel}
        for key in ((kernel, arch), ("", arch), ("", "")):
            chosen = [
                usage
                for (name, its), usage in rows.items()
                if its.startswith(key[1]) and (not key[0] or "<" not in name or f"<{dtype}" in name)
            ]
            if chosen:
                return Usage(max(u.registers for u in chosen), shared=max(u.shared for u in chosen))
        return None


def load(cubins: Iterable[Path] = ()) -> Resources:
    """Return the resources in docs/generated/kernels.json. Kernels of the cubins replace those of the same name."""
    table = load_table(TABLE.read_text())[1]
    for cubin in cubins:
        by_symbol = parse_usage(cuobjdump(cubin, "--dump-resource-usage"))
        names = short_names(symbol for symbol, _ in by_symbol)
        ours = {names[symbol].split("<")[0] for symbol, _ in by_symbol if symbol in names}
        table = {key: usage for key, usage in table.items() if key[0].split("<")[0] not in ours}
        table |= {(names[symbol], arch): usage for (symbol, arch), usage in by_symbol.items() if symbol in names}
    return Resources(table)
