"""How many cases the property tests try: 300 fixed ones, or as many new ones as FUZZ_EXAMPLES says (`make fuzz`)."""

import os

import torch
from hypothesis import Phase, settings

WANTED = os.environ.get("FUZZ_EXAMPLES")
many_cases = settings(
    max_examples=int(WANTED or 300),
    derandomize=WANTED is None,
    deadline=None,
    # A smaller seed is no simpler case.
    phases=(Phase.explicit, Phase.reuse, Phase.generate),
)


class Cases:
    """Random arguments of one case, from its seed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def integer(self, low, high):
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def integers(self, count, low, high):
        return torch.randint(low, high + 1, (count,), generator=self.generator)

    def one_of(self, *values):
        return values[self.integer(0, len(values) - 1)]

    def uniform(self, *shape, low=0.0, high=1.0):
        return torch.rand(*shape, generator=self.generator) * (high - low) + low
