"""Detection from the outputs of the heads: candidates, or a fixed number of detections per image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import reference
from ._anchor_arguments import anchor_arguments, anchors_of
from ._checks import (
    as_coder_weights,
    as_count,
    as_finite,
    as_iou_threshold,
    as_log_ratio_bounds,
    as_score_threshold,
    check_same_device,
    check_shape,
    refuse_forward_mode,
)
from ._fallback import with_fallback
from ._heads import check_levels
from ._image_sizes import ImageSizes, as_image_sizes
from .anchors import AnchorArguments, AnchorGrid, as_arguments
from .constants import MAX_LOG_RATIO
from .types import Candidates, Detections, compute_dtype

#: Largest number of candidates per level and image that the kernels accept.
_MAX_TOPK = 2**31 - 1

_DETECT = torch.ops.retinanet_ops.detect.default

# Detections have no gradient. Autograd passes the call on instead of marking the results, so that no tensor has to be
# detached.
_AUTOGRAD = torch.library.Library("retinanet_ops", "IMPL", "Autograd")
_AUTOGRAD.impl("detect", torch.library.fallthrough_kernel)


@with_fallback(reference.candidates)
def candidates(
    cls_logits: Sequence[Tensor],  # L tensors [N, A*K, H, W] floating
    box_deltas: Sequence[Tensor],  # L tensors [N, A*4, H, W] floating
    anchors: Tensor | AnchorGrid,  # [sum A*H*W, 4] or [N, sum A*H*W, 4] floating or integer
    image_sizes: ImageSizes | None = None,  # [N, 2] (height, width), or one pair for all
    *,
    score_threshold: float = 0.05,
    topk_per_level: int = 1000,
    coder_weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
    max_log_ratio: float | None = MAX_LOG_RATIO,
    min_log_ratio: float | None = None,
    offset: float = 0.0,
) -> Candidates:
    """Return the best candidates of each level, decoded, before non-maximum suppression.

    These are the first steps of `detect`. The next step is `batched_nms_padded` of the boxes, scores and labels, which
    skips unused slots because their score is -inf.

    Args:
        cls_logits: Outputs of the classification head, channel `a * K + k`; contiguous or channels_last.
        box_deltas: Outputs of the box head, channel `a * 4 + {dx, dy, dw, dh}`; contiguous or channels_last.
        anchors: An `AnchorGrid`, or boxes in the package's row order.
        image_sizes: Height and width in pixels to which the boxes of each image are clipped, as in `clip_boxes`. None
            does not clip.
        score_threshold: A candidate passes if its exact sigmoid, rounded to float32, is greater than this threshold,
            rounded to float32.
        topk_per_level: Largest number of candidates that each level keeps per image.
        coder_weights: Factors of dx, dy, dw and dh in the deltas.
        max_log_ratio: Upper bound of the decoded log size ratio, log(1000 / 16) by default. None sets no bound.
        min_log_ratio: Lower bound of the decoded log size ratio. None sets no bound, as in torchvision.
        offset: 1 for coders of legacy checkpoints, in which a box's width is `x2 - x1 + 1`.

    Returns:
        `Candidates`, best first. Its number of slots is the largest number of candidates that the levels can keep.

    Raises:
        TypeError: An argument has a wrong type or dtype.
        ValueError: Shapes do not fit each other, or an option is out of its range.
        NotImplementedError: `anchors` has a forward-mode tangent.

    Candidates rank by (float32 logit descending, index ascending), where index = anchor * K + class. Ties go to the
    lower anchor, then to the lower class. NaN logits never pass. Boxes are computed in float32 (float64 for float64
    deltas or anchors); scores are exact sigmoids rounded to float32. Empty input gives no candidates. The op is
    deterministic, never synchronises with the device, and is not differentiable.
    """
    op = "candidates"
    num_classes, (anchor_tensor, *grid), sizes = _checked(op, cls_logits, box_deltas, anchors, image_sizes)
    # All tensors are detached, so that autograd records nothing. A `no_grad` block would do the same, but torch.export
    # hides the ops inside such a block in a subgraph.
    logits, deltas = ([level.detach() for level in levels] for levels in (cls_logits, box_deltas))
    keys, level_truncated = torch.ops.retinanet_ops.select_candidates(
        logits,
        num_classes,
        as_score_threshold(op, score_threshold),
        min(as_count(op, "topk_per_level", topk_per_level, least=1), _MAX_TOPK),
    )
    boxes, scores, labels, anchor_index = torch.ops.retinanet_ops.decode_candidates(
        keys,
        deltas,
        anchor_tensor.detach(),
        *grid,
        None if sizes is None else sizes.detach(),
        num_classes,
        as_coder_weights(op, coder_weights),
        *as_log_ratio_bounds(op, min_log_ratio, max_log_ratio),
        as_finite(op, "offset", offset),
    )
    return Candidates(boxes, scores, labels, anchor_index, level_truncated.any(1))


@with_fallback(reference.detect)
def detect(
    cls_logits: Sequence[Tensor],  # L tensors [N, A*K, H, W] floating
    box_deltas: Sequence[Tensor],  # L tensors [N, A*4, H, W] floating
    anchors: Tensor | AnchorGrid,  # [sum A*H*W, 4] or [N, sum A*H*W, 4] floating or integer
    image_sizes: ImageSizes,  # [N, 2] (height, width), or one pair for all
    *,
    score_threshold: float = 0.05,
    topk_per_level: int = 1000,
    iou_threshold: float = 0.5,
    max_detections: int = 100,
    class_agnostic: bool = False,
    max_per_class: int | None = None,
    coder_weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
    max_log_ratio: float | None = MAX_LOG_RATIO,
    min_log_ratio: float | None = None,
    offset: float = 0.0,
    clip: str = "before_nms",
) -> Detections:
    """Return the detections of each image, by score threshold, top k of each level, decoding, clipping and NMS.

    Args:
        cls_logits: Outputs of the classification head, channel `a * K + k`; contiguous or channels_last.
        box_deltas: Outputs of the box head, channel `a * 4 + {dx, dy, dw, dh}`; contiguous or channels_last.
        anchors: An `AnchorGrid`, or boxes in the package's row order.
        image_sizes: Height and width in pixels to which the boxes of each image are clipped, as in `clip_boxes`.
        score_threshold: As in `candidates`.
        topk_per_level: Largest number of candidates that each level keeps per image.
        iou_threshold: As in `nms`.
        max_detections: Number of slots for detections of each image, D.
        class_agnostic: Whether boxes of different classes suppress each other.
        max_per_class: Largest number of detections of each class per image. None sets no limit.
        coder_weights: Factors of dx, dy, dw and dh in the deltas.
        max_log_ratio: Upper bound of the decoded log size ratio, log(1000 / 16) by default. None sets no bound.
        min_log_ratio: Lower bound of the decoded log size ratio. None sets no bound, as in torchvision.
        offset: 1 for coders of legacy checkpoints, in which a box's width is `x2 - x1 + 1`.
        clip: "before_nms" clips boxes to their image before NMS compares them, as torchvision does. "after_nms" clips
            the boxes that NMS kept, as detectron2 does. The results differ only where boxes reach out of the image,
            because clipping changes their IoU.

    Returns:
        `Detections`, best first, with D slots for each image.

    Raises:
        TypeError: An argument has a wrong type or dtype.
        ValueError: Shapes do not fit each other, or an option is out of its range.
        NotImplementedError: `anchors` has a forward-mode tangent.

    Ranking, ties, NaN and dtypes are those of `candidates`. Empty input gives no detections. The op is deterministic,
    never synchronises with the device, and is not differentiable.

    Source: the steps of torchvision's RetinaNet post-processing, and of detectron2's for `clip="after_nms"`.
    """
    op = "detect"
    if clip not in ("before_nms", "after_nms"):
        raise ValueError(f"{op}: clip must be 'before_nms' or 'after_nms', got {clip!r}")
    if image_sizes is None:
        raise TypeError(f"{op}: image_sizes must be a tensor or (height, width) pairs, got None")
    lists = isinstance(cls_logits, (list, tuple)) and isinstance(box_deltas, (list, tuple))
    if isinstance(anchors, Tensor):
        refuse_forward_mode(op, anchors)
        takes_anchors = anchors.is_floating_point()
    else:
        takes_anchors = isinstance(anchors, AnchorGrid)
    sizes: Tensor | None
    # The kernel takes these arguments as they are. Others are checked and converted first, which takes longer.
    if lists and takes_anchors and isinstance(image_sizes, Tensor) and image_sizes.dim() == 2:
        arguments, sizes = as_arguments(anchors), image_sizes
    else:
        _, arguments, sizes = _checked(op, cls_logits, box_deltas, anchors, image_sizes)
    options = (
        as_score_threshold(op, score_threshold),
        min(as_count(op, "topk_per_level", topk_per_level, least=1), _MAX_TOPK),
        as_iou_threshold(op, iou_threshold),
        as_count(op, "max_detections", max_detections),
        0 if max_per_class is None else as_count(op, "max_per_class", max_per_class, least=1),
        class_agnostic,
        as_coder_weights(op, coder_weights),
        *as_log_ratio_bounds(op, min_log_ratio, max_log_ratio),
        as_finite(op, "offset", offset),
        clip == "after_nms",
    )
    # The kernel checks the tensors. If it refuses them, the checks in Python say which argument is wrong.
    try:
        return Detections(*_DETECT(cls_logits, box_deltas, *arguments, sizes, *options))
    except RuntimeError:
        _checked(op, cls_logits, box_deltas, anchors, image_sizes)
        raise


def _checked(
    op: str,
    cls_logits: Sequence[Tensor],  # L tensors [N, A*K, H, W]
    box_deltas: Sequence[Tensor],  # L tensors [N, A*4, H, W]
    anchors: Tensor | AnchorGrid,
    image_sizes: ImageSizes | None,  # [N, 2], or one pair for all
) -> tuple[int, AnchorArguments, Tensor | None]:
    """Raise unless the arguments fit each other; return K, and anchors and image sizes in the dtype of the boxes."""
    images, num_classes = _check_heads(op, cls_logits, box_deltas)
    dtype = compute_dtype(*box_deltas, *([anchors] if isinstance(anchors, Tensor) else []))
    sizes = None
    if image_sizes is not None:
        if isinstance(image_sizes, Tensor):
            check_same_device(op, "image_sizes", image_sizes, "cls_logits", cls_logits[0])
        sizes = as_image_sizes(op, "image_sizes", image_sizes, images, dtype, cls_logits[0])
    rows = sum(level.shape[1] // 4 * level.shape[2] * level.shape[3] for level in box_deltas)
    arguments = anchor_arguments(op, anchors, images, rows, dtype, ("box_deltas", box_deltas[0]))
    return num_classes, arguments, sizes


def _check_heads(
    op: str,
    cls_logits: Sequence[Tensor],  # L tensors [N, A*K, H, W]
    box_deltas: Sequence[Tensor],  # L tensors [N, A*4, H, W]
) -> tuple[int, int]:  # N, K
    """Raise unless the outputs of both heads fit each other; return the numbers of images and classes."""
    check_levels(op, "cls_logits", cls_logits, "A*K")
    if len(box_deltas) != len(cls_logits):
        raise ValueError(f"{op}: box_deltas must hold {len(cls_logits)} levels like cls_logits, got {len(box_deltas)}")
    check_levels(op, "box_deltas", box_deltas, "A*4")
    check_same_device(op, "box_deltas[0]", box_deltas[0], "cls_logits[0]", cls_logits[0])
    num_classes = 0
    for i, (logits, deltas) in enumerate(zip(cls_logits, box_deltas, strict=True)):
        check_shape(op, f"box_deltas[{i}]", deltas, [logits.shape[0], "A*4", *logits.shape[2:]])
        per_cell = deltas.shape[1] // 4
        if per_cell == 0 or deltas.shape[1] % 4 or logits.shape[1] % per_cell:
            raise ValueError(
                f"{op}: box_deltas[{i}] and cls_logits[{i}] must have A * 4 and A * K channels, "
                f"got {deltas.shape[1]} and {logits.shape[1]}"
            )
        if i and logits.shape[1] // per_cell != num_classes:
            raise ValueError(
                f"{op}: cls_logits[{i}] must have {num_classes} classes like level 0, got {logits.shape[1] // per_cell}"
            )
        num_classes = logits.shape[1] // per_cell
    if num_classes == 0:
        raise ValueError(f"{op}: cls_logits must have at least one class, got {list(cls_logits[0].shape)}")
    return cls_logits[0].shape[0], num_classes


@torch.library.register_fake("retinanet_ops::detect")
def _(
    cls_logits: list[Tensor],
    box_deltas: list[Tensor],
    anchors: Tensor,
    grid_sizes: list[int],
    grid_steps: list[float],
    image_sizes: Tensor,
    score_threshold: float,
    topk: int,
    iou_threshold: float,
    max_detections: int,
    *rest: object,
) -> tuple[Tensor, ...]:
    given = anchors_of(AnchorArguments(anchors, grid_sizes, grid_steps))
    _checked("detect", cls_logits, box_deltas, given, image_sizes)
    dtype = compute_dtype(*box_deltas, *(() if grid_sizes else (anchors,)))
    images, like = cls_logits[0].shape[0], cls_logits[0]
    return (
        like.new_empty((images, max_detections, 4), dtype=dtype),
        like.new_empty((images, max_detections), dtype=torch.float32),
        like.new_empty((images, max_detections), dtype=torch.int64),
        like.new_empty((images,), dtype=torch.int64),
        like.new_empty((images, max_detections), dtype=torch.int64),
        like.new_empty((images,), dtype=torch.bool),
    )


@torch.library.register_fake("retinanet_ops::select_candidates")
def _(cls_logits: list[Tensor], num_classes: int, score_threshold: float, topk: int) -> tuple[Tensor, Tensor]:
    images = cls_logits[0].shape[0]
    slots = sum(torch.sym_min(topk, level.shape[1] * level.shape[2] * level.shape[3]) for level in cls_logits)
    return (
        cls_logits[0].new_empty((images, slots), dtype=torch.int64),
        cls_logits[0].new_empty((images, len(cls_logits)), dtype=torch.bool),
    )


@torch.library.register_fake("retinanet_ops::decode_candidates")
def _(
    keys: Tensor,
    box_deltas: list[Tensor],
    anchors: Tensor,
    grid_sizes: list[int],
    *rest: object,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = compute_dtype(box_deltas[0]) if grid_sizes else anchors.dtype
    return (
        keys.new_empty((*keys.shape, 4), dtype=dtype),
        keys.new_empty(keys.shape, dtype=torch.float32),
        keys.new_empty(keys.shape),
        keys.new_empty(keys.shape),
    )
