"""torchvision's FCOS with the matching, the losses and the post-processing of this package."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection import FCOS
from torchvision.models.detection import fcos as tv
from torchvision.models.detection._utils import BoxLinearCoder

import retinanet_ops as ops
from retinanet_ops._checks import as_count
from retinanet_ops._fcos import Outputs, Points, assign, best_candidates, detections, image_losses, points_of

from ._anchors import anchors_of
from ._inputs import Inputs, detection_dicts, run_backbone, transformed
from ._maps import as_maps
from ._model_class import Accelerated
from ._own_code import (
    BATCHED_NMS,
    CLIPPING,
    Bypassed,
    BypassedByMode,
    check_call,
    check_model,
    runs_as_written,
    unwrap,
)
from ._targets import check_boxes, check_label_range

_BYPASSED = BypassedByMode(
    owner=FCOS,
    training=Bypassed(
        methods=(
            ("", FCOS, ("compute_loss",)),
            ("head", tv.FCOSHead, ("compute_loss",)),
            ("head.box_coder", BoxLinearCoder, ("encode", "decode")),
        ),
        functions=((tv, ("sigmoid_focal_loss", "generalized_box_iou_loss")),),
    ),
    evaluation=Bypassed(
        methods=(
            ("", FCOS, ("postprocess_detections",)),
            ("box_coder", BoxLinearCoder, ("decode",)),
        ),
        functions=(BATCHED_NMS, CLIPPING),
    ),
)


def check_fcos(model: FCOS) -> None:
    """Raise ValueError if the model or one of its parts overrides what an accelerated model would bypass."""
    check_model(model, _BYPASSED)


class AcceleratedForward(Accelerated, FCOS):
    """An FCOS whose `forward` uses the ops of this package."""

    def forward(
        self,
        images: list[Tensor],  # N tensors [3, H_i, W_i]
        targets: list[dict[str, Tensor]] | None = None,  # `boxes` [M_i, 4] and `labels` [M_i] of each image
    ) -> Any:
        """Return losses in training mode and detections in evaluation mode; see torchvision's `FCOS`."""
        if not isinstance(self, AcceleratedForward):
            # A wrapper of `forward` holds this function although `restore` has ended the acceleration.
            return type(self).forward(self, images, targets)
        if torch.jit.is_tracing() or not check_boxes(targets, images, training=self.training):
            return super().forward(images, targets)
        check_call(self, _BYPASSED)
        inputs = transformed(self, images, targets)
        if inputs is None:
            return super().forward(images, targets)
        batch = inputs.batch
        features = list(run_backbone(self, batch).values())
        outputs = _run_head(self.head, features)
        points = _points(anchors_of(self.anchor_generator, batch, features), features)
        if self.training:
            return self.eager_outputs(_losses(self, outputs, points, inputs), [])
        detections = _detections(self, outputs, points, batch.image_sizes)
        return self.eager_outputs({}, self.transform.postprocess(detections, batch.image_sizes, inputs.original_sizes))


def _run_head(head: Any, features: list[Tensor]) -> Outputs:
    """Return the tensors of torchvision's heads, or maps made from the rows of other heads."""
    sizes = [(level.shape[-2], level.shape[-1]) for level in features]
    if not runs_as_written(head, tv.FCOSHead):
        rows = head(features)
        return Outputs(*(as_maps(rows[name], sizes) for name in ("cls_logits", "bbox_regression", "bbox_ctrness")))
    # As in torchvision, all logits come before all distances, because a head may draw random numbers.
    part = head.classification_head
    if runs_as_written(part, tv.FCOSClassificationHead):
        logits = [part.cls_logits(part.conv(level)) for level in features]
    else:
        logits = as_maps(part(features), sizes)
    part = head.regression_head
    if not runs_as_written(part, tv.FCOSRegressionHead):
        return Outputs(logits, *(as_maps(rows, sizes) for rows in part(features)))
    outputs = Outputs(logits, [], [])
    for level in features:
        shared = part.conv(level)
        outputs.distances.append(part.bbox_reg(shared).relu())
        outputs.centreness.append(part.bbox_ctrness(shared))
    return outputs


def _points(anchors: Tensor | ops.AnchorGrid, features: list[Tensor]) -> Points:
    points = points_of(anchors, [level.shape[-2] * level.shape[-1] for level in features])
    cells, count = sum(level.shape[-2] * level.shape[-1] for level in features), points.centres.shape[-2]
    if count != cells:
        raise ValueError(
            f"accelerate: model.anchor_generator must make one anchor for each of the {cells} cells, got {count} "
            "anchors"
        )
    return points


def _losses(model: FCOS, outputs: Outputs, points: Points, inputs: Inputs) -> dict[str, Tensor]:
    """Return the three losses as in torchvision: sums over the batch, divided by its number of positives."""
    truth = ops.pad_ground_truth([t["boxes"] for t in inputs.targets], [t["labels"] for t in inputs.targets])
    assigned = assign(points, truth, model.center_sampling_radius)
    check_label_range(inputs.targets, inputs.found, outputs.logits[0].shape[1])
    coder = unwrap(model.head, "box_coder").box_coder
    losses = image_losses(outputs, points, truth, assigned, by_size=coder.normalize_by_size)
    num_positive = assigned.num_positive.sum().clamp(min=1)
    return {name: values.sum() / num_positive for name, values in losses._asdict().items()}


def _detections(
    model: FCOS,
    outputs: Outputs,
    points: Points,
    image_sizes: list[tuple[int, int]],  # height and width of each image inside the batch
) -> list[dict[str, Tensor]]:
    """Return a dict per image with `boxes` [D, 4], `scores` [D], `labels` [D], best first, in pixels of the batch."""
    best = best_candidates(
        outputs,
        points,
        image_sizes,
        score_threshold=model.score_thresh,
        topk_per_level=model.topk_candidates,
        by_size=model.box_coder.normalize_by_size,
    )
    # A large `detections_per_img` stands for no limit. Slots beyond the number of candidates would only take memory.
    slots, limit = best.scores.shape[1], model.detections_per_img
    limit = slots if limit is None else min(as_count("accelerate", "model.detections_per_img", limit), slots)
    found = detections(best, iou_threshold=model.nms_thresh, max_detections=limit)
    return detection_dicts(found.boxes, found.scores, found.labels, found.count)
