"""Box losses computed from the outputs of a box head, without a permuted or concatenated copy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from . import reference
from ._anchor_arguments import anchor_arguments, anchors_of
from ._checks import (
    as_coder_weights,
    as_finite,
    as_log_ratio_bounds,
    check_floating,
    check_integer,
    check_same_device,
    check_shape,
    refuse_forward_mode,
)
from ._fallback import with_fallback
from ._gradients import converted, differentiable
from ._heads import check_levels, empty_like_levels, second_derivatives
from .anchors import AnchorArguments, AnchorGrid
from .constants import BOX_LOSS_KINDS, MAX_LOG_RATIO
from .types import compute_dtype


@with_fallback(reference.dense_box_loss)
def dense_box_loss(
    box_deltas: Sequence[Tensor],  # L tensors [N, A*4, H, W] floating
    anchors: Tensor | AnchorGrid,  # [A, 4] or [N, A, 4] floating or integer
    gt_boxes: Tensor,  # [N, M, 4] floating
    matches: Tensor,  # [N, A] integer
    *,
    kind: str = "l1",
    beta: float = 1.0 / 9,
    coder_weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
    max_log_ratio: float | None = MAX_LOG_RATIO,
    offset: float = 0.0,
) -> Tensor:  # [N]
    """Return the box loss of each image, summed over its matched anchors.

    The op reads the levels as the head wrote them: it needs no permute, cat, gather or boolean index.

    Args:
        box_deltas: Outputs of the box head, channel `a * 4 + {dx, dy, dw, dh}`. All levels have one dtype: float16,
            bfloat16, float32 or float64. A level is contiguous or channels_last; any other layout is copied.
        anchors: Boxes that all images share, boxes of each image, or an `AnchorGrid`, in the package's row order.
        gt_boxes: Padded ground truth, `(x1, y1, x2, y2)` in pixels.
        matches: Ground-truth index of each anchor, or a negative number for no match, as in `Targets.matches`.
        kind: "l1" and "smooth_l1" compare the four deltas with the deltas of the ground truth. "giou", "diou" and
            "ciou" compare the decoded box with the ground truth.
        beta: Difference at which smooth L1 turns from quadratic to linear; 0 gives L1.
        coder_weights: Factors wx, wy, ww and wh of the deltas.
        max_log_ratio: Upper bound of `dw / ww` and `dh / wh` in decoding, log(1000 / 16) by default. None sets no
            bound.
        offset: 1 for the coders of legacy checkpoints, in which the width of a box is `x2 - x1 + 1`.

    Returns:
        The sum of each image, in float32, or in float64 for float64 deltas. For the mean over positives, divide it by
        `Targets.num_positive.clamp(min=1)`.

    Raises:
        TypeError: A tensor has a wrong dtype.
        ValueError: Shapes do not fit each other, or an option is out of its range.
        NotImplementedError: A level or the anchors have a forward-mode tangent.

    Anchors and ground truth are converted to the dtype of the result. A match of M or more, NaN deltas and NaN boxes
    make the loss of their image and the gradient of their anchor NaN. In "giou", "diou" and "ciou" a quotient with
    denominator 0 counts as 0, so boxes without area have finite losses and gradients. The IoU of two boxes without area
    is 1 if they are equal, else 0. "l1" and "smooth_l1" need anchors and ground truth with area; the deltas of other
    boxes are infinite or NaN. Empty input gives 0.

    The op is differentiable in `box_deltas`. The backward kernel writes each gradient in the layout of its level, and
    the reference computes second derivatives. In "ciou" the trade-off factor alpha counts as a constant. For the
    backward pass the inputs are saved, and one bit per anchor that says whether the anchor has a match.

    The op is deterministic. Sums are taken in a fixed order that does not depend on the number of threads.

    Source: Girshick, "Fast R-CNN", 2015, eq. 3; Rezatofighi et al., "Generalized Intersection over Union", 2019; Zheng
    et al., "Distance-IoU Loss", 2020. For boxes with area the losses equal torchvision's without its epsilon of 1e-7.
    """
    op = "dense_box_loss"
    check_levels(op, "box_deltas", box_deltas, "A*4")
    images, dtype, rows = box_deltas[0].shape[0], compute_dtype(box_deltas[0]), 0
    for i, level in enumerate(box_deltas):
        _, channels, height, width = level.shape
        if channels % 4:
            raise ValueError(f"{op}: box_deltas[{i}] must have 4 channels for each anchor, got {channels}")
        rows += channels // 4 * height * width
    check_floating(op, "gt_boxes", gt_boxes)
    check_shape(op, "gt_boxes", gt_boxes, (images, "M", 4))
    check_same_device(op, "gt_boxes", gt_boxes, "box_deltas", box_deltas[0])
    check_integer(op, "matches", matches)
    check_shape(op, "matches", matches, (images, rows))
    check_same_device(op, "matches", matches, "box_deltas", box_deltas[0])
    if kind not in BOX_LOSS_KINDS:
        raise ValueError(f"{op}: kind must be one of {', '.join(BOX_LOSS_KINDS)}, got {kind!r}")
    if matches.dtype == torch.int64:
        matches = matches.clamp(-1, torch.iinfo(torch.int32).max)  # a match beyond int32 stays out of range
    if as_finite(op, "beta", beta) < 0:
        raise ValueError(f"{op}: beta must be >= 0, got {beta}")
    refuse_forward_mode(op, *box_deltas)
    loss, _ = _dense_box_loss(
        list(box_deltas),
        *anchor_arguments(op, anchors, images, rows, dtype, ("box_deltas", box_deltas[0])),
        converted(gt_boxes, dtype),
        converted(matches, torch.int32),
        kind,
        float(beta),
        as_coder_weights(op, coder_weights),
        as_log_ratio_bounds(op, None, max_log_ratio)[1],
        as_finite(op, "offset", offset),
    )
    return cast(Tensor, loss)


@torch.library.register_fake("retinanet_ops::dense_box_loss")
def _(
    box_deltas: list[Tensor],
    anchors: Tensor,
    sizes: object,
    steps: object,
    gt_boxes: Tensor,
    matches: Tensor,
    *_: object,
) -> tuple[Tensor, Tensor]:
    images, rows = matches.shape
    loss = box_deltas[0].new_empty((images,), dtype=compute_dtype(box_deltas[0]))
    return loss, matches.new_empty((images, (rows + 31) // 32))


@torch.library.register_fake("retinanet_ops::dense_box_loss_backward")
def _(grad: Tensor, box_deltas: list[Tensor], *rest: object) -> list[Tensor]:
    return empty_like_levels(box_deltas)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    levels, anchors, ctx.sizes, ctx.steps, gt_boxes, matches, *ctx.options = inputs
    _, matched = output  # int32 [N, ceil(A / 32)]: bit a % 32 of word a / 32 says whether anchor a has a match
    ctx.save_for_backward(*levels, anchors, gt_boxes, matches, matched)
    ctx.set_materialize_grads(False)  # would launch a kernel that fills a gradient of `matched`


def _backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Any, ...]:
    *levels, anchors, gt_boxes, matches, matched = ctx.saved_tensors
    if grad is None:
        return [None] * len(levels), *_no_gradients(ctx, tensors=2)
    grid = ctx.sizes, ctx.steps
    grads = _dense_box_loss_backward(grad, levels, anchors, *grid, gt_boxes, matches, matched, *ctx.options)
    return grads, *_no_gradients(ctx, tensors=2)


def _no_gradients(ctx: Any, tensors: int) -> tuple[Any, ...]:
    """Return None for each argument after the levels; the gradient of an empty list must be an empty list.

    `tensors` is the number of tensors between the anchors and the options.
    """
    empty: list[Any] | None = None if ctx.sizes else []
    return None, empty, empty, *(None,) * (tensors + len(ctx.options))


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    grad, levels, anchors, ctx.sizes, ctx.steps, gt_boxes, matches, _, *ctx.options = inputs
    ctx.save_for_backward(grad, *levels, anchors, gt_boxes, matches)


def _double_backward(ctx: Any, grad_grads: list[Tensor]) -> tuple[Any, ...]:
    grad, *levels, anchors, gt_boxes, matches = ctx.saved_tensors
    kind, beta, coder_weights, max_log_ratio, offset = ctx.options
    grid = anchors_of(AnchorArguments(anchors, ctx.sizes, ctx.steps))

    def loss(*levels: Tensor) -> Tensor:
        return reference.dense_box_loss(
            levels,
            grid,
            gt_boxes,
            matches,
            kind=kind,
            beta=beta,
            coder_weights=coder_weights,
            max_log_ratio=max_log_ratio,
            offset=offset,
        )

    needed = (ctx.needs_input_grad[0], *ctx.needs_input_grad[1])
    grad_of_grad, *grad_of_levels = second_derivatives(loss, grad, levels, (), grad_grads, needed)
    return grad_of_grad, grad_of_levels, *_no_gradients(ctx, tensors=3)


_dense_box_loss = differentiable("dense_box_loss", _setup, _backward, levels_at=0)
_dense_box_loss_backward = differentiable("dense_box_loss_backward", _setup_backward, _double_backward, levels_at=1)
