"""torchvision's Faster R-CNN with the matching, the proposals, the losses and the post-processing of this package.

Mask and Keypoint R-CNN consist of the same parts. The classes of two parts of the model are replaced: that of the
region proposal network, for its `forward`, and that of the RoI heads, for two methods. The class of the model remains,
and so do its `forward` and that of the RoI heads, which clients override, and in which torchvision computes masks and
keypoints.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
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

#: Boxes that RoI heads detect have sides of at least this many pixels. torchvision writes the number in its code.
_LEAST_SIDE = 1e-2

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
        proposals = _proposals(self, objectness, deltas, anchors, images.image_sizes)
        if not self.training:
            return proposals, {}
        if targets is None:
            raise ValueError("targets should not be None")
        return proposals, _losses(self, objectness, deltas, anchors, targets)


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
        rois, (rows, num_classes), device = torch.cat(proposals), class_logits.shape, class_logits.device
        every_score = F.softmax(class_logits.to(compute_dtype(class_logits)), -1)
        roi, label = (every_score[:, 1:] > self.score_thresh).nonzero().unbind(1)
        label = label + 1  # class 0 is the background
        scores = every_score[roi, label]
        image = torch.cat([torch.full((len(p),), i, device=device) for i, p in enumerate(proposals)])[roi]
        boxes = ops.decode_boxes(
            box_regression.reshape(rows, num_classes, 4)[roi, label][:, None],
            rois[roi][:, None],
            coder_weights=self.box_coder.weights,
            max_log_ratio=self.box_coder.bbox_xform_clip,
            image_sizes=_sizes(image_shapes, rois)[image],
        )[:, 0]
        large = (boxes[:, 2:] - boxes[:, :2] >= _LEAST_SIDE).all(1)
        ranked, _ = ops.batched_nms_padded(
            boxes[None],
            scores.where(large, -math.inf)[None],
            (image * num_classes + label)[None],  # boxes of two images never suppress each other
            iou_threshold=self.nms_thresh,
            max_detections=len(roi),
        )
        limit, index = self.detections_per_img, ranked[0]
        of_image = (image[index] == torch.arange(len(proposals), device=device)[:, None]) & (index >= 0)  # [N, S]
        if limit is not None:
            of_image &= of_image.cumsum(1) <= as_count("accelerate", "model.roi_heads.detections_per_img", limit)
        counts = of_image.sum(1).tolist()
        owner = image[index].where(of_image.any(0), len(proposals))  # of what is dropped, an image that comes last
        best = index[owner.argsort(stable=True)[: sum(counts)]]
        # Masks and keypoints are pooled at these boxes, which needs the dtype of the proposals.
        boxes, scores = boxes[best].to(rois.dtype), scores[best].to(rois.dtype)
        return list(boxes.split(counts)), list(scores.split(counts)), list(label[best].split(counts))


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


def _proposals(
    rpn: AcceleratedRPN,
    objectness: list[Tensor],  # L tensors [N, A, H, W]
    deltas: list[Tensor],  # L tensors [N, A*4, H, W]
    anchors: Tensor | ops.AnchorGrid,  # [N, sum A*H*W, 4]
    image_sizes: list[tuple[int, int]],  # height and width of each image inside the batch
) -> list[Tensor]:  # N tensors [P_i, 4]
    """Return the boxes that NMS keeps of the best anchors of each level."""
    sizes = _sizes(image_sizes, objectness[0])
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    # One call for each level keeps candidates ordered by level. Equal scores of two levels then rank as in torchvision.
    for i, (logits, level, grid) in enumerate(zip(objectness, deltas, _by_level(anchors, deltas), strict=True)):
        best = ops.candidates(
            [logits],
            [level],
            grid,
            sizes,
            score_threshold=-1.0,
            topk_per_level=rpn.pre_nms_top_n(),
            coder_weights=rpn.box_coder.weights,
            max_log_ratio=rpn.box_coder.bbox_xform_clip,
        )
        # NMS ranks by the scores that torchvision computes. Those of the op are exact, so other scores would be equal.
        rows = logits.detach().permute(0, 2, 3, 1).flatten(1)  # [N, A*H*W]
        scores = rows.gather(1, best.anchor_index.clamp(min=0)).to(best.boxes.dtype).sigmoid()
        found.append((best.boxes, scores.where(best.anchor_index >= 0, -math.inf), torch.full_like(best.labels, i)))
    boxes, scores, levels = (torch.cat(parts, dim=1) for parts in zip(*found, strict=True))
    kept = (boxes[..., 2:] - boxes[..., :2] >= rpn.min_size).all(-1) & (scores >= rpn.score_thresh)
    index, count = ops.batched_nms_padded(
        boxes,
        scores.where(kept, -math.inf),
        levels,
        iou_threshold=rpn.nms_thresh,
        max_detections=min(rpn.post_nms_top_n(), scores.shape[1]),
    )
    boxes = boxes.gather(1, index.clamp(min=0)[..., None].expand(-1, -1, 4))
    if not torch.is_autocast_enabled(boxes.device.type):
        boxes = boxes.to(deltas[0].dtype)  # RoI pooling needs the dtype of the features, except under autocast
    return _rows(boxes, count.tolist())


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
    labels = (matches.clamp(max=0) + 1).to(torch.float32)  # torchvision's codes: 1, 0 for background, -1 for ignored
    positive, negative = (torch.stack(masks).bool() for masks in rpn.fg_bg_sampler(list(labels)))
    sampled = positive | negative
    count = sampled.sum()
    classes = sampled.int() + positive.int() - 2  # 0, -1 for background, -2 for anchors that are not sampled
    objective = ops.dense_focal_loss(objectness, classes, 1, alpha=-1.0, gamma=0.0)  # without focus: cross entropy
    box = ops.dense_box_loss(
        deltas,
        anchors,
        truth.boxes,
        matches.where(positive, -1),
        kind="smooth_l1",
        beta=1 / 9,
        coder_weights=rpn.box_coder.weights,
    )
    return {"loss_objectness": objective.sum() / count, "loss_rpn_box_reg": box.sum() / count}


def _by_level(
    anchors: Tensor | ops.AnchorGrid,  # [N, sum A*H*W, 4]
    deltas: list[Tensor],  # L tensors [N, A*4, H, W]
) -> Sequence[Tensor | ops.AnchorGrid]:
    """Return the anchors of each level."""
    if isinstance(anchors, Tensor):
        return anchors.split([level[0].numel() // 4 for level in deltas], dim=1)
    return [
        replace(
            anchors, base_anchors=base, anchors_per_cell=(len(base),), grid_sizes=(size,), strides=(s,), offsets=(o,)
        )
        for base, size, s, o in zip(
            anchors.base_anchors.split(list(anchors.anchors_per_cell)),
            anchors.grid_sizes,
            anchors.strides,
            anchors.offsets,
            strict=True,
        )
    ]


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
