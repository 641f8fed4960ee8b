"""The page docs/generated/kernels.md."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from tools.pages.kernel_resources.library import LOOP_ARCHS, Key, Loop, Usage
from tools.pages.kernel_resources.loops import PACK_BYTES
from tools.pages.kernel_resources.table import SPILLS, arch_number

PAGE = Path(__file__).resolve().parents[3] / "docs" / "generated" / "kernels.md"

ELEMENT_BYTES = {"double": 8, "float": 4, "Half": 2, "BFloat16": 2}


def span(values: Iterable[int]) -> str:
    """Format numbers as their range: one number, or the smallest and the largest."""
    numbers = sorted(values)
    return str(numbers[0]) if numbers[0] == numbers[-1] else f"{numbers[0]}–{numbers[-1]}"


def loop_text(kernel: str, loop: Loop) -> str:
    """Return a streaming loop's instructions per iteration, and per element in brackets.

    The type of the elements is the kernel's first template argument. An iteration processes as many packs as it stores,
    or loads if it stores none.
    """
    packs = min(count for count in (loop.wide_loads, loop.wide_stores) if count)
    first = re.search(r"<(\w+)", kernel)
    size = ELEMENT_BYTES.get(first[1] if first else "", PACK_BYTES)
    counts = [count for count in (loop.shortest, loop.instructions) if count]
    per_element = [count / (packs * PACK_BYTES / size) for count in counts]
    texts = [f"{number:.0f}" if number >= 10 else f"{number:.1f}" for number in per_element]
    return f"{span(counts)} ({'–'.join(dict.fromkeys(texts))})"


def loop_cell(kernel: str, usage: Usage | None) -> str:
    """Return the loops that access packs."""
    loops = usage.loops[1:] if usage else []
    streaming = [loop for loop in loops if loop.wide_loads or loop.wide_stores]
    return ", ".join(loop_text(kernel, loop) for loop in streaming)


def page(compiler: str, table: dict[Key, Usage]) -> str:
    """Return the page as Markdown, one row per kernel with the range over all architectures."""
    archs = sorted({arch for _, arch in table}, key=arch_number)
    loop_archs = [arch for arch in LOOP_ARCHS if arch in archs]
    lines = [
        "# Resources of the kernels",
        "",
        f"Written by `make kernel-resources` from the library that nvcc {compiler} built for",
        f"{', '.join(archs)}. A range covers these architectures.",
        "`make check-kernels` compares a build with [kernels.json](kernels.json), which has one row per kernel and",
        "architecture. It fails if a kernel spills without a listed reason, if it has fewer 128-bit accesses than the",
        "table or the mark above it in csrc says, or if the kernel or one of its loops has over 10 % more instructions",
        "than the table says. The numbers of accesses are numbers of instructions in the machine code.",
        "",
        "The last columns list the loops that access 128 bits of global memory, each by its number of instructions",
        "without inner loops: first on the shortest way round the loop, if one avoids the inner loops, and then with",
        "all rare paths. In brackets are these numbers per element of the kernel's first type, or per 16 bytes if that",
        "is not a floating-point type.",
        "",
        "| kernel | registers | shared bytes | global loads, stores of 128 bits | shared loads, stores of 128 bits |"
        + "".join(f" loops on {arch} |" for arch in loop_archs),
        "|---|---|---|---|---|" + "---|" * len(loop_archs),
    ]
    for kernel in sorted({kernel for kernel, _ in table}):
        rows = [table[kernel, arch] for arch in archs if (kernel, arch) in table]
        cells = [
            f"`{kernel}`",
            span(row.registers for row in rows),
            span(row.shared for row in rows),
            f"{span(row.global_loads_128 for row in rows)}, {span(row.global_stores_128 for row in rows)}",
            f"{span(row.shared_loads_128 for row in rows)}, {span(row.shared_stores_128 for row in rows)}",
            *(loop_cell(kernel, table.get((kernel, arch))) for arch in loop_archs),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "## Spills", ""]
    spilling = sorted((key for key in table if any(table[key].spills)), key=lambda key: (key[0], arch_number(key[1])))
    if not spilling:
        return "\n".join([*lines, "No kernel spills on any of these architectures.", ""])
    lines += [
        f"{len(spilling)} of the {len(table)} builds of a kernel keep some registers in local memory:",
        "",
        "| kernel | architecture | bytes of stack | loads | stores | reason |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| `{key[0]}` | {key[1]} | {' | '.join(map(str, table[key].spills))} | {SPILLS.get(key, 'none')} |"
        for key in spilling
    ]
    return "\n".join([*lines, ""])
