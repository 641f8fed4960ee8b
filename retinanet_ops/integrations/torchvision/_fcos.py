"""torchvision's FCOS with the matching, the losses and the post-processing of this package."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection import FCOS
from torchvision.models.detection import fcos as tv
from torchvision.models.detection._utils import BoxLinearCoder

import retinanet_ops as ops
from retinanet_ops.types import compute_dtype

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


class _Outputs(NamedTuple):
    """The outputs of a head by level. A head that is called has maps made from its rows."""

    logits: list[Tensor]  # L tensors [N, K, H, W]
    distances: list[Tensor]  # L tensors [N, 4, H, W], to the left, upper, right and lower side
    centreness: list[Tensor]  # L tensors [N, 1, H, W]


class _Points(NamedTuple):
    """The points of a batch, one in each cell."""

    anchors: Tensor | ops.AnchorGrid  # [N, A, 4]
    level_sizes: list[int] | None  # of anchors that are no grid
    centres: Tensor  # [A, 2] or [N, A, 2]
    sides: Tensor  # [A, 2] or [N, A, 2]: width and height of the anchors


def _run_head(head: Any, features: list[Tensor]) -> _Outputs:
    """Return the tensors of torchvision's heads, or maps made from the rows of other heads."""
    sizes = [(level.shape[-2], level.shape[-1]) for level in features]
    if not runs_as_written(head, tv.FCOSHead):
        rows = head(features)
        return _Outputs(*(as_maps(rows[name], sizes) for name in ("cls_logits", "bbox_regression", "bbox_ctrness")))
    # As in torchvision, all logits come before all distances, because a head may draw random numbers.
    part = head.classification_head
    if runs_as_written(part, tv.FCOSClassificationHead):
        logits = [part.cls_logits(part.conv(level)) for level in features]
    else:
        logits = as_maps(part(features), sizes)
    part = head.regression_head
    if not runs_as_written(part, tv.FCOSRegressionHead):
        return _Outputs(logits, *(as_maps(rows, sizes) for rows in part(features)))
    outputs = _Outputs(logits, [], [])
    for level in features:
        shared = part.conv(level)
        outputs.distances.append(part.bbox_reg(shared).relu())
        outputs.centreness.append(part.bbox_ctrness(shared))
    return outputs


def _points(anchors: Tensor | ops.AnchorGrid, features: list[Tensor]) -> _Points:
    level_sizes = [level.shape[-2] * level.shape[-1] for level in features]
    boxes = anchors if isinstance(anchors, Tensor) else anchors.boxes()
    if boxes.shape[-2] != sum(level_sizes):
        raise ValueError(
            f"accelerate: model.anchor_generator must make one anchor for each of the {sum(level_sizes)} cells, "
            f"got {boxes.shape[-2]} anchors"
        )
    boxes = boxes.to(compute_dtype(boxes))
    centres, sides = (boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]
    return _Points(anchors, level_sizes if isinstance(anchors, Tensor) else None, centres, sides)


def _decoded(
    coder: BoxLinearCoder,
    distances: Tensor,  # [N, 4, R]
    centres: Tensor,  # [R, 2] or [N, R, 2]
    sides: Tensor,  # [R, 2] or [N, R, 2]
) -> Tensor:  # [N, R, 4] float32 or float64
    """Return the boxes whose sides have the distances from the centres."""
    unit = sides if coder.normalize_by_size else torch.ones_like(sides)
    steps, origins = torch.cat((-unit, unit), dim=-1), torch.cat((centres, centres), dim=-1)
    return origins + distances.to(compute_dtype(distances)).transpose(1, 2) * steps


