"""GIoU, DIoU and CIoU losses of pairs of boxes."""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from ._checks import as_epsilon, check_number, check_same_device, refuse_forward_mode
from ._fallback import with_fallback
from ._gradients import converted
from ._pair_gradients import symmetric
from ._reduction import reduced
from .types import compute_dtype, iou_dtypes


@with_fallback(reference.generalized_box_iou_loss)
def generalized_box_iou_loss(
    boxes1: Tensor,  # [..., 4] floating or integer
    boxes2: Tensor,  # [..., 4] floating or integer
    reduction: str = "none",
    eps: float = 0.0,
) -> Tensor:  # [...], or [] for "sum" and "mean"
    """Return 1 minus the GIoU of each pair of boxes, which `generalized_box_iou` defines.

    Args:
        boxes1: `(x1, y1, x2, y2)` in pixels, usually predictions.
        boxes2: `(x1, y1, x2, y2)` in pixels, usually ground truth. The leading dimensions broadcast with those of
            `boxes1`.
        reduction: "none", "sum" or "mean". The mean of no pairs is 0.
        eps: Number that is added to the denominators, not negative. torchvision's default is 1e-7. With another value
            than 0, the result is computed in plain PyTorch, without a kernel.

    Returns:
        The loss of each pair, or the sum or mean, in float32, or in float64 if an argument is float64. Each loss is in
        0..2 for boxes with x1 <= x2 and y1 <= y2.

    Raises:
        TypeError: An argument is neither floating nor integer.
        ValueError: A shape is not `[..., 4]`, leading dimensions do not broadcast, the devices differ, `reduction` is
            unknown, or `eps` is negative, infinite or NaN.
        NotImplementedError: An argument has a forward-mode tangent.

    The loss is differentiable in both arguments. Boxes without area, inverted and NaN boxes, and integer boxes are
    treated as in `generalized_box_iou`. The loss of each pair is deterministic. The sum and the mean are those of
    PyTorch, whose order on the CPU depends on the number of threads. `dense_box_loss` computes the same loss from the
    outputs of a box head.

    Source: Rezatofighi et al. 2019. For boxes with area the result equals `torchvision.ops.generalized_box_iou_loss`
    with the same `eps`.
    """
    return _loss("generalized_box_iou_loss", boxes1, boxes2, "giou", reduction, eps)


@with_fallback(reference.distance_box_iou_loss)
def distance_box_iou_loss(
    boxes1: Tensor,  # [..., 4] floating or integer
    boxes2: Tensor,  # [..., 4] floating or integer
    reduction: str = "none",
    eps: float = 0.0,
) -> Tensor:  # [...], or [] for "sum" and "mean"
    """Return 1 minus the DIoU of each pair of boxes, which `distance_box_iou` defines.

    Args:
        boxes1: `(x1, y1, x2, y2)` in pixels, usually predictions.
        boxes2: `(x1, y1, x2, y2)` in pixels, usually ground truth. The leading dimensions broadcast with those of
            `boxes1`.
        reduction: "none", "sum" or "mean". The mean of no pairs is 0.
        eps: Number that is added to the denominators, not negative. torchvision's default is 1e-7. With another value
            than 0, the result is computed in plain PyTorch, without a kernel.

    Returns:
        The loss of each pair, or the sum or mean, in float32, or in float64 if an argument is float64. Each loss is in
        0..2 for boxes with x1 <= x2 and y1 <= y2.

    Raises:
        TypeError: An argument is neither floating nor integer.
        ValueError: A shape is not `[..., 4]`, leading dimensions do not broadcast, the devices differ, `reduction` is
            unknown, or `eps` is negative, infinite or NaN.
        NotImplementedError: An argument has a forward-mode tangent.

    Unusual boxes, gradients and determinism are as in `generalized_box_iou_loss`.

    Source: Zheng et al. 2020. For boxes with area the result equals `torchvision.ops.distance_box_iou_loss` with the
    same `eps`.
    """
    return _loss("distance_box_iou_loss", boxes1, boxes2, "diou", reduction, eps)


