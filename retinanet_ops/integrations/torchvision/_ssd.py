"""torchvision's SSD, such as SSD300 and SSDlite, with the matching, losses and post-processing of this package."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection import _utils
from torchvision.models.detection._utils import BoxCoder, Matcher, SSDMatcher
from torchvision.models.detection.ssd import SSD, SSDHead, SSDScoringHead
from torchvision.models.detection.ssdlite import SSDLiteHead

import retinanet_ops as ops
from retinanet_ops._checks import as_count
from retinanet_ops.types import compute_dtype

from ._anchors import default_boxes_of
from ._inputs import Inputs, detection_dicts, run_backbone, transformed
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
    is_own,
    runs_as_written,
)
from ._targets import check_boxes, check_label_range

_BYPASSED = BypassedByMode(
    owner=SSD,
    training=Bypassed(
        methods=(
            ("", SSD, ("compute_loss",)),
            ("box_coder", BoxCoder, ("encode_single",)),
            ("proposal_matcher", SSDMatcher, ("__call__",)),
        ),
        functions=((_utils, ("encode_boxes",)), (Matcher, ("__call__",)), BOX_IOU),
    ),
    evaluation=Bypassed(
        methods=(
            ("", SSD, ("postprocess_detections",)),
            ("box_coder", BoxCoder, ("decode_single",)),
        ),
        functions=((_utils, ("_topk_min",)), BATCHED_NMS, CLIPPING),
    ),
)

#: The key of an empty slot of `select_candidates`.
_NO_KEY = torch.iinfo(torch.int64).min
#: Largest number of images of a kernel launch.
_MAX_IMAGES = 65535


def check_ssd(model: SSD) -> None:
    """Raise ValueError if the model or one of its parts overrides what an accelerated model would bypass."""
    check_model(model, _BYPASSED)
    _check_matcher(model)


class AcceleratedForward(Accelerated, SSD):
    """An SSD whose `forward` uses the ops of this package."""

    def forward(
        self,
        images: list[Tensor],  # N tensors [3, H_i, W_i]
        targets: list[dict[str, Tensor]] | None = None,  # `boxes` [M_i, 4] and `labels` [M_i] of each image
    ) -> Any:
        """Return losses in training mode and detections in evaluation mode; see torchvision's `SSD`."""
        if not isinstance(self, AcceleratedForward):
            # A wrapper of `forward` holds this function although `restore` has ended the acceleration.
            return type(self).forward(self, images, targets)
        if torch.jit.is_tracing() or not check_boxes(targets, images, training=self.training):
            return super().forward(images, targets)
        check_call(self, _BYPASSED)
        if self.training:
            _check_matcher(self)
        inputs = transformed(self, images, targets)
        if inputs is None:
            return super().forward(images, targets)
        batch = inputs.batch
        features = list(run_backbone(self, batch).values())
        logits, deltas = _run_heads(self.head, features)
        anchors = default_boxes_of(self.anchor_generator, batch, features)
        if self.training:
            return self.eager_outputs(_losses(self, logits, deltas, anchors, inputs), [])
        detections = _detections(self, logits, deltas, anchors, batch.image_sizes)
        return self.eager_outputs({}, self.transform.postprocess(detections, batch.image_sizes, inputs.original_sizes))


def _check_matcher(model: SSD) -> None:
    if getattr(model.proposal_matcher, "allow_low_quality_matches", False):
        raise ValueError("accelerate: model.proposal_matcher.allow_low_quality_matches must be False, got True")


def _run_heads(
    head: Any,
    features: list[Tensor],  # L tensors [N, C, H, W]
) -> tuple[list[Tensor], list[Tensor]]:  # L tensors [N, A*K, H, W], L tensors [N, A*4, H, W]
    """Return logits and deltas of each level; those of other heads than torchvision's are one map, made from rows."""
    if not any(runs_as_written(head, owner) for owner in (SSDHead, SSDLiteHead)):
        outputs = head(features)
        return as_maps(outputs["cls_logits"], None), as_maps(outputs["bbox_regression"], None)
    # As in torchvision, all deltas come before all logits, because a head may draw random numbers.
    parts = [head.regression_head, head.classification_head]
    if all(_scores_as_written(part) for part in parts):
        deltas, logits = ([part.module_list[i](x) for i, x in enumerate(features)] for part in parts)
    else:
        deltas, logits = (as_maps(part(features), None) for part in parts)
    return logits, deltas


def _scores_as_written(part: Any) -> bool:
    """Return whether calling a part of the head runs torchvision's code and nothing else."""
    return runs_as_written(part, SSDScoringHead) and is_own(part, "_get_result_from_module_list", SSDScoringHead)


def _rows(
    level: Tensor,  # [N, A*C, H, W]
    columns: int,
) -> Tensor:  # [N, H*W*A, C]
    return level.unflatten(1, (-1, columns)).permute(0, 3, 4, 1, 2).flatten(1, 3)


def _num_classes(
    logits: list[Tensor],  # L tensors [N, A*K, H, W]
    deltas: list[Tensor],  # L tensors [N, A*4, H, W]
) -> int:
    return logits[0].shape[1] // (deltas[0].shape[1] // 4)


