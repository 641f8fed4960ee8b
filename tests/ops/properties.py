"""Random cases for the property tests: PROPERTY_EXAMPLES fixed ones, or FUZZ_EXAMPLES new ones (`make fuzz`)."""

import os

import torch
from hypothesis import Phase, settings

FUZZ_EXAMPLES = os.environ.get("FUZZ_EXAMPLES")
many_cases = settings(
    max_examples=int(FUZZ_EXAMPLES or os.environ.get("PROPERTY_EXAMPLES", 300)),
    derandomize=FUZZ_EXAMPLES is None,
    deadline=None,
    # There is no shrinking, because a smaller seed is not a simpler case.
    phases=(Phase.explicit, Phase.reuse, Phase.generate),
)


class Cases:
    """Random numbers for the arguments of one case, determined by its seed."""

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
