"""torchvision's RetinaNet with the matching, the losses and the post-processing of this package."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection import RetinaNet, _utils
from torchvision.models.detection import retinanet as tv
from torchvision.models.detection._utils import BoxCoder, Matcher

import retinanet_ops as ops
from retinanet_ops.constants import BOX_LOSS_KINDS

from ._anchors import anchors_of
from ._inputs import detection_dicts, run_backbone, transformed
from ._maps import as_maps
from ._model_class import Accelerated
from ._own_code import (
    BATCHED_NMS,
    BOX_IOU,
    CLIPPING,
    Bypassed,
    BypassedByMode,
    check_call,
    check_model,
    runs_as_written,
    unwrap,
)
from ._targets import Survey, check_boxes, check_label_range

_BYPASSED = BypassedByMode(
    owner=RetinaNet,
    training=Bypassed(
        methods=(
            ("", RetinaNet, ("compute_loss",)),
            ("head", tv.RetinaNetHead, ("compute_loss",)),
            ("head.classification_head", tv.RetinaNetClassificationHead, ("compute_loss",)),
            ("head.regression_head", tv.RetinaNetRegressionHead, ("compute_loss",)),
            ("head.regression_head.box_coder", BoxCoder, ("encode_single", "decode_single")),
            ("proposal_matcher", Matcher, ("__call__", "set_low_quality_matches_")),
        ),
        functions=(
            (tv, ("sigmoid_focal_loss", "_box_loss")),
            (
                _utils,
                ("encode_boxes", "generalized_box_iou_loss", "distance_box_iou_loss", "complete_box_iou_loss"),
            ),
            BOX_IOU,
        ),
    ),
    evaluation=Bypassed(
        methods=(
            ("", RetinaNet, ("postprocess_detections",)),
            ("box_coder", BoxCoder, ("decode_single",)),
        ),
        functions=(BATCHED_NMS, CLIPPING),
    ),
)


def check_retinanet(model: RetinaNet) -> None:
    """Raise ValueError if the model or one of its parts overrides what an accelerated model would bypass."""
    check_model(model, _BYPASSED)
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
        check_call(self, _BYPASSED)
        if self.training:
            _check_loss_type(self)
        inputs = transformed(self, images, targets)
        if inputs is None:
            return super().forward(images, targets)
        batch = inputs.batch
        features = list(run_backbone(self, batch).values())
        sizes = [(level.shape[-2], level.shape[-1]) for level in features]
        logits, deltas = _run_heads(self.head, features, None if self.training else sizes)
        anchors = anchors_of(self.anchor_generator, batch, features)
        if self.training:
            return self.eager_outputs(_losses(self, logits, deltas, anchors, inputs.targets, inputs.found), [])
        detections = _detections(self, logits, deltas, anchors, batch.image_sizes)
        return self.eager_outputs({}, self.transform.postprocess(detections, batch.image_sizes, inputs.original_sizes))


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
        return as_maps(outputs["cls_logits"], sizes), as_maps(outputs["bbox_regression"], sizes)

    def run(part: Any, owner: Any, last: str) -> list[Tensor]:
        if not runs_as_written(part, owner):
            return as_maps(part(features), sizes)
        return [getattr(part, last)(part.conv(level)) for level in features]

    # As in torchvision, all logits come before all deltas, because a head may draw random numbers.
    logits = run(head.classification_head, tv.RetinaNetClassificationHead, "cls_logits")
    return logits, run(head.regression_head, tv.RetinaNetRegressionHead, "bbox_reg")


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
    return detection_dicts(detections.boxes, detections.scores, detections.labels, detections.count)
