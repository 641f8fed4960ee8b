"""Registers and static shared memory of the kernels, which bound the blocks that a multiprocessor holds at once."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from tools.pages.kernel_resources.library import Key, Usage, cuobjdump, parse_usage, short_names
from tools.pages.kernel_resources.table import TABLE, load_table

#: Assumed for a kernel that is in no table.
UNKNOWN = Usage(registers=64)

#: Instances that no case runs: IoU and box losses other than the plain IoU and L1, and other focal losses than that of
#: class ids with gamma 2.
NOT_RUN = re.compile(r"(Iou|BoxLoss)Kind [1-9]|Power 0|ElementTargets")


class Resources:
    """The resources of each kernel, by the name that its launch has."""

    def __init__(self, table: dict[Key, Usage]) -> None:
        """Store a table by (short name, architecture)."""
        self.table = table

    def of(self, kernel: str, arch: str, dtype: str) -> Usage | None:
        """Return the registers and shared memory of a kernel, or None if it is in no table.

        A launch does not tell which instance of a template it runs, so this is the most that any instance for this
        dtype needs, without those that no case runs. Another architecture stands in for a missing one.
        """
        rows = [(*key, usage) for key, usage in self.table.items() if key[0].split("<")[0] == kernel]
        rows = [row for row in rows if not NOT_RUN.search(row[0])] or rows
        for chosen in (dtype, "float"):  # many kernels compute in float for half types
            rows = [row for row in rows if f"<{chosen}" in row[0]] or rows
        rows = [row for row in rows if row[1] == arch] or rows
        if not rows:
            return None
        return Usage(max(usage.registers for *_, usage in rows), shared=max(usage.shared for *_, usage in rows))


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
