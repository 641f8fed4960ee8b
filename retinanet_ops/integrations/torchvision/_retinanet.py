"""torchvision's RetinaNet with the matching, the losses and the post-processing of this package."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection import RetinaNet, _utils
from torchvision.models.detection import retinanet as tv
from torchvision.models.detection._utils import BoxCoder, Matcher, _box_loss, encode_boxes
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import (
    batched_nms,
    box_iou,
    boxes,
    clip_boxes_to_image,
    complete_box_iou_loss,
    distance_box_iou_loss,
    generalized_box_iou_loss,
    nms,
    sigmoid_focal_loss,
)
from torchvision.ops.boxes import _batched_nms_coordinate_trick, _batched_nms_vanilla, _box_inter_union

import retinanet_ops as ops
from retinanet_ops.constants import BOX_LOSS_KINDS

from ._model_class import Accelerated
from ._own_code import Bypassed, check_forward, check_own_code, is_own, runs_as_written, unwrap
from ._targets import Survey, check_boxes, check_label_range, label_error, survey

#: What an accelerated model bypasses in both modes.
_FORWARD = Bypassed(methods=(("", RetinaNet, ("forward",)),), functions=())
#: What it bypasses in training.
_BYPASSED_IN_TRAINING = Bypassed(
    methods=(
        ("", RetinaNet, ("compute_loss",)),
        ("head", tv.RetinaNetHead, ("compute_loss",)),
        ("head.classification_head", tv.RetinaNetClassificationHead, ("compute_loss",)),
        ("head.regression_head", tv.RetinaNetRegressionHead, ("compute_loss",)),
        ("head.regression_head.box_coder", BoxCoder, ("encode_single", "decode_single")),
        ("proposal_matcher", Matcher, ("__call__", "set_low_quality_matches_")),
    ),
    functions=(
        (tv, (sigmoid_focal_loss, _box_loss)),
        (_utils, (encode_boxes, generalized_box_iou_loss, distance_box_iou_loss, complete_box_iou_loss)),
        (boxes, (box_iou, _box_inter_union)),
    ),
)
#: What it bypasses in evaluation.
_BYPASSED_IN_EVALUATION = Bypassed(
    methods=(
        ("", RetinaNet, ("postprocess_detections",)),
        ("box_coder", BoxCoder, ("decode_single",)),
    ),
    functions=((boxes, (batched_nms, nms, _batched_nms_coordinate_trick, _batched_nms_vanilla, clip_boxes_to_image)),),
)


def check_retinanet(model: RetinaNet) -> None:
    """Raise ValueError if the model or one of its parts overrides what an accelerated model would bypass."""
    check_own_code(model, _FORWARD, missing=False)
    for bypassed in (_BYPASSED_IN_TRAINING, _BYPASSED_IN_EVALUATION):
        check_own_code(model, bypassed, missing=True)
    _check_loss_type(model)


class AcceleratedForward(Accelerated, RetinaNet):
    """A RetinaNet whose `forward` uses the ops of this package."""

    def forward(
        self,
        images: list[Tensor],  # N tensors [3, H_i, W_i]
        targets: list[dict[str, Tensor]] | None = None,  # `boxes` [M_i, 4] and `labels` [M_i] of each image
    ) -> Any:
        """Return losses in training mode and detections in evaluation mode; see torchvision's `RetinaNet`."""
        if not isinstance(self, AcceleratedForward):
            # A wrapper of `forward` holds this function although `restore` has ended the acceleration.
            return type(self).forward(self, images, targets)
        if torch.jit.is_tracing() or not check_boxes(targets, images, training=self.training):
            return super().forward(images, targets)
        _check_bypassed(self)
        original_sizes = [tuple(image.shape[-2:]) for image in images]
        batch, scaled = self.transform(images, targets)
        wrong_labels = label_error(scaled, images) if self.training else None
        found = survey(scaled or [], labels=self.training and wrong_labels is None)
        if found.degenerate:
            return super().forward(images, targets)
        if wrong_labels is not None:
            raise wrong_labels
        if not found.finite:
            return super().forward(images, targets)  # with losses of NaN
        features = self.backbone(batch.tensors)
        features = [features] if isinstance(features, Tensor) else list(features.values())
        sizes = [(level.shape[-2], level.shape[-1]) for level in features]
        logits, deltas = _run_heads(self.head, features, None if self.training else sizes)
        anchors = _anchors(self.anchor_generator, batch, features)
        if self.training:
            return self.eager_outputs(_losses(self, logits, deltas, anchors, scaled, found), [])
        detections = _detections(self, logits, deltas, anchors, batch.image_sizes)
        return self.eager_outputs({}, self.transform.postprocess(detections, batch.image_sizes, original_sizes))


