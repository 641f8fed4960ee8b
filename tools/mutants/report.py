"""The page about mutants: which stage killed each, and why those that survive are equivalent."""

from __future__ import annotations

from collections import Counter

from mutations import Mutant

WHAT = {
    "barrier": "a barrier is left out",
    "compare": "a comparison includes its boundary, or excludes it, or is turned around",
    "shift": "one side of an order comparison moves by one",
    "mask": "a warp mask loses its upper half",
    "guard": "a condition, or one of its conjuncts, is taken to be true",
}


def code(text: str) -> str:
    """Code in a cell of a Markdown table."""
    return "`" + text.strip().replace("|", "\\|") + "`"


def stage_name(judgement: dict[str, str]) -> str:
    """How the table names a stage and what failed in it."""
    return f"{judgement['stage']}: {judgement['by']}"


def page(everything: list[Mutant], judged: dict[str, dict[str, str]], proofs: dict[str, str]) -> tuple[str, list[str]]:
    """The page as Markdown, and what keeps the mutants from being done with."""
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
        "Written by `make mutants`. Each mutant is one small change of one line of device code, compiled for the",
        "emulator ([tests/emulation](../tests/emulation)) and tested as the ops that use the line are. The stages, in",
        "the order in which they are tried: schedule FIFO, AddressSanitizer, in files where threads meet the race",
        "detector, for barriers and masks schedules LIFO and two random ones. A mutant with a proof of equivalence is",
        "tried in the first stage only.",
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
        lines += ["## Equivalent", "", "| file | line | instead of | why nothing changes |", "|---|---|---|---|"]
        lines += [f"| {m.file} | {code(m.after)} | {code(m.before)} | {proofs[m.id]} |" for m in equivalent]
        lines.append("")
    for file in dict.fromkeys(mutant.file for mutant in everything):
        killed = [m for m in everything if m.file == file and judged.get(m.id, {}).get("stage", "") in stages]
        if killed:
            lines += [f"## {file}", "", "| mutant | killed by |", "|---|---|"]
            lines += [f"| {code(m.after)} | {stage_name(judged[m.id])} |" for m in killed]
            lines.append("")
    return "\n".join(lines), faults
