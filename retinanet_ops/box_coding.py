"""Conversion of boxes to deltas from their anchors, of deltas to boxes, and clipping of boxes to images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference
from ._anchor_arguments import anchor_arguments, anchors_of
from ._checks import (
    as_coder_weights,
    as_finite,
    as_log_ratio_bounds,
    as_rows,
    check_number,
    refuse_forward_mode,
)
from ._fallback import with_fallback
from ._gradients import converted, differentiable, reference_gradients
from ._image_sizes import ImageSizes, as_image_sizes
from .anchors import AnchorArguments, AnchorGrid, as_boxes
from .constants import MAX_LOG_RATIO
from .types import compute_dtype


@with_fallback(reference.encode_boxes)
def encode_boxes(
    boxes: Tensor,  # [A, 4] or [N, A, 4] floating or integer
    anchors: Tensor | AnchorGrid,  # [A, 4] or [N, A, 4] floating or integer
    *,
    coder_weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
    offset: float = 0.0,
) -> Tensor:  # shape of boxes
    """Return the deltas `(dx, dy, dw, dh)` that turn each anchor into its box.

    With centre (cx, cy), width w and height h of a box, and the index a for its anchor, `dx = wx (cx - cx_a) / w_a` and
    `dw = ww log(w / w_a)`. dy and dh are computed from cy and h in the same way.

    Args:
        boxes: `(x1, y1, x2, y2)` in pixels, one row per anchor.
        anchors: Boxes that all images share, boxes of each image, or an `AnchorGrid`.
        coder_weights: Factors wx, wy, ww and wh of the deltas.
        offset: 1 for the coders of legacy checkpoints, in which the width of a box is `x2 - x1 + 1`.

    Returns:
        Deltas in float32, or in float64 if a box tensor is float64. Integers become float32 before they are encoded.

    Raises:
        TypeError: An argument has a wrong dtype.
        ValueError: Shapes do not fit each other, or an option is out of its range.
        NotImplementedError: A tensor has a forward-mode tangent.

    The deltas of a degenerate box are infinite or NaN and affect no other row. Empty input gives an empty result. The
    op is deterministic, and differentiable in `boxes` and in explicit anchors.

    Source: Girshick et al. 2014, appendix C. The result equals that of torchvision's `BoxCoder.encode`.
    """
    boxes = as_rows("encode_boxes", "boxes", boxes)
    dtype, arguments = _prepare("encode_boxes", "boxes", boxes, anchors)
    return _encode_boxes(
        converted(boxes, dtype),
        *arguments,
        as_coder_weights("encode_boxes", coder_weights),
        as_finite("encode_boxes", "offset", offset),
    )


@with_fallback(reference.decode_boxes)
def decode_boxes(
    deltas: Tensor,  # [A, 4] or [N, A, 4] floating or integer
    anchors: Tensor | AnchorGrid,  # [A, 4] or [N, A, 4] floating or integer
    *,
    coder_weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
    max_log_ratio: float | None = MAX_LOG_RATIO,
    min_log_ratio: float | None = None,
    image_sizes: ImageSizes | None = None,  # [N, 2] (height, width), or one pair for all
    offset: float = 0.0,
) -> Tensor:  # shape of deltas
    """Return the boxes that deltas from anchors describe; the inverse of `encode_boxes`, with bounds.

    Args:
        deltas: `(dx, dy, dw, dh)`, one row per anchor.
        anchors: Boxes that all images share, boxes of each image, or an `AnchorGrid`.
        coder_weights: Factors wx, wy, ww and wh of the deltas.
        max_log_ratio: Upper bound of `dw / ww` and `dh / wh`, log(1000 / 16) by default. None sets no bound.
        min_log_ratio: Lower bound of `dw / ww` and `dh / wh`. None sets no bound, as in torchvision.
        image_sizes: Height and width in pixels to which the boxes of each image are clipped, as in `clip_boxes`. None
            does not clip.
        offset: 1 for the coders of legacy checkpoints, in which the width of a box is `x2 - x1 + 1`.

    Returns:
        Boxes in float32, or in float64 if the deltas or the anchors are float64; never in half precision. Integers
        become float32 before they are decoded.

    Raises:
        TypeError: An argument has a wrong dtype.
        ValueError: Shapes do not fit each other, or an option is out of its range.
        NotImplementedError: A tensor has a forward-mode tangent.

    NaN deltas give a NaN box and affect no other row. Empty input gives an empty result. The op is deterministic, and
    differentiable in `deltas` and in explicit anchors.

    Source: Girshick et al. 2014, appendix C. The result equals that of torchvision's `BoxCoder.decode`.
    """
    deltas = as_rows("decode_boxes", "deltas", deltas)
    dtype, arguments = _prepare("decode_boxes", "deltas", deltas, anchors)
    if image_sizes is not None:
        images = deltas.shape[0] if deltas.dim() == 3 else 1
        image_sizes = as_image_sizes("decode_boxes", "image_sizes", image_sizes, images, dtype, deltas)
    return _decode_boxes(
        converted(deltas, dtype),
        *arguments,
        as_coder_weights("decode_boxes", coder_weights),
        *as_log_ratio_bounds("decode_boxes", min_log_ratio, max_log_ratio),
        as_finite("decode_boxes", "offset", offset),
        image_sizes,
    )


@with_fallback(reference.clip_boxes)
def clip_boxes(
    boxes: Tensor,  # [..., 4] or [0], floating or integer
    image_sizes: ImageSizes,  # [N, 2] (height, width), or one pair for all
) -> Tensor:  # shape and dtype of boxes
    """Clip boxes to `0..width` and `0..height` of their images.

    Args:
        boxes: `(x1, y1, x2, y2)` in pixels. If each image has its own size, boxes of at least three dimensions are
            `[N, ..., 4]`, and other boxes belong to one image.
        image_sizes: Height and width in pixels of each image, as a tensor `[N, 2]` or a list of pairs; or one pair for
            all images, as a tensor `[2]` or a sequence of two numbers.

    Returns:
        The clipped boxes in the dtype of `boxes`. NaN coordinates stay NaN. Integer coordinates beyond a fractional
        size become the largest integer below it.

    Raises:
        TypeError: `boxes` is neither floating nor integer.
        ValueError: `boxes` or `image_sizes` has a wrong shape.
        NotImplementedError: `boxes` has a forward-mode tangent.

    Empty input gives an empty result. The op is deterministic, and differentiable in `boxes`. The derivative of a
    coordinate is 1 inside the image and on its border, and 0 outside.

    Source: The result equals that of `torchvision.ops.clip_boxes_to_image`.
    """
    return _clip("clip_boxes", boxes, "image_sizes", image_sizes)


@with_fallback(reference.clip_boxes_to_image)
def clip_boxes_to_image(
    boxes: Tensor,  # [..., 4] or [0], floating or integer
    size: Tensor | Sequence[float],  # (height, width)
) -> Tensor:  # shape and dtype of boxes
    """Clip boxes to one image; `clip_boxes` with the name and the arguments of torchvision.

    Args:
        boxes: `(x1, y1, x2, y2)` in pixels.
        size: Height and width of the image in pixels.

    Returns:
        As for `clip_boxes`.

    Raises:
        TypeError: `boxes` is neither floating nor integer.
        ValueError: `boxes` or `size` has a wrong shape.
        NotImplementedError: `boxes` has a forward-mode tangent.

    Empty input, determinism and derivatives are those of `clip_boxes`.

    Source: the signature of `torchvision.ops.clip_boxes_to_image`.
    """
    return _clip("clip_boxes_to_image", boxes, "size", size, one_image=True)


def _clip(
    op: str, boxes: Tensor, sizes_name: str, sizes: ImageSizes, one_image: bool = False
) -> Tensor:  # shape and dtype of boxes
    """Return clipped boxes; the first of at least three dimensions counts the images, unless there is one image."""
    has_integers = check_number(op, "boxes", boxes)
    refuse_forward_mode(op, boxes)
    shape = boxes.shape
    dims = len(shape)
    if (not dims or shape[-1] != 4) and shape != (0,):
        raise ValueError(f"{op}: boxes must have shape [..., 4], got {list(shape)}")
    images = 1 if one_image or dims < 3 else shape[0]
    if dims == 2 or (dims == 3 and not one_image):
        rows = boxes
    else:
        rows = boxes.reshape(-1, 4) if one_image or dims < 3 else boxes.flatten(1, -2)
    # float64 holds integers up to 2^53 exactly, and no image is larger.
    dtype = torch.float64 if has_integers else compute_dtype(boxes)
    image_sizes = as_image_sizes(op, sizes_name, sizes, images, dtype, boxes)
    clipped = converted(_clip_boxes(converted(rows, dtype), image_sizes), boxes.dtype)
    return clipped if rows is boxes else clipped.reshape(shape)


def _prepare(op: str, name: str, rows: Tensor, anchors: Tensor | AnchorGrid) -> tuple[torch.dtype, AnchorArguments]:
    """Return the compute dtype of rows and anchors, and the anchors as arguments of the schema."""
    shape = rows.shape
    images = shape[0] if len(shape) == 3 else 1
    if not isinstance(anchors, Tensor):
        dtype = compute_dtype(rows)
    else:
        dtype = compute_dtype(rows, anchors)
        if anchors.dim() == 3 and len(shape) == 2:
            raise ValueError(
                f"{op}: {name} must have shape [N, A, 4] for anchors {list(anchors.shape)}, got {list(shape)}"
            )
    return dtype, anchor_arguments(op, anchors, images, shape[-2], dtype, (name, rows))


@torch.library.register_fake("retinanet_ops::encode_boxes")
def _(boxes: Tensor, *rest: object) -> Tensor:
    return torch.empty_like(boxes, memory_format=torch.contiguous_format)


@torch.library.register_fake("retinanet_ops::decode_boxes")
def _(deltas: Tensor, *rest: object) -> Tensor:
    return torch.empty_like(deltas, memory_format=torch.contiguous_format)


@torch.library.register_fake("retinanet_ops::clip_boxes")
def _(boxes: Tensor, image_sizes: Tensor) -> Tensor:
    return torch.empty_like(boxes, memory_format=torch.contiguous_format)


def _encode_reference(
    sizes: list[int], steps: list[float], coder_weights: list[float], offset: float
) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda boxes, anchors: reference.encode_boxes(
        boxes, anchors_of(AnchorArguments(anchors, sizes, steps)), coder_weights=coder_weights, offset=offset
    )


def _encode_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    boxes, anchors, *ctx.rest = inputs
    ctx.save_for_backward(boxes, anchors)


def _encode_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    boxes, anchors = ctx.saved_tensors
    if ctx.needs_input_grad[1]:
        grads = reference_gradients(_encode_reference(*ctx.rest), (boxes, anchors), ctx.needs_input_grad[:2], grad)
        return *grads, None, None, None, None
    sizes, steps, coder_weights, offset = ctx.rest
    _, anchor_size = _corner_and_size(as_boxes(anchors_of(AnchorArguments(anchors, sizes, steps))), offset)
    _, size = _corner_and_size(boxes, offset)
    centre_weight, side_weight = _weights(coder_weights, grad)
    # Both corners of a box move its centre by half, and they move its side in opposite directions.
    of_centre, of_side = grad[..., :2] * (0.5 * centre_weight) / anchor_size, grad[..., 2:] * side_weight / size
    return torch.cat((of_centre - of_side, of_centre + of_side), dim=-1), None, None, None, None, None


def _decode_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    deltas, anchors, ctx.sizes, ctx.steps, ctx.coder_weights, ctx.low, ctx.high, ctx.offset, image_sizes = inputs
    ctx.save_for_backward(deltas, anchors, image_sizes)


def _decode_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, image_sizes = ctx.saved_tensors
    if not ctx.needs_input_grad[1]:
        return _gradient_of_deltas(ctx, grad), None, None, None, None, None, None, None, None

    def function(deltas: Tensor, anchors: Tensor) -> Tensor:
        return reference.decode_boxes(
            deltas,
            anchors_of(AnchorArguments(anchors, ctx.sizes, ctx.steps)),
            coder_weights=ctx.coder_weights,
            min_log_ratio=ctx.low,
            max_log_ratio=ctx.high,
            image_sizes=image_sizes,
            offset=ctx.offset,
        )

    grads = reference_gradients(function, tensors, ctx.needs_input_grad[:2], grad)
    return (*grads, None, None, None, None, None, None, None)


def _gradient_of_deltas(ctx: Any, grad: Tensor) -> Tensor:
    """Return the gradient of deltas, given that of the decoded boxes."""
    deltas, anchors, image_sizes = ctx.saved_tensors
    corner, size = _corner_and_size(as_boxes(anchors_of(AnchorArguments(anchors, ctx.sizes, ctx.steps))), ctx.offset)
    centre_weight, side_weight = _weights(ctx.coder_weights, grad)
    # Half of the sides. A log ratio beyond a bound is replaced by a constant, whose gradient is 0.
    log_ratio = deltas[..., 2:] / side_weight
    bounded, beyond = log_ratio, []
    for bound, is_beyond in ((ctx.low, torch.lt), (ctx.high, torch.gt)):
        if bound is not None:
            beyond.append(is_beyond(log_ratio, bound))
            bounded = bounded.masked_fill(beyond[-1], bound)
    half = 0.5 * bounded.exp() * size
    if image_sizes is not None:
        centre = deltas[..., :2] / centre_weight * size + (corner + 0.5 * size)
        boxes = torch.cat((centre - half, centre + half - ctx.offset), dim=-1)
        grad = _gradient_of_clipped(grad, boxes, image_sizes)
    # A move of the centre moves both corners, and a larger side moves them in opposite directions.
    first, second = grad[..., :2], grad[..., 2:]
    of_centre, of_side = (first + second) * size / centre_weight, (second - first) * half / side_weight
    for rows in beyond:
        of_side = of_side.masked_fill(rows, 0.0)
    return torch.cat((of_centre, of_side), dim=-1)


def _weights(coder_weights: Sequence[float], like: Tensor) -> tuple[float | Tensor, float | Tensor]:
    """Return the weights of the centre and of the sides; two that are equal are one number."""
    wx, wy, ww, wh = coder_weights
    return wx if wx == wy else like.new_tensor((wx, wy)), ww if ww == wh else like.new_tensor((ww, wh))


def _corner_and_size(boxes: Tensor, offset: float) -> tuple[Tensor, Tensor]:  # two [..., 2]
    """Return the first corners and the sides of boxes, as (x, y)."""
    corner = boxes[..., :2]
    size = boxes[..., 2:] - corner
    return corner, size + offset if offset else size


def _gradient_of_clipped(
    grad: Tensor,  # [A, 4] or [N, A, 4]
    boxes: Tensor,  # shape of grad
    image_sizes: Tensor,  # [N, 2]
) -> Tensor:  # shape of grad
    """Return the gradient of boxes, given that of the clipped boxes. A coordinate on a bound passes its gradient."""
    clipped = _clip_boxes(boxes, image_sizes)
    return grad.masked_fill((boxes < clipped) | (boxes > clipped), 0.0)  # false for NaN


def _clip_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _clip_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    boxes, image_sizes = ctx.saved_tensors
    return _gradient_of_clipped(grad, boxes, image_sizes), None


_encode_boxes = differentiable("encode_boxes", _encode_setup, _encode_backward)
_decode_boxes = differentiable("decode_boxes", _decode_setup, _decode_backward)
_clip_boxes = differentiable("clip_boxes", _clip_setup, _clip_backward)
