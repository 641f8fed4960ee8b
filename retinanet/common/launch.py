"""What the environment says about the processes that a launcher such as torchrun has started together."""

from __future__ import annotations

import os

# The variables of torchrun and accelerate launch, and of the launchers of MPI.
_PROCESSES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")


def launched_processes() -> int:
    """Return the number of processes that were started together; 1 without a launcher."""
    return max(1, _first(_PROCESSES, 1))


def launched_rank() -> int:
    """Return the number of this process among those that were started together; 0 is the main process."""
    return _first(_RANKS, 0) if launched_processes() > 1 else 0


def _first(names: tuple[str, ...], default: int) -> int:
    values = (os.environ.get(name, "") for name in names)
    return next((int(value) for value in values if value.isdecimal()), default)
