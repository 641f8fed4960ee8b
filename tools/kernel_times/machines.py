"""The GPUs whose times are predicted."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Machine:
    """What a GPU offers a launch.

    Attributes:
        name: Name in the tables.
        arch: Architecture whose registers and shared memory of a kernel apply.
        multiprocessors: Number of multiprocessors.
        clock: Cycles per microsecond under load.
        copy: Bytes per microsecond that a large copy reads and writes.
        threads: Most resident threads of a multiprocessor.
        blocks: Most resident blocks of a multiprocessor.
        shared: Bytes of shared memory of a multiprocessor.
    """

    name: str
    arch: str
    multiprocessors: int
    clock: float
    copy: float
    threads: int
    blocks: int
    shared: int

    #: Registers of a multiprocessor, equal on all these machines.
    registers = 65536
    #: Warp instructions that a multiprocessor issues per cycle at best: 80 % of its four schedulers.
    issue_rate = 3.2
    #: Microseconds between the ends of two launches that do nothing.
    launch = 2.2
    #: Cycles between two atomic operations on one address.
    atomic_interval = 2.0


H200 = Machine("H200", "sm_90", 132, 1900, 4.3e6, 2048, 32, 227 * 1024)
A100 = Machine("A100", "sm_80", 108, 1410, 1.75e6, 2048, 32, 163 * 1024)
T4 = Machine("T4", "sm_75", 40, 1200, 0.26e6, 1024, 16, 64 * 1024)
MACHINES = (H200, A100, T4)
