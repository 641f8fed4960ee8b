"""The marks above streaming kernels in csrc, which state the 128-bit accesses that their machine code must have.

    // 128-bit accesses: 1 load, 1 store
    // 128-bit loops: loads and stores
    // Hot loop: one loop over packs takes nearly all of the time

The first line gives the least numbers of instructions that access 128 bits of global memory. The other lines are
optional. In the second, `loads` means that at least one loop loads packs. `stores` means that every loop that loads
packs and writes global memory stores packs, and that no loop stores a pack in pieces. A kernel without loops counts as
one loop. The third means that exactly one loop accesses packs and has a shortest way round it (loops.py), which the
predicted times take for the instructions of an iteration (tools/kernel_times/predict.py).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from tools.pages.kernel_resources.library import Key, Usage
from tools.pages.kernel_resources.loops import hot_loop

ROOT = Path(__file__).resolve().parents[3]

MARK = re.compile(
    r"^// 128-bit accesses: (\d+) loads?, (\d+) stores?(?: \([^\n]*\))?\n"
    r"(?:// 128-bit loops: (loads|stores|loads and stores)\n)?"
    r"(// Hot loop: one loop over packs takes nearly all of the time\n)?"
    r"(?:(?!\n\n).)*?__global__(?:(?!\n\n).)*?\b(\w+_kernel)\(",
    re.MULTILINE | re.DOTALL,
)


class Mark(NamedTuple):
    """What the mark above a kernel requires: numbers of 128-bit accesses, and what its loops do."""

    loads: int = 0
    stores: int = 0
    loops_load: bool = False
    loops_store: bool = False
    hot: bool = False


def streaming_kernels(sources: Path = ROOT / "csrc") -> dict[str, Mark]:
    """Return the mark of each kernel in a folder of sources that has one."""
    texts = [path.read_text() for path in sorted(sources.glob("*_cuda*"))]
    return {
        match[5]: Mark(
            int(match[1]), int(match[2]), "loads" in (match[3] or ""), "stores" in (match[3] or ""), bool(match[4])
        )
        for text in texts
        for match in MARK.finditer(text)
    }


def loop_faults(mark: Mark, usage: Usage) -> list[str]:
    """Return what is wrong with the loops of a kernel that has this mark."""
    faults = []
    loops = usage.loops[1:] or usage.loops
    if mark.hot and hot_loop(usage.loops) is None:
        faults.append("expected one loop with 128-bit accesses and a way round it that avoids inner loops and calls")
    if mark.loops_load and not any(loop.wide_loads for loop in loops):
        faults.append("no loop loads 128 bits, expected at least one")
    if not mark.loops_store:
        return faults
    for number, loop in enumerate(loops, 1):
        if loop.wide_loads and loop.narrow_stores and not loop.wide_stores:
            faults.append(
                f"loop {number} of {len(loops)} loads 128 bits, but its {loop.narrow_stores} stores are narrower"
            )
        elif loop.split_stores:
            faults.append(
                f"loop {number} of {len(loops)} stores 16 bytes or more in {loop.split_stores} pieces, expected stores "
                "of 128 bits"
            )
    return faults


def streaming_faults(table: dict[Key, Usage], sources: Path = ROOT / "csrc") -> list[str]:
    """Return a fault for each streaming kernel without the 128-bit accesses to global memory that it needs."""
    streaming = streaming_kernels(sources)
    faults = []
    for (kernel, arch), usage in table.items():
        mark = streaming.get(kernel.split("<")[0], Mark())
        if usage.global_loads_128 < mark.loads or usage.global_stores_128 < mark.stores:
            faults.append(
                f"{kernel} on {arch}: {usage.global_loads_128} loads and {usage.global_stores_128} stores of 128 bits, "
                f"expected at least {mark.loads} and {mark.stores}"
            )
        if usage.loops:
            faults += [f"{kernel} on {arch}: {fault}" for fault in loop_faults(mark, usage)]
    names = {kernel.split("<")[0] for kernel, _ in table}
    return faults + [f"{name}: no such kernel in the library" for name in sorted(streaming.keys() - names)]
