"""Finds which loads of a function wait for earlier loads, from its x86-64 code.

A load waits for an earlier one if its address derives from the loaded value, or if a conditional jump between them
does. Values are followed through registers and stack slots in the order of the code, twice, so that values which one
iteration of a loop leaves for the next are seen.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence

#: Address, mnemonic, operands.
Instruction = tuple[int, str, str]
Sites = frozenset[int]

NOTHING: Sites = frozenset()
#: Most loads that are remembered for one value.
MOST_SITES = 12
ARGUMENTS = ("di", "si", "dx", "cx", "8", "xmm0", "xmm1", "xmm2")
#: Registers that a call does not preserve.
CLOBBERED = ("ax", "cx", "dx", "si", "di", "8", "9", "10", "11", *(f"xmm{i}" for i in range(16)))
COPIES = re.compile(r"v?mov.*|lea.*|cvt.*|v?cvt.*|sqrt.*")
COMPARES = re.compile(r"cmp[bwlq]?|test[bwlq]?|v?u?comis[sd]")


def register(name: str) -> str:
    """Return one name for all widths of a register, such as `ax` for %al, %ax, %eax and %rax."""
    name = name.lstrip("%")
    if match := re.match(r"[xy]mm(\d+)", name):
        return "xmm" + match[1]
    if match := re.match(r"r(\d+)", name):
        return match[1]
    if match := re.fullmatch(r"([abcd])[lh]", name):
        return match[1] + "x"
    return name[:2] if name.endswith("l") else name[-2:]


def split(operands: str) -> list[str]:
    """Split operands at the commas outside of parentheses."""
    return [part.strip() for part in re.split(r",(?![^(]*\))", operands) if part.strip()]


class Dataflow:
    """The loads from which each register, stack slot and the flags derive, at one place of a function."""

    def __init__(self) -> None:
        """Start without any loaded value."""
        self.sources: dict[str, Sites] = defaultdict(lambda: NOTHING)
        self.flags = self.decided = NOTHING  # decided: loads whose values a jump depended on
        self.announced: Sites = NOTHING  # the load whose value the next instructions read

    def value(self, operand: str) -> Sites:
        """Return the loads from which an operand derives."""
        if "(" not in operand:
            return self.sources[register(operand)] if operand.startswith("%") else NOTHING
        if "(%rsp" in operand:
            return self.sources[operand]
        return NOTHING if "(%rip" in operand else self.announced  # NOTHING for a constant

    def assign(self, operand: str, sites: Sites) -> None:
        """Let a register or stack slot derive from loads. Other memory is not followed."""
        if "(" not in operand or "(%rsp" in operand:
            key = operand if "(" in operand else register(operand)
            self.sources[key] = sites if len(sites) <= MOST_SITES else frozenset(sorted(sites)[-MOST_SITES:])

    def merge(self, others: Sequence[Mapping[str, Sites]]) -> None:
        """Add what jumps bring to this place."""
        for other in others:
            for key, sites in other.items():
                self.sources[key] |= sites

    def call(self, site: int, target: str) -> Sites | None:
        """Follow a call. Return the loads for which it waits if it announces a load, and otherwise None."""
        arguments = NOTHING.union(*(self.sources[name] for name in ARGUMENTS))
        address = self.sources["di"]
        for name in CLOBBERED:
            self.sources.pop(name, None)
        self.announced = NOTHING
        if re.search(r"__tsan_(unaligned_|volatile_)?read", target):
            self.announced = frozenset([site])
            return address | self.decided
        if "__tsan_" not in target and "__sanitizer" not in target:
            self.assign("%rax", arguments)
            self.assign("%xmm0", arguments)
        return None

    def step(self, mnemonic: str, operands: str) -> None:
        """Follow an instruction other than a call."""
        parts = split(operands)
        if mnemonic.startswith("j"):
            if mnemonic != "jmp":
                self.decided = frozenset(sorted(self.decided | self.flags)[-MOST_SITES:])
        elif COMPARES.fullmatch(mnemonic):
            self.flags = NOTHING.union(*map(self.value, parts))
        elif mnemonic.startswith("set"):
            self.assign(parts[0], self.flags)
        elif mnemonic.startswith(("div", "idiv", "mul", "imul")) and len(parts) == 1:
            result = self.sources["ax"] | self.sources["dx"] | self.value(parts[0])
            self.assign("%rax", result)
            self.assign("%rdx", result)
        elif mnemonic.startswith("lea") and len(parts) == 2:
            names = re.findall(r"%\w+", parts[0])
            self.assign(parts[1], NOTHING.union(*(self.sources[register(name)] for name in names if name != "%rsp")))
        elif parts:
            read = parts[:-1] if COPIES.fullmatch(mnemonic) else parts
            result = NOTHING.union(*map(self.value, read))
            if mnemonic.startswith(("xor", "pxor")) and len(set(parts)) == 1:
                result = NOTHING
            if mnemonic.startswith("cmov"):
                result |= self.flags
            elif not COPIES.fullmatch(mnemonic):
                self.flags = result
            self.assign(parts[-1], result)


def waits(function: Sequence[Instruction]) -> dict[int, Sites]:
    """Return the loads for which each load of a function waits. A load is named by the address after its call."""
    found: dict[int, Sites] = defaultdict(lambda: NOTHING)
    arriving: dict[int, list[dict[str, Sites]]] = defaultdict(list)  # what a jump brings to its target
    for _ in range(2):
        # No decision is carried over: the compiler unrolls a loop, and loads for the iterations before it knows whether
        # they take place.
        flow = Dataflow()
        for (address, mnemonic, operands), (after, _, _) in zip(function, function[1:], strict=False):
            flow.merge(arriving.pop(address, []))
            if mnemonic == "call":
                if (sites := flow.call(after, operands)) is not None:
                    found[after] |= sites
                continue
            flow.step(mnemonic, operands)
            if target := re.match(r"([0-9a-f]+)\b", operands if mnemonic.startswith("j") else ""):
                arriving[int(target[1], 16)].append(dict(flow.sources))
    return {site: sites for site, sites in found.items() if sites}