def _check_bypassed(model: AcceleratedForward) -> None:
    """Raise ValueError if something that this call bypasses has been overridden since `accelerate`."""
    check_forward(model._original, RetinaNet)
    check_own_code(model, _BYPASSED_IN_TRAINING if model.training else _BYPASSED_IN_EVALUATION, missing=False)
    if model.training:
        _check_loss_type(model)


def _check_loss_type(model: RetinaNet) -> None:
    kind = getattr(_regression_head(model), "_loss_type", None)
    if kind is not None and kind not in BOX_LOSS_KINDS:
        raise ValueError(
            f"accelerate: model.head.regression_head._loss_type must be one of {', '.join(BOX_LOSS_KINDS)}, "
            f"got {kind!r}"
        )


def _regression_head(model: RetinaNet) -> Any:
    """Return the head whose loss type and box coder torchvision uses, inside its wrappers, or None."""
    head = unwrap(model.head, "regression_head")
    return unwrap(getattr(head, "regression_head", None), "compute_loss")


def _run_heads(
    head: Any,
    features: list[Tensor],  # L tensors [N, C, H, W]
    sizes: Sequence[tuple[int, int]] | None,  # height and width of each level
) -> tuple[list[Tensor], list[Tensor]]:  # L tensors [N, A*K, H, W], L tensors [N, A*4, H, W]
    """Return logits and deltas of each level: tensors of torchvision's heads, or maps made from rows of other heads."""
    if not runs_as_written(head, tv.RetinaNetHead):
        outputs = head(features)
        return _as_maps(outputs["cls_logits"], sizes), _as_maps(outputs["bbox_regression"], sizes)

    def run(part: Any, owner: Any, last: str) -> list[Tensor]:
        if not runs_as_written(part, owner):
            return _as_maps(part(features), sizes)
        return [getattr(part, last)(part.conv(level)) for level in features]

    # As in torchvision, all logits come before all deltas, because a head may draw random numbers.
    logits = run(head.classification_head, tv.RetinaNetClassificationHead, "cls_logits")
    return logits, run(head.regression_head, tv.RetinaNetRegressionHead, "bbox_reg")


def _as_maps(
    rows: Tensor,  # [N, R, C]
    sizes: Sequence[tuple[int, int]] | None,
) -> list[Tensor]:  # L tensors [N, A*C, H, W], channels_last
    """Return the rows of a head as maps of the given sizes, or without sizes as one map of R x 1 cells.

    The single map needs no copy and is enough for the losses.
    """
    sizes = [(rows.shape[1], 1)] if sizes is None else sizes
    per_cell = rows.shape[1] // sum(h * w for h, w in sizes)
    levels = rows.split([per_cell * h * w for h, w in sizes], dim=1)
    # Flatten first. A view of a slice of the batch would keep strides that kernels do not accept as channels_last.
    flat = [level.reshape(-1) for level in levels]
    return [x.view(len(rows), h, w, -1).permute(0, 3, 1, 2) for x, (h, w) in zip(flat, sizes, strict=True)]


