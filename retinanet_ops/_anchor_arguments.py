"""Conversion of anchors to the three arguments that schemas take, and back."""

from __future__ import annotations

import torch
from torch import Tensor

from ._checks import as_rows, check_same_device
from ._gradients import converted
from .anchors import AnchorArguments, AnchorGrid


def anchor_arguments(
    op: str,
    anchors: Tensor | AnchorGrid,
    images: int,
    rows: int | None,
    dtype: torch.dtype,
    beside: tuple[str, Tensor],
) -> AnchorArguments:
    """Check anchors against the batch and return them as the arguments of a schema.

    Args:
        op: Name of the op, for messages.
        anchors: An `AnchorGrid`, or boxes [A, 4] or [N, A, 4].
        images: Number of images N of the batch.
        rows: Number of anchors A in the other arguments, or None to accept any number.
        dtype: Compute dtype, to which explicit anchors are converted. Base anchors of a grid stay float32.
        beside: Name and value of an argument whose device the anchors must share.

    Returns:
        The anchors as the three arguments of a schema.

    Raises:
        TypeError: The anchors are neither a floating or integer tensor nor an `AnchorGrid`.
        ValueError: The shape, the number or the device of the anchors does not match the other arguments.
    """
    if isinstance(anchors, Tensor):
        anchors = as_rows(op, "anchors", anchors)
        if anchors.dim() == 3 and anchors.shape[0] != images:
            raise ValueError(f"{op}: anchors must have shape [A, 4] or [{images}, A, 4], got {list(anchors.shape)}")
        arguments, count = AnchorArguments(converted(anchors, dtype), [], []), anchors.shape[-2]
    elif isinstance(anchors, AnchorGrid):
        arguments, count = anchors.arguments_and_count()
    else:
        raise TypeError(f"{op}: anchors must be a tensor or an AnchorGrid, got {type(anchors).__name__}")
    if rows is not None and rows != count:
        raise ValueError(f"{op}: expected one row for each of the {count} anchors, got {rows}")
    check_same_device(op, "anchors", arguments.tensor, *beside)
    return arguments


def anchors_of(arguments: AnchorArguments) -> Tensor | AnchorGrid:
    """Return the anchors that the three arguments of a schema stand for."""
    tensor, sizes, steps = arguments
    if not sizes:
        return tensor
    return AnchorGrid(
        base_anchors=tensor,
        anchors_per_cell=tuple(sizes[2::3]),
        grid_sizes=tuple(zip(sizes[0::3], sizes[1::3], strict=True)),
        strides=tuple(zip(steps[0::4], steps[1::4], strict=True)),
        offsets=tuple(zip(steps[2::4], steps[3::4], strict=True)),
    )
