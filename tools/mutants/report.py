"""Writes the page about mutants: which stage killed each one, and why the survivors are equivalent."""

from __future__ import annotations

from collections import Counter
from typing import Any

from tools.mutants.mutations import Mutant

#: Description of each kind of mutant.
WHAT = {
    "barrier": "a barrier is removed",
    "compare": "a comparison includes its boundary, excludes it, or is negated",
    "shift": "one side of an order comparison moves by one",
    "mask": "the upper half of a warp mask is cleared",
    "guard": "a condition, or one of its conjuncts, is replaced by true",
}


def code(text: str) -> str:
    """Format code for a cell of a Markdown table."""
    return "`" + text.strip().replace("|", "\\|") + "`"


def stage_name(judgement: dict[str, Any]) -> str:
    """Return the stage that killed a mutant and the test that failed there, as the table shows them."""
    return f"{judgement['stage']}: {judgement['by']}"


def page(everything: list[Mutant], judged: dict[str, dict[str, Any]], proofs: dict[str, str]) -> tuple[str, list[str]]:
    """Return the page as Markdown, and the faults: survivors without a proof, wrong proofs, mutants not run."""
    survivors = [mutant for mutant in everything if mutant.id in judged and not judged[mutant.id]["stage"]]
    unknown = [mutant for mutant in everything if mutant.id not in judged]
    unproven = [mutant for mutant in survivors if mutant.id not in proofs]
    names = {mutant.id for mutant in everything}
    faults = [f"survives: {mutant.id}" for mutant in unproven]
    faults += [f"proof of a mutant that does not exist: {name}" for name in proofs if name not in names]
    faults += [
        f"killed, though proven equivalent: {mutant.id}"
        for mutant in everything
        if mutant.id in proofs and judged.get(mutant.id, {}).get("stage")
    ]
    if unknown:
        faults.append(f"not run: {len(unknown)} mutants")
    kinds = Counter(mutant.kind for mutant in everything)
    stages = Counter(judgement["stage"] for judgement in judged.values() if judgement["stage"])
    lines = [
        "# Mutants of the kernels",
        "",
        "Written by `make mutants`. Each mutant changes one line of device code. It is compiled for the emulator",
        "([tools/emulator](../../tools/emulator)) and runs the tests that reach the line. The stages, in the order in",
        "which they are tried, are the FIFO schedule, AddressSanitizer, the race detector (in files where",
        "threads interact), the LIFO schedule and two random ones (for barriers and masks), and at the end the slow",
        "tests that are marked `once`, in the FIFO schedule and, for barriers and masks, in the LIFO schedule. The",
        "race detector comes first for barriers and for conditions that choose one thread. A mutant with a proof of",
        "equivalence is tried in the FIFO schedule only.",
        "",
        f"{len(everything)} mutants: {sum(stages.values())} killed, {len(survivors) - len(unproven)} equivalent, "
        f"{len(unproven)} survive, {len(unknown)} not run.",
        "",
        "| mutation | mutants |",
        "|---|---|",
        *(f"| {WHAT[kind]} ({kind}) | {number} |" for kind, number in sorted(kinds.items())),
        "",
        "| killed by | mutants |",
        "|---|---|",
        *(f"| {stage} | {number} |" for stage, number in stages.most_common()),
        "",
    ]
    if unproven:
        lines += ["## Survivors", "", "| file | line | instead of |", "|---|---|---|"]
        lines += [f"| {m.file} | {code(m.after)} | {code(m.before)} |" for m in unproven]
        lines.append("")
    equivalent = [mutant for mutant in survivors if mutant.id in proofs]
    if equivalent:
        lines += ["## Equivalent", "", "| file | line | instead of | why the result is the same |", "|---|---|---|---|"]
        lines += [f"| {m.file} | {code(m.after)} | {code(m.before)} | {proofs[m.id]} |" for m in equivalent]
        lines.append("")
    for file in dict.fromkeys(mutant.file for mutant in everything):
        killed = [m for m in everything if m.file == file and judged.get(m.id, {}).get("stage", "") in stages]
        if killed:
            lines += [f"## {file}", "", "| mutant | killed by |", "|---|---|"]
            lines += [f"| {code(m.after)} | {stage_name(judged[m.id])} |" for m in killed]
            lines.append("")
    return "\n".join(lines), faults
