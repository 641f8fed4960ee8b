"""Inputs and tolerances that the tests of several ops share."""

import torch
from torch import Tensor

FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

# Relative tolerance: one rounding to the dtype after a few roundings in float32.
RTOL = {torch.float64: 1e-13, torch.float32: 4e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
# Absolute tolerance: the smallest normal number, below which the dtype loses precision.
ATOL = {dtype: torch.finfo(dtype).tiny for dtype in FLOATING}

# Sizes around those of packs, warps, blocks and buffers.
SIZES = (0, 1, 2, 31, 32, 33, 63, 64, 65, 255, 256, 257, 1023, 1024, 1025)


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype | None = None, scale: float = 1.0) -> None:
    """Compare with an oracle in float64 at the tolerance of `dtype`, by default the dtype of `actual`."""
    dtype = dtype or actual.dtype
    torch.testing.assert_close(
        actual.double().cpu(),
        expected.double().cpu(),
        rtol=scale * RTOL[dtype],
        atol=scale * ATOL[dtype],
        equal_nan=True,
    )


def random_boxes(*shape: int, size: float = 100.0, min_side: float = 1.0, max_side: float = 40.0) -> Tensor:
    """Return valid float32 boxes `[*shape, 4]` within about `size` pixels."""
    corner = torch.rand(*shape, 2) * size
    return torch.cat((corner, corner + min_side + torch.rand(*shape, 2) * (max_side - min_side)), dim=-1)


def unaligned(t: Tensor) -> Tensor:
    """Return the same values in a contiguous tensor that starts one element after an aligned address."""
    buffer = t.new_empty(t.numel() + 1)
    view = buffer[1:].view(t.shape)
    view.copy_(t)
    return view


DEGENERATE_BOXES = torch.tensor(
    [
        [5.0, 5.0, 5.0, 9.0],  # no width
        [5.0, 5.0, 9.0, 5.0],  # no height
        [9.0, 5.0, 5.0, 9.0],  # inverted
        [9.0, 9.0, 5.0, 5.0],  # inverted in x and y, with a positive product of sides
        [float("nan"), 5.0, 9.0, 9.0],
        [5.0, 5.0, float("inf"), 9.0],
        [5.0, 5.0, 9.0, float("inf")],
        [-float("inf"), -float("inf"), float("inf"), float("inf")],
        [5.0, 5.0, 9.0, float("nan")],
    ]
)
