"""Estimates how many instructions of a GPU each basic block of the emulated kernels stands for.

    python -m tools.emulator.cost_weights LIBRARY

The program disassembles a library of the variant `cost` and prints one line per basic block, `block OFFSET WEIGHT`, and
one per load that waits for others, `load OFFSET OFFSET ...`. A basic block begins after a call of
`__sanitizer_cov_trace_pc`, a load after a call of `__tsan_read*`.

A rule gives the weight of an instruction of x86-64. Moves are free, because a GPU has enough registers. 64-bit integers
take two instructions or more, and a division takes what nvcc generates for it. A multiplication counts less than one,
because about half of them become part of a fused multiply-add.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterable, Iterator

from tools.emulator.cost_dataflow import Instruction, waits

#: Number of instructions in the machine code of hot loops for a GPU, over the number by these rules.
CALIBRATION = 0.85

#: Functions of the emulator, whose calls have a weight of their own. The lambdas inside them are instrumented, too.
SHIM = re.compile(r"\bemulator::|\b__(shfl|ballot|any_sync|all_sync|reduce|sync)|\batomic[A-Z]")

#: Weights of calls, by the first pattern that the name of the called function contains.
CALLS = [
    (r"__tsan_(func|init|vptr)|__sanitizer", 0.0),
    (r"__tsan_|__(st|ld)(c[sgv]|g|wb|wt)\b", 2.0),  # the access and a part of its address
    (r"_as_(u?int|float|double|longlong)|(to|from)_word", 0.0),
    (r"thread_index|block_index|block_size|grid_size", 0.5),
    (r"__sync(threads|warp)", 1.0),
    (r"shfl|ballot|_sync|reduce|atomic", 2.0),
    (r"\b(expf?|logf?|log1pf?|powf?|atan2f?|sqrtf?|ceilf?)@", 20.0),
    (r"", 1.0),
]

#: Weights of the other instructions, by the first pattern that matches the whole mnemonic: for operands of at most 32
#: bits and for operands of 64 bits.
INSTRUCTIONS = [
    (
        r"v?mov.*|push|pop|nop.*|endbr64|ret|leave|c(lt|wt|qt)[qlo]|c(ltd|dq|qo|wde|dqe)|data16|cs|xchg|ud2|hlt",
        0.0,
        0.0,
    ),
    (r"lea.*", 1.0, 1.0),
    (r"i?div[lq]?", 18.0, 28.0),
    (r"imul.*|mul[lq]?", 1.0, 3.5),
    (r"mul[sp]s", 0.6, 0.6),
    (r"div[sp]s", 9.0, 9.0),
    (r"div[sp]d", 20.0, 20.0),
    (r"sqrtss", 8.0, 8.0),
    (r"(add|sub|mul|max|min|u?comi|and|andn|or|xor)[sp]d", 1.5, 1.5),
    (r"jmp", 0.3, 0.3),
    (r"(cmp|test)[bwlq]?", 1.0, 1.5),
    (r"(add|sub|adc|sbb|and|or|xor|shl|shr|sar|neg|not|inc|dec)[bwlq]?", 1.0, 2.0),
    (r".*", 1.0, 1.0),
]
COMPILED = [(re.compile(pattern), narrow, wide) for pattern, narrow, wide in INSTRUCTIONS]

STACK = re.compile(r"\(%rsp|\(%rbp|\(%rip")
WIDE_REGISTER = re.compile(r"%r([a-d]x|[sd]i|[sb]p|\d+)\b")


def instruction_weight(mnemonic: str, operands: str) -> float:
    """Return the weight of one instruction."""
    if mnemonic == "call":
        return next(weight for pattern, weight in CALLS if re.search(pattern, operands))
    if mnemonic.startswith("lea") and STACK.search(operands):
        return 0.0  # the address of a local variable, which is in registers on a GPU
    registers = re.sub(r"\([^)]*\)", "", operands)  # without those of an address
    if "%rsp" in registers:
        return 0.0
    if mnemonic in ("xor", "xorps", "xorpd", "pxor") and len({part.strip() for part in registers.split(",")}) == 1:
        return 0.0  # zeroes a register
    wide = bool(WIDE_REGISTER.search(registers)) or (mnemonic.endswith("q") and "%" not in registers)
    return next(weights[wide] for pattern, *weights in COMPILED if pattern.fullmatch(mnemonic))


def parse(line: str) -> Instruction | None:
    """Return the address, mnemonic and operands of a line of objdump, without prefixes. None for other lines."""
    match = re.match(r"\s*([0-9a-f]+):\s+(?:(?:notrack|bnd|lock|rep|repz|repnz)\s+)*(\S+)\s*([^#]*)", line)
    return (int(match[1], 16), match[2], match[3].strip()) if match else None


def functions(lines: Iterable[str]) -> Iterator[tuple[str, list[Instruction]]]:
    """Yield the name and the instructions of each function from the lines that objdump prints."""
    name = ""
    instructions: list[Instruction] = []
    for line in lines:
        if head := re.match(r"[0-9a-f]+ <(.*)>:", line):
            yield name, instructions
            name, instructions = head[1], []
        elif instruction := parse(line):
            instructions.append(instruction)
    yield name, instructions


def weights(name: str, function: Iterable[Instruction]) -> dict[int, float]:
    """Return the weight of each basic block of a function by its offset."""
    shim = bool(SHIM.search(name))
    found: dict[int, float] = {}
    offset: int | None = None  # of the current basic block
    begins = False
    for address, mnemonic, operands in function:
        if begins:
            offset = address
            found[offset] = 0.0
        begins = mnemonic == "call" and "__sanitizer_cov_trace_pc" in operands
        if offset is not None and not begins and not shim:
            found[offset] += instruction_weight(mnemonic, operands) * CALIBRATION
    return found


def main() -> None:
    """Print the table of the library that the command line names."""
    command = ["objdump", "--disassemble", "--no-show-raw-insn", "--demangle", sys.argv[1]]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        for name, function in functions(process.stdout):
            for offset, weight in weights(name, function).items():
                print(f"block {offset:x} {weight:.2f}")
            for site, others in waits(function).items():
                print("load", " ".join(f"{offset:x}" for offset in (site, *sorted(others))))
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed with exit status {process.returncode}")


if __name__ == "__main__":
    main()
