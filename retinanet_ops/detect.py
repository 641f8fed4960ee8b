"""Dense detection: from the heads' tensors to a fixed number of detections per image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import reference
from ._heads import check_levels
from ._options import as_coder_weights, as_count, as_number, log_ratio_bounds
from ._wrapping import (
    anchor_arguments,
    check_integer,
    check_same_device,
    check_shape,
    check_tensor,
    with_fallback,
)
from .anchors import AnchorGrid
from .constants import MAX_LOG_RATIO
from .types import Detections, compute_dtype

#: Key of an empty slot: below that of every candidate (`kNoKey` in csrc/detect.h).
_NO_KEY = torch.iinfo(torch.int64).min
#: More candidates than this of one level are more than the kernels count.
_ALL = 2**31 - 1


@with_fallback(reference.detect)
def detect(
    cls_logits: Sequence[Tensor],  # L tensors [N, A*K, H, W] floating
    box_deltas: Sequence[Tensor],  # L tensors [N, A*4, H, W] floating
    anchors: Tensor | AnchorGrid,  # [sum A*H*W, 4] or [N, sum A*H*W, 4] floating
    image_sizes: Tensor,  # [N, 2] (height, width)
    *,
    score_threshold: float = 0.05,
    topk_per_level: int = 1000,
    iou_threshold: float = 0.5,
    max_detections: int = 100,
    class_agnostic: bool = False,
    max_per_class: int | None = None,
    coder_weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
    max_log_ratio: float = MAX_LOG_RATIO,
    min_log_ratio: float | None = None,
    offset: float = 0.0,
) -> Detections:
    """Logits to detections: threshold, top k of each level, decoding of the winners, clipping, NMS; no host sync.

    Args:
        cls_logits: Outputs of the classification head, channel `a * K + k`; contiguous or channels_last.
        box_deltas: Outputs of the box head, channel `a * 4 + {dx, dy, dw, dh}`; contiguous or channels_last.
        anchors: An `AnchorGrid`, or boxes in the package's row order.
        image_sizes: Height and width in pixels to which each image's boxes are clipped.
        score_threshold: A candidate passes if its exact sigmoid, rounded to float32, is greater than this (as float32).
        topk_per_level: Candidates that each level may keep per image.
        iou_threshold: As in `nms`.
        max_detections: Detections per image, D.
        class_agnostic: Boxes of different classes suppress each other, too.
        max_per_class: Detections per class and image; None: no cap.
        coder_weights: Factors of dx, dy, dw and dh in the deltas.
        max_log_ratio: Upper bound of the decoded log size ratio; default log(1000 / 16).
        min_log_ratio: Lower bound; None: unbounded, as in torchvision.
        offset: 1 for coders of legacy checkpoints, in which a box's width is `x2 - x1 + 1`.

    Returns:
        `Detections`, best first, padded to D.

    Raises:
        TypeError: An argument has a wrong type or dtype.
        ValueError: Shapes do not fit each other, or an option is out of its range.

    Candidates rank by (float32 logit descending, index ascending) with index = anchor * K + class: ties go to the lower
    anchor, then the lower class.  NaN logits never pass.  Boxes are computed in float32 (float64 for float64 deltas);
    scores are exact sigmoids rounded to float32.  Empty input: no detections.  Deterministic.  Not differentiable.

    Source: the steps of torchvision's RetinaNet post-processing.
    """
    op = "detect"
    levels, images, num_classes = _check_heads(op, cls_logits, box_deltas)
    check_tensor(op, "image_sizes", image_sizes)
    check_shape(op, "image_sizes", image_sizes, [images, 2])
    check_same_device(op, "image_sizes", image_sizes, "cls_logits", levels[0])
    if image_sizes.dtype == torch.bool or image_sizes.is_complex():
        raise TypeError(f"{op}: image_sizes must be an integer or floating tensor, got {image_sizes.dtype}")
    topk_per_level = as_count(op, "topk_per_level", topk_per_level, least=1)
    max_detections = as_count(op, "max_detections", max_detections)
    per_class = 0 if max_per_class is None else as_count(op, "max_per_class", max_per_class, least=1)
    deltas = [d.detach() for d in box_deltas]
    dtype = compute_dtype(*deltas, *([anchors] if isinstance(anchors, Tensor) else []))
    rows = sum(d.shape[1] // 4 * d.shape[2] * d.shape[3] for d in deltas)
    arguments = anchor_arguments(op, anchors, images, rows, dtype, ("box_deltas", deltas[0]))
    with torch.no_grad():
        keys, level_truncated = torch.ops.retinanet_ops.select_candidates(
            levels, num_classes, as_number(op, "score_threshold", score_threshold), min(topk_per_level, _ALL)
        )
        boxes, scores, labels, anchor_index = torch.ops.retinanet_ops.decode_candidates(
            keys,
            deltas,
            *arguments,
            image_sizes.to(dtype),
            num_classes,
            as_coder_weights(op, coder_weights),
            *log_ratio_bounds(op, min_log_ratio, max_log_ratio),
            as_number(op, "offset", offset),
        )
        index, count, truncated = torch.ops.retinanet_ops.nms_sorted(
            boxes,
            None,
            (keys != _NO_KEY).sum(1),
            labels,
            as_number(op, "iou_threshold", iou_threshold),
            max_detections,
            per_class,
            class_agnostic,
        )
        unused = index < 0
        # One padded slot behind the candidates keeps the gathers legal when there is no candidate at all.
        slot = torch.where(unused, keys.shape[1], index)
        return Detections(
            boxes=_padded(boxes, 0).gather(1, slot[..., None].expand(-1, -1, 4)),
            scores=_padded(scores, 0).gather(1, slot),
            labels=_padded(labels, -1).gather(1, slot),
            count=count,
            anchor_index=_padded(anchor_index, -1).gather(1, slot),
            truncated=truncated | level_truncated.any(1),
        )


@with_fallback(reference.gather_class_scores)
def gather_class_scores(
    cls_logits: Sequence[Tensor],  # L tensors [N, A*K, H, W] floating
    anchor_index: Tensor,  # [N, D] integer
    num_classes: int,
) -> Tensor:  # [N, D, K] float32
    """Scores of all classes of chosen anchors, such as those of `Detections.anchor_index`.

    Args:
        cls_logits: Outputs of the classification head, channel `a * K + k`; contiguous or channels_last.
        anchor_index: Rows of anchors; one out of range, such as the -1 of an unused slot, has scores 0.
        num_classes: K.

    Returns:
        Sigmoids of the anchors' logits.

    Raises:
        TypeError: An argument has a wrong dtype.
        ValueError: Shapes do not fit each other, or the devices differ.

    Each is the exact sigmoid rounded to float32.  Empty input: empty.  Deterministic.  Not differentiable.
    """
    op = "gather_class_scores"
    check_levels(op, "cls_logits", cls_logits, "A*K")
    check_integer(op, "anchor_index", anchor_index)
    check_shape(op, "anchor_index", anchor_index, [cls_logits[0].shape[0], "D"])
    check_same_device(op, "anchor_index", anchor_index, "cls_logits[0]", cls_logits[0])
    num_classes = as_count(op, "num_classes", num_classes, least=1)
    for i, level in enumerate(cls_logits):
        if level.shape[1] % num_classes:
            raise ValueError(
                f"{op}: cls_logits[{i}] must have a multiple of {num_classes} channels, got {level.shape[1]}"
            )
    return torch.ops.retinanet_ops.gather_class_scores(
        [level.detach() for level in cls_logits], anchor_index.to(torch.int64), num_classes
    )


def _padded(rows: Tensor, value: float) -> Tensor:  # [N, C, ...] -> [N, C + 1, ...]
    return torch.cat((rows, rows.new_full((rows.shape[0], 1, *rows.shape[2:]), value)), dim=1)


def _check_heads(
    op: str, cls_logits: Sequence[Tensor], box_deltas: Sequence[Tensor]
) -> tuple[list[Tensor], int, int]:  # detached logits, N, K
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
                f"{op}: box_deltas[{i}] has {deltas.shape[1]} channels and cls_logits[{i}] {logits.shape[1]}, "
                "expected A * 4 and A * K"
            )
        if i and logits.shape[1] // per_cell != num_classes:
            raise ValueError(
                f"{op}: cls_logits[{i}] has {logits.shape[1] // per_cell} classes, level 0 has {num_classes}"
            )
        num_classes = logits.shape[1] // per_cell
    if num_classes == 0:
        raise ValueError(f"{op}: cls_logits must have at least one class, got {list(cls_logits[0].shape)}")
    return [logits.detach() for logits in cls_logits], cls_logits[0].shape[0], num_classes


@torch.library.register_fake("retinanet_ops::select_candidates")
def _(cls_logits: list[Tensor], num_classes: int, score_threshold: float, topk: int) -> tuple[Tensor, Tensor]:
    images = cls_logits[0].shape[0]
    slots = sum(torch.sym_min(topk, level.shape[1] * level.shape[2] * level.shape[3]) for level in cls_logits)
    return (
        cls_logits[0].new_empty((images, slots), dtype=torch.int64),
        cls_logits[0].new_empty((images, len(cls_logits)), dtype=torch.bool),
    )


@torch.library.register_fake("retinanet_ops::gather_class_scores")
def _(cls_logits: list[Tensor], anchor_index: Tensor, num_classes: int) -> Tensor:
    return anchor_index.new_empty((*anchor_index.shape, num_classes), dtype=torch.float32)


@torch.library.register_fake("retinanet_ops::decode_candidates")
def _(
    keys: Tensor,
    box_deltas: list[Tensor],
    anchors: Tensor,
    grid_sizes: list[int],
    grid_steps: list[float],
    image_sizes: Tensor,
    *rest: object,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        image_sizes.new_empty((*keys.shape, 4)),
        keys.new_empty(keys.shape, dtype=torch.float32),
        keys.new_empty(keys.shape),
        keys.new_empty(keys.shape),
    )
