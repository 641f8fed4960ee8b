"""Pairwise IoU, GIoU, DIoU and CIoU of two sets of boxes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import reference
from ._box_formats import check_format, corners
from ._checks import as_epsilon, check_number, check_same_device, refuse_forward_mode
from ._fallback import with_fallback
from ._gradients import converted
from ._pair_gradients import symmetric
from .types import compute_dtype, iou_dtypes


@with_fallback(reference.box_iou)
def box_iou(
    boxes1: Tensor,  # [..., M, 4] floating or integer
    boxes2: Tensor,  # [..., N, 4] floating or integer
    fmt: str = "xyxy",
) -> Tensor:  # [..., M, N]
    """Return the intersection over union of every pair of boxes.

    Args:
        boxes1: Boxes in the format `fmt`, in pixels.
        boxes2: Boxes in the format `fmt`, in pixels. Leading dimensions broadcast with those of `boxes1`.
        fmt: "xyxy"; "xywh" for `(x1, y1, width, height)`; or "cxcywh" for the centre, width and height. Other formats
            than "xyxy" are converted in the compute dtype.

    Returns:
        IoU in float32, or in float64 if an argument is float64. A pair with a degenerate box (a side that is zero,
        negative, infinite or NaN) has IoU 0.

    Raises:
        TypeError: An argument is neither floating nor integer.
        ValueError: A shape is not `[..., *, 4]`, leading dimensions do not broadcast, the devices differ, or `fmt` is
            unknown.
        NotImplementedError: An argument has a forward-mode tangent.

    Empty input gives an empty result. The op is differentiable and deterministic, with bitwise equal results on every
    backend. For boxes with inclusive pixel coordinates, as in legacy checkpoints, add 1 to x2 and y2. Integer boxes are
    computed in float64, which holds coordinates up to 2^53 exactly, and the result is rounded once. If `boxes2` has
    leading dimensions, the kernel is called once for each entry of the batch, and `torch.compile` compiles a graph for
    each size of the batch.

    Source: The result equals `torchvision.ops.box_iou` for valid boxes.
    """
    if fmt != "xyxy":
        check_format(fmt)  # before the shapes, because boxes of a rotated format have more numbers
    return _overlaps("box_iou", boxes1, boxes2, "iou", fmt=fmt)


@with_fallback(reference.generalized_box_iou)
def generalized_box_iou(
    boxes1: Tensor,  # [..., M, 4] floating or integer
    boxes2: Tensor,  # [..., N, 4] floating or integer
) -> Tensor:  # [..., M, N]
    """Return the GIoU of every pair of boxes: the IoU minus the share of their enclosing box that neither covers.

    Args:
        boxes1: `(x1, y1, x2, y2)` in pixels.
        boxes2: `(x1, y1, x2, y2)` in pixels. Leading dimensions broadcast with those of `boxes1`.

    Returns:
        GIoU in float32, or in float64 if an argument is float64. It is in -1..1 for boxes with x1 <= x2 and y1 <= y2.
        The value of a pair with an inverted box has no bounds and no meaning. A pair with a NaN coordinate has NaN.

    Raises:
        TypeError: An argument is neither floating nor integer.
        ValueError: A shape is not `[..., *, 4]`, leading dimensions do not broadcast, or the devices differ.
        NotImplementedError: An argument has a forward-mode tangent.

    A quotient with denominator 0 counts as 0, so boxes without area have finite results. The IoU of two boxes without
    area is 1 if they are equal, else 0. Empty input gives an empty result. The op is differentiable and deterministic.
    Integer boxes and leading dimensions are treated as in `box_iou`.

    Source: Rezatofighi et al. 2019. The result equals `torchvision.ops.generalized_box_iou` for boxes with area.
    """
    return _overlaps("generalized_box_iou", boxes1, boxes2, "giou")


@with_fallback(reference.distance_box_iou)
def distance_box_iou(
    boxes1: Tensor,  # [..., M, 4] floating or integer
    boxes2: Tensor,  # [..., N, 4] floating or integer
    eps: float = 0.0,
) -> Tensor:  # [..., M, N]
    """Return the DIoU of every pair of boxes.

    The DIoU is the IoU minus a penalty: the squared distance of the centres, divided by the squared diagonal of the
    enclosing box.

    Args:
        boxes1: `(x1, y1, x2, y2)` in pixels.
        boxes2: `(x1, y1, x2, y2)` in pixels. Leading dimensions broadcast with those of `boxes1`.
        eps: Number that is added to the denominators of the penalties, not negative. torchvision's default is 1e-7.
            With another value than 0, the result is computed in plain PyTorch, without a kernel.

    Returns:
        DIoU in float32, or in float64 if an argument is float64. It is in -1..1 for boxes with x1 <= x2 and y1 <= y2.
        Inverted and NaN boxes are treated as in `generalized_box_iou`.

    Raises:
        TypeError: An argument is neither floating nor integer.
        ValueError: A shape is not `[..., *, 4]`, leading dimensions do not broadcast, the devices differ, or `eps` is
            negative, infinite or NaN.
        NotImplementedError: An argument has a forward-mode tangent.

    Boxes without area are treated as in `generalized_box_iou`, and integer boxes and leading dimensions as in
    `box_iou`. Empty input gives an empty result. The op is differentiable and deterministic.

    Source: Zheng et al. 2020. For boxes with area the result equals `torchvision.ops.distance_box_iou` with the same
    `eps`.
    """
    return _overlaps("distance_box_iou", boxes1, boxes2, "diou", eps=eps)


@with_fallback(reference.complete_box_iou)
def complete_box_iou(
    boxes1: Tensor,  # [..., M, 4] floating or integer
    boxes2: Tensor,  # [..., N, 4] floating or integer
    eps: float = 0.0,
) -> Tensor:  # [..., M, N]
    """Return the CIoU of every pair of boxes: the DIoU minus a term for the difference of their aspect ratios.

    Args:
        boxes1: `(x1, y1, x2, y2)` in pixels.
        boxes2: `(x1, y1, x2, y2)` in pixels. Leading dimensions broadcast with those of `boxes1`.
        eps: Number that is added to the denominators of the penalties, not negative. torchvision's default is 1e-7.
            With another value than 0, the result is computed in plain PyTorch, without a kernel.

    Returns:
        CIoU in float32, or in float64 if an argument is float64. Inverted and NaN boxes are treated as in
        `generalized_box_iou`.

    Raises:
        TypeError: An argument is neither floating nor integer.
        ValueError: A shape is not `[..., *, 4]`, leading dimensions do not broadcast, the devices differ, or `eps` is
            negative, infinite or NaN.
        NotImplementedError: An argument has a forward-mode tangent.

    Boxes without area are treated as in `generalized_box_iou`, and integer boxes and leading dimensions as in
    `box_iou`. The aspect-ratio angle of a box without width and height is 0. Empty input gives an empty result. The op
    is deterministic, and differentiable with the trade-off factor alpha as a constant.

    Source: Zheng et al. 2020. For boxes with area the result equals `torchvision.ops.complete_box_iou` with the same
    `eps`.
    """
    return _overlaps("complete_box_iou", boxes1, boxes2, "ciou", eps=eps)


def _overlaps(
    op: str,
    boxes1: Tensor,  # [..., M, 4]
    boxes2: Tensor,  # [..., N, 4]
    kind: str,
    *,
    fmt: str = "xyxy",
    eps: float = 0.0,
) -> Tensor:  # [..., M, N]
    """Check the boxes and return the measure `kind` of every pair, in the compute dtype."""
    has_integers = check_number(op, "boxes1", boxes1)
    has_integers |= check_number(op, "boxes2", boxes2)
    shape1, shape2 = boxes1.shape, boxes2.shape
    one_matrix = len(shape1) == len(shape2) == 2
    if not one_matrix or shape1[1] != 4 or shape2[1] != 4:
        _check_shapes(op, boxes1, boxes2)
    check_same_device(op, "boxes2", boxes2, "boxes1", boxes1)
    refuse_forward_mode(op, boxes1, boxes2)
    if eps != 0:
        return _REFERENCES[kind](boxes1, boxes2, as_epsilon(op, eps))
    if has_integers:
        dtype, result = iou_dtypes(boxes1, boxes2)
    else:
        dtype = result = compute_dtype(boxes1, boxes2)
    boxes1, boxes2 = converted(boxes1, dtype), converted(boxes2, dtype)
    if fmt != "xyxy":
        boxes1, boxes2 = corners(boxes1, fmt), corners(boxes2, fmt)
    overlaps: Tensor = _box_iou(boxes1, boxes2, kind) if one_matrix else _batched(boxes1, boxes2, kind)
    return converted(overlaps, result)


def _check_shapes(op: str, boxes1: Tensor, boxes2: Tensor) -> None:
    """Raise ValueError unless the boxes are [..., M, 4] and [..., N, 4], and their leading dimensions broadcast."""
    for name, rows, boxes in (("boxes1", "M", boxes1), ("boxes2", "N", boxes2)):
        if boxes.dim() < 2 or boxes.shape[-1] != 4:
            raise ValueError(f"{op}: {name} must have shape [..., {rows}, 4], got {list(boxes.shape)}")
    try:
        torch.broadcast_shapes(boxes1.shape[:-2], boxes2.shape[:-2])
    except RuntimeError:
        raise ValueError(
            f"{op}: the leading dimensions of boxes1 and boxes2 must broadcast, got shapes {list(boxes1.shape)} and "
            f"{list(boxes2.shape)}"
        ) from None


def _batched(
    boxes1: Tensor,  # [..., M, 4]
    boxes2: Tensor,  # [..., N, 4]
    kind: str,
) -> Tensor:  # [..., M, N]
    """Return the measure `kind` of every pair of each entry of a batch."""
    if boxes2.dim() == 2:  # the rows of all entries make one matrix
        return _box_iou(boxes1.reshape(-1, 4), boxes2, kind).reshape(*boxes1.shape[:-1], boxes2.shape[0])
    lead = torch.broadcast_shapes(boxes1.shape[:-2], boxes2.shape[:-2])
    entries = [boxes.expand(*lead, *boxes.shape[-2:]).flatten(0, -3).unbind() for boxes in (boxes1, boxes2)]
    if not entries[0]:
        return _REFERENCES[kind](boxes1, boxes2)  # an empty batch with its autograd history
    matrices = [_box_iou(first, second, kind) for first, second in zip(*entries, strict=True)]
    return torch.stack(matrices).reshape(*lead, boxes1.shape[-2], boxes2.shape[-2])


_REFERENCES: dict[str, Callable[..., Tensor]] = {
    "iou": reference.box_iou,
    "giou": reference.generalized_box_iou,
    "diou": reference.distance_box_iou,
    "ciou": reference.complete_box_iou,
}


@torch.library.register_fake("retinanet_ops::box_iou")
def _(boxes1: Tensor, boxes2: Tensor, kind: str) -> Tensor:
    return boxes1.new_empty((boxes1.shape[0], boxes2.shape[0]))


@torch.library.register_fake("retinanet_ops::box_iou_backward")
def _(grad: Tensor, boxes1: Tensor, boxes2: Tensor, kind: str) -> Tensor:
    return boxes1.new_empty(boxes1.shape)


_box_iou = symmetric("box_iou", _REFERENCES, Tensor.t)