def _losses(model: FCOS, outputs: _Outputs, points: _Points, inputs: Inputs) -> dict[str, Tensor]:
    """Return the three losses as in torchvision: sums over the batch, divided by its number of positives."""
    targets = inputs.targets
    truth = ops.pad_ground_truth([t["boxes"] for t in targets], [t["labels"] for t in targets])
    assigned = ops.assign_points(
        points.anchors,
        truth.boxes,
        truth.labels,
        truth.count,
        level_sizes=points.level_sizes,
        radius=model.center_sampling_radius,
    )
    num_classes = outputs.logits[0].shape[1]
    check_label_range(targets, inputs.found, num_classes)
    classification = ops.dense_focal_loss(outputs.logits, assigned.labels, num_classes, alpha=0.25, gamma=2.0).sum()

    positive = assigned.matches >= 0  # [N, A]
    # The zero box that is prepended is that of background, whose match is -1.
    image = torch.arange(len(positive), device=positive.device)[:, None]
    boxes = F.pad(truth.boxes, (0, 0, 1, 0))[image, assigned.matches.to(torch.int64) + 1]  # [N, A, 4]
    coder = unwrap(model.head, "box_coder").box_coder
    predicted = _decoded(coder, _flat(outputs.distances), points.centres, points.sides)
    # Equal boxes have a loss of 0. Selecting boxes instead of losses keeps the outputs of background, which may be
    # infinite or NaN, out of the gradient. So does selecting logits below.
    predicted = predicted.where(positive[..., None], boxes)
    box = ops.generalized_box_iou_loss(predicted, boxes, reduction="sum")

    near, far = points.centres - boxes[..., :2], boxes[..., 2:] - points.centres  # [N, A, 2]
    centred = (near.minimum(far) / near.maximum(far)).prod(-1).sqrt().where(positive, 0)  # [N, A]
    logits = _flat(outputs.centreness)[:, 0]  # [N, A]
    logits = logits.to(compute_dtype(logits)).where(positive, 0)
    centreness = F.binary_cross_entropy_with_logits(
        logits, centred.to(logits.dtype), weight=positive.to(logits.dtype), reduction="sum"
    )
    num_positive = assigned.num_positive.sum().clamp(min=1)
    return {
        "classification": classification / num_positive,
        "bbox_regression": box / num_positive,
        "bbox_ctrness": centreness / num_positive,
    }


def _detections(
    model: FCOS,
    outputs: _Outputs,
    points: _Points,
    image_sizes: list[tuple[int, int]],  # height and width of each image inside the batch
) -> list[dict[str, Tensor]]:
    """Return a dict per image with `boxes` [D, 4], `scores` [D], `labels` [D], best first, in pixels of the batch."""
    outputs = _Outputs(*([level.detach() for level in levels] for levels in outputs))
    logits = [_joint_logits(*pair) for pair in zip(outputs.logits, outputs.centreness, strict=True)]
    # FCOS's score is the root of a product, which the candidates have as their score. Roots of detections take less
    # time than roots of all products. The boxes of these candidates are not used: they are those of RetinaNet's coder.
    best = ops.candidates(
        logits,
        outputs.distances,
        points.anchors,
        score_threshold=model.score_thresh * abs(model.score_thresh),
        topk_per_level=model.topk_candidates,
    )
    index = best.anchor_index.clamp(min=0)  # [N, C]; -1 is an unused slot
    pairs = index[..., None].expand(-1, -1, 2)
    centres, sides = (t.expand(len(index), -1, -1).gather(1, pairs) for t in (points.centres, points.sides))
    distances = _flat(outputs.distances).gather(2, index[:, None].expand(-1, 4, -1))  # [N, 4, C]
    boxes = ops.clip_boxes(_decoded(model.box_coder, distances, centres, sides), image_sizes)
    # A large `detections_per_img` stands for no limit. Slots beyond the number of candidates would only take memory.
    slots = index.shape[1]
    limit = slots if model.detections_per_img is None else min(model.detections_per_img, slots)
    kept, count = ops.batched_nms_padded(
        boxes, best.scores, best.labels, iou_threshold=model.nms_thresh, max_detections=limit
    )
    kept = kept.clamp(min=0)
    boxes = boxes.gather(1, kept[..., None].expand(-1, -1, 4))
    return detection_dicts(boxes, best.scores.gather(1, kept).sqrt(), best.labels.gather(1, kept), count)


def _joint_logits(
    logits: Tensor,  # [N, K, H, W]
    centreness: Tensor,  # [N, 1, H, W]
) -> Tensor:  # [N, K, H, W] float32
    """Return logits whose sigmoid is the product of the probabilities of class and centreness."""
    probabilities = logits.to(torch.float32).sigmoid()
    return probabilities.mul_(centreness.to(torch.float32).sigmoid()).logit_()


def _flat(
    levels: list[Tensor],  # L tensors [N, C, H, W]
) -> Tensor:  # [N, C, A]
    return torch.cat([level.flatten(2) for level in levels], dim=2)
