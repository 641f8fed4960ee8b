"""The global random generators with a seed for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Seed the global generators of the CPU and of a device, and restore them at the end.

    Args:
        seed: The seed, below 2**63.
        device: A device whose generator is seeded as well, or None. This does not synchronise with a GPU.
    """
    gpu = device if device is not None and device.type == "cuda" else None
    with torch.random.fork_rng([] if gpu is None else [gpu]):
        # torch.manual_seed would also seed the generators of other GPUs.
        torch.default_generator.manual_seed(seed)
        if gpu is not None:
            with torch.cuda.device(gpu):
                torch.cuda.manual_seed(seed)
        yield
