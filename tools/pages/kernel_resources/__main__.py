"""Reads the registers, stack, 128-bit accesses and loops of each CUDA kernel from the built library.

    python -m tools.pages.kernel_resources            write docs/generated/kernels.json and kernels.md
    python -m tools.pages.kernel_resources --check    compare the library with docs/generated/kernels.json

The check fails if a kernel spills without a reason in `table.SPILLS`, if a streaming kernel does not have the 128-bit
accesses to global memory that the mark above it in csrc states (marks.py), if a kernel has fewer 128-bit accesses than
the table says, if a kernel or one of its loops has over 10 % more instructions, or if the table is out of date.
Registers, shared memory and instructions depend on the compiler, so they are compared only if the library and the table
come from the same compiler version. Loops are recorded on `library.LOOP_ARCHS` only.

A kernel's stack frame holds values that did not fit into registers, and arrays whose indices the compiler does not
know. No kernel of this project has such an array, so every stack frame and every access to local memory is a spill.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tools.pages.kernel_resources.library import ToolError, compiler_version, read_library
from tools.pages.kernel_resources.marks import ROOT, streaming_faults
from tools.pages.kernel_resources.page import PAGE, page
from tools.pages.kernel_resources.table import TABLE, dump_table, load_table, spill_faults, table_faults


def main() -> int:
    """Write the table and the page, or check the library against the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the committed table")
    parser.add_argument("--library", type=Path, help="the built library (default: retinanet_ops/_cuda*.so)")
    parser.add_argument("--sources", type=Path, default=ROOT / "csrc", help="the folder of the kernels' marks")
    arguments = parser.parse_args()
    try:
        library = arguments.library or max(ROOT.glob("retinanet_ops/_cuda*.so"), default=None)
        if library is None or not library.exists():
            missing = f"{library} does not exist" if library else "retinanet_ops holds no _cuda*.so"
            raise ToolError(f"{missing}; build the CUDA kernels first")
        compiler, table = compiler_version(library), read_library(library)
        faults = streaming_faults(table, arguments.sources) + spill_faults(table)
        if arguments.check:
            old_compiler, old = load_table(TABLE.read_text())
            faults += table_faults(compiler, table, old_compiler, old)
            if compiler != old_compiler:
                print(
                    f"registers, shared memory and instructions are not compared: compiler {compiler}, the table's is "
                    f"{old_compiler}"
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
