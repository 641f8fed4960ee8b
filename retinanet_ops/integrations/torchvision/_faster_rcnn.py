"""torchvision's Faster R-CNN with the matching, the proposals, the losses and the post-processing of this package.

Mask and Keypoint R-CNN consist of the same parts. The classes of two parts of the model are replaced: that of the
region proposal network, for its `forward`, and that of the RoI heads, for two methods. The class of the model remains,
and so do its `forward` and that of the RoI heads, which clients override, and in which torchvision computes masks and
keypoints.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import _utils, rpn
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import (
    RegionProposalNetwork,
)
from torchvision.ops import box_iou, boxes

import retinanet_ops as ops
from retinanet_ops._checks import as_count
from retinanet_ops._image_sizes import as_image_sizes
from retinanet_ops._rcnn import best_proposals, keep_best, roi_candidates, rpn_losses
from retinanet_ops.types import compute_dtype

from ._anchors import anchors_of
from ._model_class import Accelerated
from ._own_code import (
    BATCHED_NMS,
    BOX_IOU,
    CLIPPING,
    Bypassed,
    BypassedByMode,
    check_call,
    check_class,
    check_model,
    check_own_code,
)

_DECODING = ("box_coder", BoxCoder, ("decode", "decode_single"))
_MATCHING = ("proposal_matcher", Matcher, ("__call__", "set_low_quality_matches_"))
_FILTERING = (BATCHED_NMS, CLIPPING, (boxes, ("remove_small_boxes",)))

#: What an accelerated region proposal network bypasses in evaluation, and in training as well.
_PROPOSING = Bypassed(
    methods=(("", RegionProposalNetwork, ("filter_proposals", "_get_top_n_idx")), _DECODING),
    functions=((rpn, ("concat_box_prediction_layers", "permute_and_flatten")), (_utils, ("_topk_min",)), *_FILTERING),
)
_BYPASSED_BY_RPN = BypassedByMode(
    owner=RegionProposalNetwork,
    training=Bypassed(
        methods=(
            *_PROPOSING.methods,
            ("", RegionProposalNetwork, ("assign_targets_to_anchors", "compute_loss")),
            ("box_coder", BoxCoder, ("encode", "encode_single")),
            _MATCHING,
        ),
        functions=(*_PROPOSING.functions, (_utils, ("encode_boxes",)), BOX_IOU),
    ),
    evaluation=_PROPOSING,
)
#: What each method of accelerated RoI heads bypasses.
_BYPASSED_BY_ROI_HEADS = {
    "assign_targets_to_proposals": Bypassed(methods=(_MATCHING,), functions=(BOX_IOU,)),
    "postprocess_detections": Bypassed(methods=(_DECODING,), functions=_FILTERING),
}


def check_rpn(model: RegionProposalNetwork) -> None:
    """Raise ValueError if a region proposal network overrides what an accelerated one would bypass."""
    check_model(model, _BYPASSED_BY_RPN, model_name="model.rpn")
    _check_similarity(model)


def check_roi_heads(model: RoIHeads) -> None:
    """Raise ValueError if RoI heads override what accelerated ones would bypass."""
    own = Bypassed(methods=(("", RoIHeads, tuple(_BYPASSED_BY_ROI_HEADS)),), functions=())
    for bypassed in (own, *_BYPASSED_BY_ROI_HEADS.values()):
        check_own_code(model, bypassed, missing=False, model_name="model.roi_heads")


class AcceleratedRCNN(Accelerated, GeneralizedRCNN):
    """A model whose region proposal network and RoI heads are accelerated. It overrides no method of torchvision."""

    _methods = ()

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute, and warn if that ends the acceleration of a part."""
        if name in ("rpn", "roi_heads") and isinstance(value, nn.Module):
            if not any(isinstance(module, Accelerated) for module in value.modules()):
                warnings.warn(
                    f"accelerate: model.{name} was replaced by a part that is not accelerated. Call accelerate() "
                    "again.",
                    stacklevel=2,
                )
        super().__setattr__(name, value)


class AcceleratedRPN(Accelerated, RegionProposalNetwork):
    """A region proposal network whose `forward` uses the ops of this package."""

    _name = "model.rpn"

    def forward(
        self,
        images: ImageList,
        features: dict[str, Tensor],  # of each level, [N, C, H, W]
        targets: list[dict[str, Tensor]] | None = None,  # `boxes` [M_i, 4] of each image
    ) -> tuple[list[Tensor], dict[str, Tensor]]:  # N tensors [P_i, 4]
        """Return the proposals of each image, best first, and in training both losses; see torchvision's class."""
        if torch.jit.is_tracing() or not isinstance(self, AcceleratedRPN):
            # A wrapper of `forward` holds this function also after `restore` has ended the acceleration.
            return RegionProposalNetwork.forward(self, images, features, targets)
        check_call(self, _BYPASSED_BY_RPN, model_name=self._name)
        if self.training:
            _check_similarity(self)
        levels = list(features.values())
        objectness, deltas = self.head(levels)
        anchors = anchors_of(self.anchor_generator, images, levels)
        boxes = best_proposals(
            objectness,
            deltas,
            anchors,
            _sizes(images.image_sizes, objectness[0]),
            topk_per_level=self.pre_nms_top_n(),
            max_proposals=self.post_nms_top_n(),
            nms_threshold=self.nms_thresh,
            score_threshold=self.score_thresh,
            least_side=self.min_size,
            coder_weights=self.box_coder.weights,
            max_log_ratio=self.box_coder.bbox_xform_clip,
        )
        if not self.training:
            return boxes, {}
        if targets is None:
            raise ValueError("targets should not be None")
        return boxes, _losses(self, objectness, deltas, anchors, targets)


