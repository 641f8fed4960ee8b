"""Turns what the emulator counted for a launch into a predicted time."""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass
from typing import Any

from tools.kernel_times.machines import Machine
from tools.kernel_times.resources import UNKNOWN, Resources

WARP = 32
#: Fewer atomic operations on one address than this never bind a launch.
MANY_ATOMICS = 1000


@dataclass(frozen=True)
class Prediction:
    """Predicted time of one launch on one machine, in microseconds, and what bounds it.

    Attributes:
        kernel: Name of the kernel.
        blocks: Number of blocks.
        threads: Threads of a block.
        multiprocessors: Number of multiprocessors that hold a block.
        resident_warps: Warps that a multiprocessor holds at once.
        instructions: Warp instructions of all blocks.
        bytes: Bytes read from and written to memory by all blocks.
        span: Time of the longest block.
        one_warp: Share of the blocks' spans in which one warp of several is busy.
        terms: Lower bounds of the time by the resource that sets them.
        launch: Cost of a launch, which is a part of `us`.
        registers: Registers of a thread; assumed if `known` is false.
        known: Whether the table of resources has this kernel.
        hot_loop: Instructions of the hot loop per 128-bit access, in the machine code and as estimated by the emulator.
            None if all instructions are those that the emulator estimates.
    """

    kernel: str
    blocks: int
    threads: int
    multiprocessors: int
    resident_warps: int
    instructions: float
    bytes: float
    span: float
    one_warp: float
    terms: dict[str, float]
    launch: float
    registers: int
    known: bool
    hot_loop: tuple[float, float] | None = None

    @property
    def us(self) -> float:
        """Return the predicted time."""
        return max(self.terms.values()) + self.launch

    @property
    def binds(self) -> str:
        """Return the name of the term that is the largest."""
        return max(self.terms, key=self.terms.__getitem__)


def resident_blocks(machine: Machine, threads: int, registers: int, shared: int) -> int:
    """Return how many blocks a multiprocessor holds at once."""
    warps = math.ceil(threads / WARP)
    registers_per_warp = math.ceil(registers / 8) * 8 * WARP
    return max(
        min(
            machine.threads // threads,
            machine.registers // (registers_per_warp * warps),
            machine.shared // max(shared, 1),
            machine.blocks,
        ),
        1,
    )


def makespan(spans: list[float], slots: int) -> float:
    """Return when the last block ends, if each starts as soon as a slot is free."""
    free = [0.0] * min(slots, len(spans))
    for span in spans:
        heapq.heapreplace(free, free[0] + span)
    return max(free)


def predict(launch: Any, machine: Machine, resources: Resources, instance: str) -> Prediction:
    """Predict the time of an emulated launch.

    The emulator estimates the instructions. If the machine code has the kernel's hot loop, the number of instructions
    on its shortest way replaces the estimate for the shortest iteration. All else stays as estimated: the code outside
    the loop, and what longer iterations execute beyond the shortest one.

    Args:
        launch: Launch of the emulator's variant `cost`.
        machine: GPU.
        resources: Registers, shared memory and loops of the kernels.
        instance: Name of the kernel with its template arguments.
    """
    cost, traffic = launch.cost, launch.traffic
    threads = math.prod(launch.block)
    blocks = math.prod(launch.grid)
    factor = blocks / len(cost.spans)  # emulated blocks stand for all
    usage = resources.of(instance, machine.arch)
    registers, shared = (usage or UNKNOWN).registers, (usage or UNKNOWN).shared
    resident = resident_blocks(machine, threads, registers, shared + launch.shared_bytes)
    multiprocessors = min(machine.multiprocessors, blocks)
    slots = machine.multiprocessors * resident
    instructions, spans, hot_loop = cost.warp_instructions, list(cost.spans), None
    if loop := resources.hot_loop(instance, machine.arch):
        wide = cost.wide_loads if loop.wide_loads else cost.wide_stores
        estimate = wide.shortest(loop.accesses)
        hot_loop = (loop.per_access, estimate)
        if estimate:
            more = loop.per_access - estimate
            instructions += wide.count * more
            spans = [span + cycles * more for span, cycles in zip(spans, wide.cycles, strict=True)]
    longest, mean = max(spans), sum(spans) / len(spans)
    if blocks == len(spans):
        latency = makespan(spans, slots)
    else:
        latency = max(longest, mean * math.ceil(blocks / slots))
    instructions *= factor
    # Not scaled: the images that are not emulated have addresses of their own.
    atomics = cost.hottest_atomics if cost.hottest_atomics > MANY_ATOMICS else 0.0
    data = (traffic.bytes_fetched + traffic.bytes_written) * factor
    return Prediction(
        kernel=launch.kernel,
        blocks=blocks,
        threads=threads,
        multiprocessors=multiprocessors,
        resident_warps=min(resident, math.ceil(blocks / machine.multiprocessors)) * math.ceil(threads / WARP),
        instructions=instructions,
        bytes=data,
        span=longest / machine.clock,
        one_warp=cost.one_warp_cycles / sum(cost.spans),
        terms={
            "bandwidth": data / machine.copy,
            "issue": instructions / (multiprocessors * machine.issue_rate) / machine.clock,
            "latency": latency / machine.clock,
            "atomics": atomics * machine.atomic_interval / machine.clock,
        },
        launch=machine.launch,
        registers=registers,
        known=usage is not None,
        hot_loop=hot_loop,
    )
