"""The table docs/generated/kernels.json, and the faults of a build that is worse than the table."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path

from tools.pages.kernel_resources.library import Key, Loop, ToolError, Usage

TABLE = Path(__file__).resolve().parents[3] / "docs" / "generated" / "kernels.json"

COLUMNS = ["kernel", "arch", *(field.name for field in fields(Usage))]
LOOP_COLUMNS = list(Loop._fields)

_CALL = "at most 24 bytes, because the code around a call of a division's slow path may use few registers"
_ONCE = "outside the loops, in a block whose 1,024 threads may use 64 registers each"
_EIGHT = "8 bytes, in a loop over packs of eight logits, which need the registers for their targets and factors"
_CLASSES = "at most 24 bytes, in loops over classes, which are unrolled: exponentials in float64 need many registers"
_ROW = "8 bytes, outside the loops over classes: one value is stored once, and loaded once per row of logits"
#: Kernels that may spill, by (kernel, architecture), with the reason. There should be none.
SPILLS: dict[Key, str] = {
    ("box_iou_backward_kernel<double, IouKind 0>", "sm_100"): _CALL,
    **{("box_iou_loss_backward_kernel<double, IouKind 1>", arch): _CALL for arch in ("sm_75", "sm_80", "sm_90")},
    **{
        ("box_iou_loss_backward_kernel<double, IouKind 2>", arch): _CALL
        for arch in ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
    },
    **{
        ("box_iou_kernel<double, IouKind 3>", arch): _CALL
        for arch in ("sm_75", "sm_80", "sm_86", "sm_89", "sm_100", "sm_120")
    },
    **{(f"box_iou_kernel<float, IouKind {kind}>", arch): _CALL for kind in (1, 2) for arch in ("sm_100", "sm_120")},
    **{
        (f"decode_candidates_kernel<double, {dtype}>", "sm_120"): _CALL
        for dtype in ("BFloat16", "Half", "double", "float")
    },
    **{("dense_box_loss_kernel<double, BoxLossKind 1>", arch): _CALL for arch in ("sm_86", "sm_89")},
    **{("dense_softmax_cross_entropy_backward_kernel<double>", arch): _ROW for arch in ("sm_80", "sm_86", "sm_89")},
    **{("dense_softmax_cross_entropy_kernel<double>", arch): _CLASSES for arch in ("sm_100", "sm_120")},
    **{
        (f"focal_loss_elements_kernel<{types}, Power 0, Result {result}>", arch): _EIGHT
        for types, result, arch in (
            ("BFloat16, float", 0, "sm_120"),
            ("BFloat16, float", 1, "sm_100"),
            ("BFloat16, float", 1, "sm_120"),
            ("Half, Half", 2, "sm_120"),
            ("Half, float", 0, "sm_120"),
            ("Half, float", 1, "sm_120"),
        )
    },
    ("select_level_kernel", "sm_100"): _ONCE,
    ("write_keys_kernel<BFloat16>", "sm_120"): _CALL,
    ("write_keys_kernel<Half>", "sm_120"): _CALL,
}

#: A loop or kernel may have this many times the instructions that the table says, or `MORE_INSTRUCTIONS` more.
GROWTH = 1.1
MORE_INSTRUCTIONS = 4


def arch_number(arch: str) -> int:
    """Return the number in `sm_<number>`, by which architectures are sorted."""
    return int(re.sub(r"\D", "", arch))


def dump_table(compiler: str, table: dict[Key, Usage]) -> str:
    """Return the table as JSON, one row per line."""
    keys = sorted(table, key=lambda key: (key[0], arch_number(key[1])))
    rows = ",\n".join("  " + json.dumps([*key, *vars(table[key]).values()]) for key in keys)
    head = (
        f'{{"compiler": {json.dumps(compiler)},\n "columns": {json.dumps(COLUMNS)},\n'
        f' "loop_columns": {json.dumps(LOOP_COLUMNS)},\n "rows": [\n'
    )
    return head + rows + "\n]}\n"


def load_table(text: str) -> tuple[str, dict[Key, Usage]]:
    """Return the compiler and the table from the text that `dump_table` wrote."""
    content = json.loads(text)
    for name, expected in (("columns", COLUMNS), ("loop_columns", LOOP_COLUMNS)):
        if content.get(name) != expected:
            raise ToolError(
                f"{TABLE.name}: expected the {name} {expected}, got {content.get(name)}; run `make kernel-resources`"
            )
    table = {}
    for kernel, arch, *values in content["rows"]:
        row = dict(zip(COLUMNS[2:], values, strict=True))
        table[kernel, arch] = Usage(**{**row, "loops": [Loop(*loop) for loop in row["loops"]]})
    return content["compiler"], table


def spill_faults(table: dict[Key, Usage]) -> list[str]:
    """Return a fault for each kernel that spills without a reason in `SPILLS`, and for each reason without a spill."""
    spilling = {key: usage.spills for key, usage in table.items() if any(usage.spills)}
    new = [
        f"{kernel} on {arch}: spills (bytes of stack, loads, stores): {spilling[kernel, arch]}, expected none, because "
        "`SPILLS` gives no reason"
        for kernel, arch in sorted(spilling.keys() - SPILLS.keys())
    ]
    gone = [
        f"{kernel} on {arch}: does not spill, but `SPILLS` gives a reason; remove it"
        for kernel, arch in sorted(SPILLS.keys() - spilling.keys())
    ]
    return new + gone


def grew(new: int, old: int) -> bool:
    """Return whether a number of instructions has become too large."""
    return new > max(old * GROWTH, old + MORE_INSTRUCTIONS)


def instruction_faults(usage: Usage, before: Usage) -> list[str]:
    """Return what has more instructions, or fewer wide accesses in a loop, than the table says.

    Loops correspond by their order. If their number has changed, only the sum of their instructions is compared.
    """
    pairs = [("the kernel", usage.instructions, before.instructions)]
    faults = []
    if len(usage.loops) == len(before.loops):
        for number, (new, old) in enumerate(zip(usage.loops, before.loops, strict=True)):
            name = f"loop {number} of {len(usage.loops) - 1}" if number else "the code outside loops"
            pairs.append((name, new.instructions, old.instructions))
            if new.shortest and old.shortest:
                pairs.append((f"the shortest way round {name}", new.shortest, old.shortest))
            if new.wide_loads < old.wide_loads or new.wide_stores < old.wide_stores:
                faults.append(
                    f"{name} has {new.wide_loads} loads and {new.wide_stores} stores of 128 bits, the table: "
                    f"{old.wide_loads} and {old.wide_stores}"
                )
    else:
        new_sum, old_sum = (sum(loop.instructions for loop in row.loops[1:]) for row in (usage, before))
        pairs.append(("all loops", new_sum, old_sum))
    return faults + [
        f"{name} has {new} instructions, the table: {old} ({new / max(old, 1) - 1:+.0%}, allowed: {GROWTH - 1:+.0%})"
        for name, new, old in pairs
        if grew(new, old)
    ]


def difference(usage: Usage, before: Usage) -> str:
    """Return the fields that differ from the table."""
    old = vars(before)
    return ", ".join(f"{name} {new}, the table: {old[name]}" for name, new in vars(usage).items() if new != old[name])


def row_faults(usage: Usage, before: Usage, same_compiler: bool) -> list[str]:
    """Return what is worse than the row of the table, or else whether the row is out of date."""
    faults = []
    if any(new > was for new, was in zip(usage.spills, before.spills, strict=True)):
        faults.append(f"stack frame, loads from and stores to local memory: {usage.spills}, the table: {before.spills}")
    if any(new < was for new, was in zip(usage.wide, before.wide, strict=True)):
        faults.append(
            f"accesses of 128 bits (global loads, stores, shared loads, stores): {usage.wide}, the table: {before.wide}"
        )
    if same_compiler:
        faults += instruction_faults(usage, before)
        if not faults and usage != before:
            faults.append(f"the table is out of date: {difference(usage, before)}")
    return faults


def table_faults(compiler: str, table: dict[Key, Usage], old_compiler: str, old: dict[Key, Usage]) -> list[str]:
    """Return a fault for each kernel that is worse than the table says, and for each row that is missing or wrong."""
    faults = [f"{kernel} on {arch}: in the table, not in the library" for kernel, arch in old.keys() - table.keys()]
    for (kernel, arch), usage in table.items():
        before = old.get((kernel, arch))
        found = ["not in the table"] if before is None else row_faults(usage, before, compiler == old_compiler)
        faults += [f"{kernel} on {arch}: {fault}" for fault in found]
    return sorted(faults)