class AcceleratedRoIHeads(Accelerated, RoIHeads):
    """RoI heads whose assignment of proposals and post-processing of boxes use the ops of this package."""

    _methods = tuple(_BYPASSED_BY_ROI_HEADS)
    _name = "model.roi_heads"

    def assign_targets_to_proposals(
        self,
        proposals: list[Tensor],  # N tensors [P_i, 4]
        gt_boxes: list[Tensor],  # N tensors [M_i, 4]
        gt_labels: list[Tensor],  # N tensors [M_i]
    ) -> tuple[list[Tensor], list[Tensor]]:  # N tensors [P_i] int64 each
        """Return the object of each proposal, 0 without one, and its label, 0 for background and -1 for ignored."""
        if torch.jit.is_tracing() or not isinstance(self, AcceleratedRoIHeads):
            return RoIHeads.assign_targets_to_proposals(self, proposals, gt_boxes, gt_labels)
        _check_roi_call(self, "assign_targets_to_proposals")
        images = len(proposals)
        truth = ops.pad_ground_truth(gt_boxes[:images], gt_labels[:images])
        padded = ops.pad_boxes(proposals).boxes  # padded rows have no area, so they match nothing
        matches = ops.match_anchors(padded, truth.boxes, truth.count, rule=_rule(self.proposal_matcher)).long()
        # Labels of ignored proposals and of background, whose matches are -2 and -1, precede those of the objects.
        labels = F.pad(F.pad(truth.labels, (1, 0), value=0), (1, 0), value=-1).gather(1, matches + 2)
        counts = [len(image) for image in proposals]
        return _rows(matches.clamp(min=0), counts), _rows(labels, counts)

    def postprocess_detections(
        self,
        class_logits: Tensor,  # [R, K]
        box_regression: Tensor,  # [R, K * 4]
        proposals: list[Tensor],  # N tensors [R_i, 4], whose numbers of rows add up to R
        image_shapes: list[tuple[int, int]],  # height and width of each image
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:  # N tensors [D_i, 4], [D_i], [D_i] int64
        """Return boxes, scores and labels of the detections of each image, best first."""
        if torch.jit.is_tracing() or not isinstance(self, AcceleratedRoIHeads):
            return RoIHeads.postprocess_detections(self, class_logits, box_regression, proposals, image_shapes)
        _check_roi_call(self, "postprocess_detections")
        found = roi_candidates(
            class_logits,
            box_regression,
            proposals,
            _sizes(image_shapes, proposals[0]),
            score_threshold=self.score_thresh,
            coder_weights=self.box_coder.weights,
            max_log_ratio=self.box_coder.bbox_xform_clip,
        )
        limit = self.detections_per_img
        if limit is not None:
            limit = as_count("accelerate", "model.roi_heads.detections_per_img", limit)
        best, _ = keep_best(
            found, len(proposals), class_logits.shape[1], iou_threshold=self.nms_thresh, max_detections=limit
        )
        # Masks and keypoints are pooled at these boxes, which needs the dtype of the proposals.
        boxes, scores = (values.to(proposals[0].dtype) for values in (found.boxes, found.scores))
        return [boxes[i] for i in best], [scores[i] for i in best], [found.labels[i] for i in best]


def _check_similarity(model: RegionProposalNetwork) -> None:
    if model.box_similarity not in (box_iou, ops.box_iou):
        raise ValueError(
            "accelerate: model.rpn.box_similarity must be box_iou of torchvision or retinanet_ops, because it would be "
            "bypassed, got another function; set one of them, or use the model without accelerate()"
        )


def _check_roi_call(model: AcceleratedRoIHeads, method: str) -> None:
    """Raise ValueError if something that a call of the method bypasses was overridden since `accelerate`."""
    check_class(model._original, RoIHeads, method, model_name=model._name)
    check_own_code(model, _BYPASSED_BY_ROI_HEADS[method], missing=False, model_name=model._name)


def _losses(
    rpn: AcceleratedRPN,
    objectness: list[Tensor],  # L tensors [N, A, H, W]
    deltas: list[Tensor],  # L tensors [N, A*4, H, W]
    anchors: Tensor | ops.AnchorGrid,  # [N, sum A*H*W, 4]
    targets: list[dict[str, Tensor]],
) -> dict[str, Tensor]:
    """Return both losses as in torchvision: the sums over the sampled anchors of a batch, divided by their number."""
    truth = ops.pad_boxes([target["boxes"] for target in targets[: len(deltas[0])]])
    matches = ops.match_anchors(anchors, truth.boxes, truth.count, rule=_rule(rpn.proposal_matcher))
    losses = rpn_losses(
        objectness, deltas, anchors, truth.boxes, matches, rpn.fg_bg_sampler, coder_weights=rpn.box_coder.weights
    )
    count = losses.sampled.sum()
    return {"loss_objectness": losses.objectness.sum() / count, "loss_rpn_box_reg": losses.box.sum() / count}


def _rule(matcher: Matcher) -> ops.MatchRule:
    return ops.MatchRule(
        fg_iou=matcher.high_threshold,
        bg_iou=matcher.low_threshold,
        low_quality="torchvision" if matcher.allow_low_quality_matches else "off",
    )


def _rows(padded: Tensor, counts: list[int]) -> list[Tensor]:
    """Return the first rows of each image."""
    return [image[:count] for image, count in zip(padded, counts, strict=True)]


def _sizes(image_sizes: list[tuple[int, int]], beside: Tensor) -> Tensor:  # [N, 2]
    """Return the sizes of images as a tensor, without a synchronisation."""
    return as_image_sizes("accelerate", "image_sizes", image_sizes, len(image_sizes), compute_dtype(beside), beside)