def _anchors(
    generator: Any,
    batch: ImageList,
    features: list[Tensor],  # L tensors [N, C, H, W]
) -> Tensor | ops.AnchorGrid:  # [N, A, 4]
    """Return a grid for torchvision's anchor generator, and the boxes themselves for any other generator."""
    is_grid = runs_as_written(generator, AnchorGenerator)
    is_grid &= all(is_own(generator, name, AnchorGenerator) for name in ("grid_anchors", "set_cell_anchors"))
    # torchvision raises for a wrong number of levels.
    if not is_grid or len(generator.cell_anchors) != len(features):
        return torch.stack(list(generator(batch, features)))
    generator.set_cell_anchors(generator.cell_anchors[0].dtype, features[0].device)
    height, width = batch.tensors.shape[-2:]
    return ops.AnchorGrid.from_base_anchors(
        [base.to(torch.float32) for base in generator.cell_anchors],
        [(level.shape[-2], level.shape[-1]) for level in features],
        image_size=(height, width),
    )


def _losses(
    model: RetinaNet,
    logits: list[Tensor],  # L tensors [N, A*K, H, W]
    deltas: list[Tensor],  # L tensors [N, A*4, H, W]
    anchors: Tensor | ops.AnchorGrid,  # [N, A, 4]
    targets: list[dict[str, Tensor]],
    found: Survey,
) -> dict[str, Tensor]:
    """Return both losses as in torchvision: the batch mean of each image's sum over its positives (at least 1)."""
    truth = ops.pad_ground_truth([t["boxes"] for t in targets], [t["labels"] for t in targets])
    matcher, head = model.proposal_matcher, _regression_head(model)
    assigned = ops.assign_targets(
        anchors,
        truth.boxes,
        truth.labels,
        truth.count,
        rule=ops.MatchRule(
            fg_iou=matcher.high_threshold,
            bg_iou=matcher.low_threshold,
            low_quality="torchvision" if matcher.allow_low_quality_matches else "off",
        ),
    )
    num_classes = sum(level[0].numel() for level in logits) // assigned.labels.shape[1]
    check_label_range(targets, found, num_classes)
    classification = ops.dense_focal_loss(logits, assigned.labels, num_classes, alpha=0.25, gamma=2.0)
    box = ops.dense_box_loss(
        deltas,
        anchors,
        truth.boxes,
        assigned.matches,
        kind=head._loss_type,
        beta=1.0,
        coder_weights=head.box_coder.weights,
        max_log_ratio=head.box_coder.bbox_xform_clip,
    )
    positives = assigned.num_positive.clamp(min=1)
    return {"classification": (classification / positives).mean(), "bbox_regression": (box / positives).mean()}


def _detections(
    model: RetinaNet,
    logits: list[Tensor],  # L tensors [N, A*K, H, W]
    deltas: list[Tensor],  # L tensors [N, A*4, H, W]
    anchors: Tensor | ops.AnchorGrid,  # [N, A, 4]
    image_sizes: list[tuple[int, int]],  # height and width of each image inside the batch
) -> list[dict[str, Tensor]]:
    """Return a dict per image with `boxes` [D, 4], `scores` [D], `labels` [D], best first, in pixels of the batch."""
    # A large `detections_per_img` stands for no limit. Slots beyond the number of candidates would only take memory.
    candidates = sum(min(model.topk_candidates, level[0].numel()) for level in logits)
    limit = candidates if model.detections_per_img is None else min(model.detections_per_img, candidates)
    detections = ops.detect(
        logits,
        deltas,
        anchors,
        torch.tensor(image_sizes, device=logits[0].device),
        score_threshold=model.score_thresh,
        topk_per_level=model.topk_candidates,
        iou_threshold=model.nms_thresh,
        max_detections=limit,
        coder_weights=model.box_coder.weights,
        max_log_ratio=model.box_coder.bbox_xform_clip,
    )
    scores = detections.scores.to(detections.boxes.dtype)
    return [
        {"boxes": detections.boxes[i, :n], "scores": scores[i, :n], "labels": detections.labels[i, :n]}
        for i, n in enumerate(detections.count.tolist())
    ]
