"""Inputs and tolerances that the op tests share."""

import torch
from torch import Tensor

FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

# Relative tolerance of one rounding to the dtype, plus the few roundings of the float32 arithmetic before it.
RTOL = {torch.float64: 1e-13, torch.float32: 4e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
# Below this a dtype has no full precision any more (its least normal number).
ATOL = {dtype: torch.finfo(dtype).tiny for dtype in FLOATING}

# Around the widths of packs, warps, blocks and buffers.
SIZES = (0, 1, 2, 31, 32, 33, 63, 64, 65, 255, 256, 257, 1023, 1024, 1025)


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype | None = None, scale: float = 1.0) -> None:
    """Compares with an oracle in float64, at the tolerance of `dtype` (that of `actual`)."""
    dtype = dtype or actual.dtype
    torch.testing.assert_close(
        actual.double().cpu(),
        expected.double().cpu(),
        rtol=scale * RTOL[dtype],
        atol=scale * ATOL[dtype],
        equal_nan=True,
    )


def random_boxes(*shape: int, size: float = 100.0, min_side: float = 1.0, max_side: float = 40.0) -> Tensor:
    """Valid boxes `[*shape, 4]` float32 within about `size` pixels."""
    corner = torch.rand(*shape, 2) * size
    return torch.cat((corner, corner + min_side + torch.rand(*shape, 2) * (max_side - min_side)), dim=-1)


def unaligned(t: Tensor) -> Tensor:
    """The same values in a contiguous tensor that starts one element after an aligned address."""
    buffer = t.new_empty(t.numel() + 1)
    view = buffer[1:].view(t.shape)
    view.copy_(t)
    return view


DEGENERATE_BOXES = torch.tensor(
    [
        [5.0, 5.0, 5.0, 9.0],  # no width
        [5.0, 5.0, 9.0, 5.0],  # no height
        [9.0, 5.0, 5.0, 9.0],  # inverted
        [9.0, 9.0, 5.0, 5.0],  # doubly inverted: a positive product of sides
        [float("nan"), 5.0, 9.0, 9.0],
        [5.0, 5.0, float("inf"), 9.0],
        [5.0, 5.0, 9.0, float("inf")],
        [-float("inf"), -float("inf"), float("inf"), float("inf")],
        [5.0, 5.0, 9.0, float("nan")],
    ]
)
