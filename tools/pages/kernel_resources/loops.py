"""Finds the loops of a kernel in its machine code (SASS) and counts what they execute.

A loop is a natural loop of the control flow graph: the basic blocks that lead to a backward branch without passing the
loop's first block again. Code that the compiler moves out of line, such as the rare path of a division, belongs to the
loop that enters it, wherever it lies. Functions that a loop calls are not counted.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Sequence
from typing import NamedTuple


class Instruction(NamedTuple):
    """One instruction. `predicate` is empty if every thread executes it."""

    address: int
    predicate: str
    opcode: str
    operands: str

    @property
    def target(self) -> int | None:
        """Return the address to which this instruction may branch. A call returns, so it is no branch."""
        if not self.opcode.startswith(("BRA", "WARPSYNC.COLLECTIVE")):
            return None
        match = re.search(r"0x([0-9a-f]+)$", self.operands)
        return int(match[1], 16) if match else None

    @property
    def ends_path(self) -> bool:
        """Return whether no thread goes on to the next instruction."""
        if self.predicate:
            return False
        # A branch with a second operand is taken by some threads only.
        always_branches = self.opcode == "BRA" and "," not in self.operands
        return always_branches or self.opcode in ("EXIT", "BRX", "JMP") or self.opcode.startswith("RET")

    @property
    def global_bytes(self) -> int:
        """Return the bytes that a load from or store to global memory moves, and 0 for other instructions."""
        match = GLOBAL_ACCESS.match(self.opcode)
        if match is None:
            return 0
        return next((WIDTHS[modifier] for modifier in match[1].split(".") if modifier in WIDTHS), 4)


INSTRUCTION = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\d)\s+)?([A-Z][A-Z0-9_.]*)\s*(.*?)\s*;")
#: The modifiers after the name of a load or store. LD and ST are generic: the compiler does not know the memory space.
GLOBAL_ACCESS = re.compile(r"(?:LD|ST)G?((?:\.\w+)*)$")
WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
PACK_BYTES = 16


def parse_instruction(line: str) -> Instruction | None:
    """Parse a line of `cuobjdump --dump-sass`. Return None if it holds no instruction."""
    match = INSTRUCTION.match(line)
    return Instruction(int(match[1], 16), match[2] or "", match[3], match[4]) if match else None


class Loop(NamedTuple):
    """What one loop holds besides its inner loops. Depth 0 is the code outside all loops.

    `instructions` is the number of all instructions. `wide_loads` and `wide_stores` access at least 16 bytes of global
    memory, and `narrow_stores` fewer. `split_stores` are those narrow stores that the same threads execute one after
    another, and that write at least 16 bytes in sum. Such stores write a pack in pieces.

    `shortest` is the number of instructions of the shortest way round the loop that passes some of its wide loads, or
    of its wide stores if it has no wide loads, and `accesses` is how many it passes. The way leaves out what most
    iterations skip, such as the rare path of a division. Both are 0 if there are no wide accesses or an inner loop has
    some, or if no such way avoids the inner loops and calls of functions.
    """

    depth: int
    instructions: int
    wide_loads: int
    wide_stores: int
    narrow_stores: int
    split_stores: int
    shortest: int = 0
    accesses: int = 0

    @property
    def per_access(self) -> float:
        """Return the instructions of the shortest way per wide load, or per wide store if there are no wide loads."""
        return self.shortest / max(self.accesses, 1)


def hot_loop(loops: Sequence[Loop]) -> Loop | None:
    """Return the loop of a kernel that accesses packs and has a shortest way, or None unless there is exactly one."""
    found = [loop for loop in loops if loop.shortest]
    return found[0] if len(found) == 1 else None


def basic_blocks(code: Sequence[Instruction]) -> tuple[list[Sequence[Instruction]], list[list[int]]]:
    """Split code into basic blocks. Return them with the numbers of the blocks that may follow each one."""
    targets = {instruction.target for instruction in code} - {None}
    starts = [
        k
        for k, instruction in enumerate(code)
        if k == 0 or instruction.address in targets or code[k - 1].target is not None or code[k - 1].ends_path
    ]
    blocks = [code[begin:end] for begin, end in zip(starts, [*starts[1:], len(code)], strict=True)]
    number = {block[0].address: k for k, block in enumerate(blocks)}
    successors = []
    for k, block in enumerate(blocks):
        last = block[-1]
        following = [number[last.target]] if last.target in number else []
        if not last.ends_path and k + 1 < len(blocks):
            following.append(k + 1)
        successors.append(following)
    return blocks, successors


def reverse_postorder(successors: list[list[int]]) -> list[int]:
    """Return the blocks that the first block reaches, each before the blocks that only it leads to."""
    order: list[int] = []
    seen = {0}
    stack = [(0, iter(successors[0]))]
    while stack:
        block, following = stack[-1]
        for successor in following:
            if successor not in seen:
                seen.add(successor)
                stack.append((successor, iter(successors[successor])))
                break
        else:
            order.append(block)
            stack.pop()
    return order[::-1]


def immediate_dominators(order: list[int], predecessors: dict[int, list[int]]) -> dict[int, int]:
    """Return the immediate dominator of each block: the last block that every path to it passes.

    The algorithm is that of Cooper, Harvey and Kennedy, "A Simple, Fast Dominance Algorithm", 2001.
    """
    rank = {block: k for k, block in enumerate(order)}
    dominator = {order[0]: order[0]}

    def common(a: int, b: int) -> int:
        while a != b:
            if rank[a] > rank[b]:
                a = dominator[a]
            else:
                b = dominator[b]
        return a

    changed = True
    while changed:
        changed = False
        for block in order[1:]:
            known = [p for p in predecessors[block] if p in dominator]
            new = known[0]
            for other in known[1:]:
                new = common(new, other)
            changed = changed or dominator.get(block) != new
            dominator[block] = new
    return dominator


def loop_bodies(successors: list[list[int]]) -> tuple[list[int], dict[int, set[int]]]:
    """Return the reachable blocks, and the blocks of each loop by the number of its first block."""
    order = reverse_postorder(successors)
    predecessors: dict[int, list[int]] = {block: [] for block in order}
    for block in order:
        for successor in successors[block]:
            predecessors[successor].append(block)
    dominator = immediate_dominators(order, predecessors)

    def dominates(a: int, b: int) -> bool:
        while b not in (a, order[0]):
            b = dominator[b]
        return a == b

    bodies: dict[int, set[int]] = {}
    for block in order:
        for head in successors[block]:
            if not dominates(head, block):
                continue
            body = bodies.setdefault(head, {head})
            pending = [block]
            while pending:
                if (member := pending.pop()) not in body:
                    body.add(member)
                    pending += predecessors[member]
    return order, bodies


def written_predicates(instruction: Instruction) -> list[str]:
    """Return the predicates that an instruction writes, which are among its first two operands."""
    return re.findall(r"^(?:\w+, )?(PR|P\d)\b", instruction.operands) + re.findall(r"^(P\d)\b", instruction.operands)


def split_stores(block: Sequence[Instruction]) -> int:
    """Return the number of narrow stores of a basic block that write at least a pack under one predicate."""
    total = 0
    groups: dict[str, list[int]] = {}

    def close(predicate: str) -> int:
        sizes = groups.pop(predicate, [])
        return len(sizes) if sum(sizes) >= PACK_BYTES else 0

    for instruction in block:
        size = instruction.global_bytes
        if instruction.opcode.startswith("ST") and 0 < size < PACK_BYTES:
            groups.setdefault(instruction.predicate, []).append(size)
        elif not instruction.opcode.startswith(("ST", "LD", "BRA")):
            # A predicate with a new value stands for another condition.
            written = written_predicates(instruction)
            for predicate in [key for key in groups if key and ("PR" in written or key.lstrip("!") in written)]:
                total += close(predicate)
    return total + sum(close(predicate) for predicate in list(groups))


def only_waits(blocks: Sequence[Sequence[Instruction]]) -> bool:
    """Return whether a loop does nothing but let the other threads of the warp go first, as on sm_75.

    Such a loop counts as a part of the loop around it.
    """
    opcodes = [instruction.opcode.split(".")[0] for block in blocks for instruction in block]
    return "YIELD" in opcodes and set(opcodes) <= {"YIELD", "VOTE", "VOTEU", "LOP3", "ULOP3", "BRA", "NOP"}


def counted(block: Sequence[Instruction]) -> int:
    """Return the number of instructions of a basic block, without those that do nothing."""
    return sum(instruction.opcode != "NOP" for instruction in block)


def wide_accesses(block: Sequence[Instruction], kind: str) -> int:
    """Return how many instructions of a basic block load (LD) or store (ST) at least 16 bytes of global memory."""
    return sum(i.opcode.startswith(kind) and i.global_bytes >= PACK_BYTES for i in block)


def shortest_way(
    region: set[int], blocks: Sequence[Sequence[Instruction]], successors: list[list[int]], wide: set[int]
) -> tuple[int, list[int]]:
    """Return the shortest way from a basic block in `wide` through the region back to that block.

    Returns:
        The number of instructions, and the basic blocks. 0 and none if there is no way, or if the shortest one calls a
        function.
    """
    found: list[tuple[int, list[int]]] = []
    for start in wide:
        ways = [(0, [start])]  # instructions before the last block of the way
        done: set[int] = set()
        while ways:
            length, way = heapq.heappop(ways)
            last = way[-1]
            if len(way) > 1 and last == start:
                found.append((length, way[:-1]))
                break
            if last in done:
                continue
            done.add(last)
            for successor in successors[last]:
                if successor in region:
                    heapq.heappush(ways, (length + counted(blocks[last]), [*way, successor]))
    length, way = min(found, default=(0, []))
    if any(instruction.opcode.startswith("CALL") for k in way for instruction in blocks[k]):
        return 0, []
    return length, way


def find_loops(code: Sequence[Instruction]) -> list[Loop]:
    """Return the code outside all loops, and then each loop in the order of its first instruction."""
    blocks, successors = basic_blocks(code)
    order, bodies = loop_bodies(successors)
    regions = [set(order), *(body for _, body in sorted(bodies.items()) if not only_waits([blocks[k] for k in body]))]
    with_loads, with_stores = (
        {k for k, block in enumerate(blocks) if wide_accesses(block, kind)} for kind in ("LD", "ST")
    )
    loops = []
    for k, region in enumerate(regions):
        inner = [body for other, body in enumerate(regions) if other != k and (body < region or k == 0)]
        numbers = region.difference(*inner)
        own = [blocks[block] for block in sorted(numbers)]
        instructions = [instruction for block in own for instruction in block if instruction.opcode != "NOP"]
        loads = [i.global_bytes for i in instructions if i.opcode.startswith("LD") and i.global_bytes]
        stores = [i.global_bytes for i in instructions if i.opcode.startswith("ST") and i.global_bytes]
        wide = region & with_loads or region & with_stores
        kind = "LD" if region & with_loads else "ST"
        length, way = shortest_way(numbers, blocks, successors, wide) if k and wide <= numbers else (0, [])
        loops.append(
            Loop(
                depth=sum(region <= body for body in regions[1:]) if k else 0,
                instructions=len(instructions),
                wide_loads=sum(size >= PACK_BYTES for size in loads),
                wide_stores=sum(size >= PACK_BYTES for size in stores),
                narrow_stores=sum(size < PACK_BYTES for size in stores),
                split_stores=sum(split_stores(block) for block in own),
                shortest=length,
                accesses=sum(wide_accesses(blocks[block], kind) for block in way),
            )
        )
    return loops