def _losses(
    model: SSD,
    logits: list[Tensor],  # L tensors [N, A*K, H, W]
    deltas: list[Tensor],  # L tensors [N, A*4, H, W]
    anchors: Tensor,  # [A, 4] or [N, A, 4]
    inputs: Inputs,
) -> dict[str, Tensor]:
    """Return both losses as in torchvision: sums over the batch, divided by its number of positives (at least 1)."""
    targets = inputs.targets
    num_classes = _num_classes(logits, deltas)
    check_label_range(targets, inputs.found, num_classes)
    truth = ops.pad_ground_truth([t["boxes"] for t in targets], [t["labels"] for t in targets])
    # torchvision counts default boxes between the thresholds as background, and gives an object that overlaps no
    # default box the first one.
    threshold = model.proposal_matcher.high_threshold
    rule = ops.MatchRule(fg_iou=threshold, bg_iou=threshold, low_quality="ssd", low_quality_min_iou=-1.0)
    assigned = ops.assign_targets(anchors, truth.boxes, truth.labels, truth.count, rule=rule)
    positives = assigned.num_positive.sum().clamp(min=1)
    box = ops.dense_box_loss(
        deltas,
        anchors,
        truth.boxes,
        assigned.matches,
        kind="smooth_l1",
        beta=1.0,
        coder_weights=model.box_coder.weights,
    )
    classes = assigned.labels.clamp(min=0)  # class 0 is the background
    entropy = ops.dense_softmax_cross_entropy(logits, classes, num_classes)
    counted = (classes > 0) | ops.hard_negative_mask(entropy, classes - 1, ratio=model.neg_to_pos_ratio)
    return {
        "bbox_regression": box.sum() / positives,
        "classification": entropy.where(counted, 0).sum() / positives,
    }


@torch.no_grad()
def _detections(
    model: SSD,
    logits: list[Tensor],  # L tensors [N, A*K, H, W]
    deltas: list[Tensor],  # L tensors [N, A*4, H, W]
    anchors: Tensor,  # [A, 4] or [N, A, 4]
    image_sizes: list[tuple[int, int]],  # height and width of each image inside the batch
) -> list[dict[str, Tensor]]:
    """Return a dict per image with `boxes` [D, 4], `scores` [D], `labels` [D], best first, in pixels of the batch."""
    num_classes, device = _num_classes(logits, deltas), logits[0].device
    boxes = ops.decode_boxes(
        torch.cat([_rows(level, 4) for level in deltas], dim=1),
        anchors,
        coder_weights=model.box_coder.weights,
        max_log_ratio=model.box_coder.bbox_xform_clip,
        image_sizes=torch.tensor(image_sizes, device=device),
    )
    scores = torch.cat([_scores(level, num_classes) for level in logits], dim=2)  # [N, K - 1, A]
    scores, index = _best_of_classes(scores, model.score_thresh, model.topk_candidates)  # [N, K - 1, T] each
    labels = torch.arange(1, num_classes, device=device)[:, None].expand_as(index).flatten(1)
    scores, index = scores.flatten(1), index.flatten(1)
    boxes = boxes.gather(1, index[..., None].expand(-1, -1, 4))
    # A large `detections_per_img` stands for no limit. Slots beyond the number of candidates would only take memory.
    candidates = index.shape[1]
    limit = candidates if model.detections_per_img is None else min(model.detections_per_img, candidates)
    kept, count = ops.batched_nms_padded(
        boxes, scores, labels, iou_threshold=model.nms_thresh, max_detections=limit
    )  # [N, limit], [N]
    kept = kept.clamp(min=0)  # the index of an unused slot is -1
    return detection_dicts(
        boxes.gather(1, kept[..., None].expand(-1, -1, 4)), scores.gather(1, kept), labels.gather(1, kept), count
    )


def _scores(
    level: Tensor,  # [N, A*K, H, W]
    num_classes: int,
) -> Tensor:  # [N, K - 1, H*W*A]
    """Return the scores of all classes but 0, the background."""
    scores = level.to(compute_dtype(level)).unflatten(1, (-1, num_classes)).softmax(2)
    return scores[:, :, 1:].permute(0, 2, 3, 4, 1).flatten(2)


def _best_of_classes(
    scores: Tensor,  # [N, C, A]
    threshold: float,
    topk: int,
) -> tuple[Tensor, Tensor]:  # [N, C, T] each
    """Return scores and indices of the best anchors of each class whose scores are above the threshold.

    Equal scores are ordered by anchor. The score of an unused slot is -inf.
    """
    images, classes, anchors = scores.shape
    topk = min(as_count("accelerate", "topk_candidates", topk, least=1), anchors)
    # The op ranks logits and skips those with a sigmoid below a threshold. It may as well rank scores, none of which is
    # negative. Rounding of the sigmoid must not skip a score above the threshold.
    least = 1 / (1 + math.exp(-max(threshold, -1.0))) - 1e-6
    parts = scores.view(-1, 1, anchors, 1).split(_MAX_IMAGES)  # each class of each image counts as an image
    keys = torch.cat([torch.ops.retinanet_ops.select_candidates([part], 1, least, topk)[0] for part in parts])
    used = keys != _NO_KEY
    index = (~keys & 0xFFFFFFFF).where(used, 0).view(images, classes, -1)
    best = scores.gather(2, index)
    return best.where(used.view_as(best) & (best > threshold), -math.inf), index