@with_fallback(reference.complete_box_iou_loss)
def complete_box_iou_loss(
    boxes1: Tensor,  # [..., 4] floating or integer
    boxes2: Tensor,  # [..., 4] floating or integer
    reduction: str = "none",
    eps: float = 0.0,
) -> Tensor:  # [...], or [] for "sum" and "mean"
    """Return 1 minus the CIoU of each pair of boxes, which `complete_box_iou` defines.

    Args:
        boxes1: `(x1, y1, x2, y2)` in pixels, usually predictions.
        boxes2: `(x1, y1, x2, y2)` in pixels, usually ground truth. The leading dimensions broadcast with those of
            `boxes1`.
        reduction: "none", "sum" or "mean". The mean of no pairs is 0.
        eps: Number that is added to the denominators, not negative. torchvision's default is 1e-7. With another value
            than 0, the result is computed in plain PyTorch, without a kernel.

    Returns:
        The loss of each pair, or the sum or mean, in float32, or in float64 if an argument is float64. Each loss is in
        0..3 for boxes with x1 <= x2 and y1 <= y2.

    Raises:
        TypeError: An argument is neither floating nor integer.
        ValueError: A shape is not `[..., 4]`, leading dimensions do not broadcast, the devices differ, `reduction` is
            unknown, or `eps` is negative, infinite or NaN.
        NotImplementedError: An argument has a forward-mode tangent.

    The trade-off factor alpha is a constant in the gradient. Unusual boxes, gradients and determinism are otherwise as
    in `generalized_box_iou_loss`.

    Source: Zheng et al. 2020. For boxes with area the result equals `torchvision.ops.complete_box_iou_loss` with `eps`
    1e-7. For other values, torchvision adds 1e-7 to the denominators other than alpha's.
    """
    return _loss("complete_box_iou_loss", boxes1, boxes2, "ciou", reduction, eps)


def _loss(
    op: str,
    boxes1: Tensor,  # [..., 4]
    boxes2: Tensor,  # [..., 4]
    kind: str,
    reduction: str,
    eps: float,
) -> Tensor:  # [...] or []
    """Check the arguments and return the loss `kind` of each pair, or its sum or mean."""
    has_integers = check_number(op, "boxes1", boxes1)
    has_integers |= check_number(op, "boxes2", boxes2)
    pairs = boxes1.shape[:-1]
    one_list = len(pairs) == 1 and boxes1.shape == boxes2.shape and boxes1.shape[1] == 4
    if not one_list:
        pairs = _pairs(op, boxes1, boxes2)
    check_same_device(op, "boxes2", boxes2, "boxes1", boxes1)
    refuse_forward_mode(op, boxes1, boxes2)
    if eps != 0:
        return _REFERENCES[kind](boxes1, boxes2, reduction, as_epsilon(op, eps))
    if has_integers:
        dtype, result = iou_dtypes(boxes1, boxes2)
    else:
        dtype = result = compute_dtype(boxes1, boxes2)
    boxes1, boxes2 = converted(boxes1, dtype), converted(boxes2, dtype)
    if not one_list:
        boxes1, boxes2 = (boxes.expand(*pairs, 4).reshape(-1, 4) for boxes in (boxes1, boxes2))
    losses: Tensor = converted(_box_iou_loss(boxes1, boxes2, kind), result)
    if not one_list:
        losses = losses.reshape(pairs)
    return reduced(op, losses, reduction)


def _pairs(op: str, boxes1: Tensor, boxes2: Tensor) -> torch.Size:
    """Return the leading dimensions of the pairs; raise ValueError for other shapes."""
    for name, boxes in (("boxes1", boxes1), ("boxes2", boxes2)):
        if boxes.dim() < 1 or boxes.shape[-1] != 4:
            raise ValueError(f"{op}: {name} must have shape [..., 4], got {list(boxes.shape)}")
    try:
        return torch.broadcast_shapes(boxes1.shape[:-1], boxes2.shape[:-1])
    except RuntimeError:
        raise ValueError(
            f"{op}: the leading dimensions of boxes1 and boxes2 must broadcast, got shapes {list(boxes1.shape)} and "
            f"{list(boxes2.shape)}"
        ) from None


_REFERENCES = {
    "giou": reference.generalized_box_iou_loss,
    "diou": reference.distance_box_iou_loss,
    "ciou": reference.complete_box_iou_loss,
}


@torch.library.register_fake("retinanet_ops::box_iou_loss")
def _(boxes1: Tensor, boxes2: Tensor, kind: str) -> Tensor:
    return boxes1.new_empty(boxes1.shape[:1])


@torch.library.register_fake("retinanet_ops::box_iou_loss_backward")
def _(grad: Tensor, boxes1: Tensor, boxes2: Tensor, kind: str) -> Tensor:
    return boxes1.new_empty(boxes1.shape)


_box_iou_loss = symmetric("box_iou_loss", _REFERENCES, lambda grad: grad)
