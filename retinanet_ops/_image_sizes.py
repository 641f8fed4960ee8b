"""The forms in which ops take the sizes of images: a tensor, one pair for each image, or one pair for all images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._checks import as_number, check_shape

#: (height, width) of each image, or of all images.
ImageSizes = Tensor | Sequence[Sequence[float]] | Sequence[float]


def as_image_sizes(
    op: str,
    name: str,
    sizes: ImageSizes,
    images: int,
    dtype: torch.dtype,
    beside: Tensor,
) -> Tensor:  # [images, 2]
    """Return the height and width of each image as a tensor.

    Args:
        op: Name of the op, for messages.
        name: Name of the argument, for messages.
        sizes: (height, width) of each image, as a tensor [images, 2] or a list of pairs; or one pair for all images, as
            a tensor [2] or a sequence of two numbers.
        images: Number of images.
        dtype: Floating dtype of the result.
        beside: Tensor whose device the result shares.

    Raises:
        TypeError: The sizes have another type, or a size is not a number.
        ValueError: The sizes are not one pair, or one pair for each image.
    """
    if isinstance(sizes, Tensor):
        if len(sizes.shape) == 1:
            check_shape(op, name, sizes, (2,))
            sizes = sizes.expand(images, 2)
        else:
            check_shape(op, name, sizes, (images, 2))
        if sizes.dtype == dtype and sizes.device == beside.device:
            return sizes
        if sizes.dtype == torch.bool or sizes.is_complex():
            raise TypeError(f"{op}: {name} must be an integer or floating tensor, got {sizes.dtype}")
        return sizes.to(beside.device, dtype)
    pairs = _pairs(op, name, sizes, images)
    if beside.is_cpu and not torch.compiler.is_compiling():
        # One pair for all images is repeated in the list, because `expand` would call the dispatcher once more.
        return torch.tensor(pairs * images if len(pairs) == 1 else pairs, dtype=dtype).reshape(images, 2)
    # torch.full fills on the device. Copying a host tensor would synchronise with the device.
    sides = [torch.full((1,), side, dtype=dtype, device=beside.device) for pair in pairs for side in pair]
    rows = torch.cat(sides) if sides else torch.empty(0, dtype=dtype, device=beside.device)
    return rows.reshape(-1, 2).expand(images, 2)


def _pairs(op: str, name: str, sizes: Any, images: int) -> list[tuple[float, float]]:
    """Return one pair of numbers for all images, or one for each image."""
    if type(sizes) is tuple and len(sizes) == 2:
        height, width = sizes
        if type(height) is type(width) is int:  # the usual case, without the checks of numbers
            return [(float(height), float(width))]
    if not hasattr(sizes, "__len__") or isinstance(sizes, str):
        raise TypeError(f"{op}: {name} must be a tensor or (height, width) pairs, got {type(sizes).__name__}")
    shared = len(sizes) == 2 and not any([_is_row(side) for side in sizes])
    rows = [sizes] if shared else sizes
    if not (shared or len(sizes) == images) or not all([_is_row(row) and len(row) == 2 for row in rows]):
        raise ValueError(
            f"{op}: {name} must be one (height, width) pair, a pair for each of the {images} images or a tensor "
            f"[{images}, 2], got {sizes!r}"
        )
    return [(as_number(op, name, height), as_number(op, name, width)) for height, width in rows]


def _is_row(value: Any) -> bool:
    """Return whether the value is a sequence, such as a pair, rather than a number."""
    if isinstance(value, (int, float)):
        return False
    return value.dim() > 0 if isinstance(value, Tensor) else hasattr(value, "__len__")
