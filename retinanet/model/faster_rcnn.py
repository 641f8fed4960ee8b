"""Faster R-CNN: backbone, feature pyramid and torchvision's two stages, and the calls of losses and post-processing."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.poolers import initLevelMapper

import retinanet_ops as ops
from retinanet.model.anchors import anchor_grid, base_anchors
from retinanet.model.faster_rcnn_config import FasterRCNNConfig
from retinanet.model.losses import ImageLosses, ImageMeans, anchor_weights
from retinanet.model.pyramid import PyramidDetector
from retinanet_ops import _rcnn

#: Levels above this one have no cells of their own to pool regions from.
_LAST_POOLED_LEVEL = 5
#: Height and width in cells of a pooled region, and samples of a cell per axis.
_POOLED_SIZE, _SAMPLES = 7, 2


class FirstStage(NamedTuple):
    """The maps of a batch, and the outputs of the region proposal network on them."""

    maps: list[Tensor]  # L tensors [N, C, H, W]
    objectness: list[Tensor]  # L tensors [N, A, H, W]
    deltas: list[Tensor]  # L tensors [N, A*4, H, W]
    anchors: ops.AnchorGrid


class Sample(NamedTuple):
    """The regions of each image that take part in the losses of the second stage."""

    rois: list[Tensor]  # N tensors [S_i, 4]
    labels: list[Tensor]  # N tensors [S_i] int64, a class id or -1 for background
    boxes: list[Tensor]  # N tensors [S_i, 4], the box of the object, or of the region itself for background


class FasterRCNN(PyramidDetector):
    """A Faster R-CNN as described by one configuration; its state-dict names are torchvision's.

    In training mode a call returns the losses `loss_objectness` and `loss_rpn_box_reg` of the region proposal network
    (RPN), and `loss_classifier` and `loss_box_reg` of the second stage. In evaluation mode it returns one dict per
    image with `boxes` `[D, 4]`, `scores` `[D]` and `labels` `[D]`, best first.

    Ren et al. 2015 (arXiv:1506.01497) with a feature pyramid. Each loss is a mean over the sampled anchors or regions
    of a batch, as in torchvision. The samples are drawn from the global random generator of the model's device. Labels
    are 0..K-1 as everywhere in this package; the background class of torchvision exists inside the model only. The
    numbers of proposals and of detections depend on values, so losses and detections synchronise with the device.

    Args:
        config: The configuration, which is kept as `model.config`.
        backbone_weights: Path to a torchvision state dict of the backbone (ImageNet), or None.
        backbone: Module for a configuration whose backbone is `custom`; see `PyramidDetector`.

    Raises:
        DataError: The weights of the backbone cannot be read or do not fit.
        ValueError: `backbone` is missing, is given for another configuration, or does not fit the configuration.

    Attributes:
        config: The configuration.
        score_thresholds: The score thresholds with the best F1 on a validation set, or None if none were chosen. They
            do not change what a call returns; `config.score_threshold` does.

    Example:
        >>> model = FasterRCNN(FasterRCNNConfig(class_names=("tree",), backbone="resnet18"))
        >>> images = [torch.rand(3, 300, 400), torch.rand(3, 500, 400)]
        >>> boxes = torch.tensor([[10.0, 10, 60, 80]])
        >>> targets = [{"boxes": boxes, "labels": torch.tensor([0])}] * 2
        >>> losses = model(images, targets)
        >>> detections = model.eval()(images)
    """

    loss_names = ("loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg")

    config: FasterRCNNConfig
    base_anchors: Tensor  # [L * anchors per cell, 4] float32

    def __init__(
        self,
        config: FasterRCNNConfig,
        backbone_weights: str | os.PathLike[str] | None = None,
        *,
        backbone: nn.Module | None = None,
    ) -> None:
        """Build the networks with random weights, except those of the backbone where they are given."""
        super().__init__(config, ImageMeans(), backbone_weights, backbone)
        channels, features = config.fpn_channels, config.representation_size
        pooled = [level for level in config.fpn_levels if level <= _LAST_POOLED_LEVEL]
        self.pooled = len(pooled)
        # The names of these parts are those of torchvision's model.
        self.rpn = nn.ModuleDict({"head": RPNHead(channels, config.anchors_per_cell)})
        self.roi_heads = nn.ModuleDict(
            {
                "box_roi_pool": _pool(pooled),
                "box_head": TwoMLPHead(channels * _POOLED_SIZE**2, features),
                "box_predictor": FastRCNNPredictor(features, config.num_classes + 1),
            }
        )
        self.rpn_sampler = BalancedPositiveNegativeSampler(config.rpn_batch_size, config.rpn_positive_fraction)
        self.roi_sampler = BalancedPositiveNegativeSampler(config.roi_batch_size, config.roi_positive_fraction)
        self.register_buffer("base_anchors", base_anchors(config), persistent=False)

    def image_losses(
        self,
        pixels: Tensor,  # [N, 3, H, W] normalised
        ground_truth: ops.GroundTruth,  # boxes [N, M, 4] in pixels of the batch, labels [N, M], count [N]
        crowds: ops.PaddedBoxes | None = None,  # boxes [N, C, 4], count [N]
        image_sizes: Sequence[tuple[int, int]] | None = None,  # height, width of each image inside the padded batch
    ) -> ImageLosses:
        """Return the losses of each image of a padded batch, whose means over the images are the losses of the batch.

        Background anchors and regions that a crowd covers are not sampled.
        """
        config = self.config
        first = self.first_stage(pixels)
        matches = ops.match_anchors(
            first.anchors,
            ground_truth.boxes,
            ground_truth.count,
            rule=ops.MatchRule(config.rpn_fg_iou_threshold, config.rpn_bg_iou_threshold, "torchvision"),
            crowds=crowds,
        )
        sizes = image_sizes or [(pixels.shape[-2], pixels.shape[-1])] * len(pixels)
        proposals = self.proposals(first, _as_tensor(sizes, pixels))
        rpn = _rcnn.rpn_losses(
            first.objectness, first.deltas, first.anchors, ground_truth.boxes, matches, self.rpn_sampler
        )
        sample = self.sample(proposals, ground_truth, crowds)
        logits, deltas = self.second_stage(pixels, first.maps, sample.rois)
        counts = [len(rois) for rois in sample.rois]
        classification, box = _roi_losses(logits, deltas, sample, config.box_weights, self.class_weights)
        regions = torch.tensor(counts)
        sums = {
            "loss_objectness": rpn.objectness / _mean(rpn.sampled),
            "loss_rpn_box_reg": rpn.box / _mean(rpn.sampled),
            "loss_classifier": _sums(classification, counts) / float(_mean(regions)),
            "loss_box_reg": _sums(box, counts) / float(_mean(regions)),
        }
        return ImageLosses(sums, torch.ones_like(rpn.sampled))

    def first_stage(self, pixels: Tensor) -> FirstStage:  # [N, 3, H, W] normalised
        """Run the backbone and the region proposal network alone."""
        maps = self.maps(pixels)
        objectness, deltas = self.rpn["head"](maps)
        grid_sizes = tuple((level.shape[-2], level.shape[-1]) for level in objectness)
        batch_size = (pixels.shape[-2], pixels.shape[-1])
        return FirstStage(maps, objectness, deltas, anchor_grid(self.config, self.base_anchors, batch_size, grid_sizes))

    def proposals(
        self,
        first: FirstStage,
        image_sizes: Tensor,  # [N, 2] (height, width) of each image inside the padded batch
    ) -> list[Tensor]:  # N tensors [P_i, 4]
        """Return the proposals of each image, best first, clipped, in pixels of the batch."""
        config = self.config
        return _rcnn.best_proposals(
            first.objectness,
            first.deltas,
            first.anchors,
            image_sizes,
            topk_per_level=config.rpn_topk_training if self.training else config.rpn_topk,
            max_proposals=config.proposals_training if self.training else config.proposals,
            nms_threshold=config.rpn_nms_threshold,
            max_log_ratio=config.max_log_ratio,
        )

    def sample(
        self,
        proposals: list[Tensor],  # N tensors [P_i, 4]
        ground_truth: ops.GroundTruth,  # boxes [N, M, 4], labels [N, M], count [N]
        crowds: ops.PaddedBoxes | None,  # boxes [N, C, 4], count [N]
    ) -> Sample:
        """Match proposals and objects to the objects, and draw those that take part in the losses."""
        config, truth = self.config, ground_truth.boxes
        counts = ground_truth.count.tolist()
        rois = [torch.cat((p, boxes[:n].to(p.dtype))) for p, boxes, n in zip(proposals, truth, counts, strict=True)]
        targets = ops.assign_targets(
            ops.pad_boxes(rois).boxes,
            truth,
            ground_truth.labels,
            ground_truth.count,
            rule=ops.MatchRule(config.roi_fg_iou_threshold, config.roi_bg_iou_threshold, "off"),
            crowds=crowds,
        )
        labels = [row[: len(r)].long() for row, r in zip(targets.labels, rois, strict=True)]
        # The sampler takes 0 for background and -1 for what is left out.
        positive, negative = self.roi_sampler([row + 1 for row in labels])
        rows = [torch.where(p | n)[0] for p, n in zip(positive, negative, strict=True)]
        rois, labels = ([image[i] for image, i in zip(images, rows, strict=True)] for images in (rois, labels))
        matches = [image[i].long() for image, i in zip(targets.matches, rows, strict=True)]
        objects = F.pad(truth, (0, 0, 1, 0))  # The box that is prepended is that of regions without a match.
        boxes = [
            of_image[match.clamp(min=-1) + 1].where(match[:, None] >= 0, own)
            for of_image, match, own in zip(objects, matches, rois, strict=True)
        ]
        return Sample(rois, labels, boxes)

    def second_stage(
        self,
        pixels: Tensor,  # [N, 3, H, W]
        maps: list[Tensor],  # L tensors [N, C, H, W]
        rois: list[Tensor],  # N tensors [R_i, 4]
    ) -> tuple[Tensor, Tensor]:  # [R, K + 1], [R, (K + 1) * 4]
        """Return class logits, of which the first is the background's, and box deltas of all regions."""
        named = {str(i): level for i, level in enumerate(maps[: self.pooled])}
        sizes = [(pixels.shape[-2], pixels.shape[-1])] * len(rois)
        features = self.roi_heads["box_head"](self.roi_heads["box_roi_pool"](named, rois, sizes))
        logits, deltas = self.roi_heads["box_predictor"](features)
        return logits, deltas

    def detections(
        self,
        pixels: Tensor,  # [N, 3, H, W] normalised
        image_sizes: Tensor,  # [N, 2] (height, width) of each image inside the padded batch
    ) -> ops.Detections:  # config.max_detections slots for each image
        """Return the padded detections of a batch, in pixels of the batch; see `retinanet_ops.detect`.

        `anchor_index` is the row of the proposal among those of the whole batch.
        """
        config = self.config
        found = self._scored(pixels, image_sizes)
        best, truncated = _rcnn.keep_best(
            found,
            len(pixels),
            config.num_classes + 1,
            iou_threshold=config.nms_threshold,
            max_detections=config.max_detections,
        )
        count = torch.tensor([len(rows) for rows in best], device=pixels.device)
        boxes, scores, labels, rois = _padded(found, best, config.max_detections, 0.0)
        return ops.Detections(boxes, scores, labels, count, rois, truncated)

    def candidates(
        self,
        pixels: Tensor,  # [N, 3, H, W] normalised
        image_sizes: Tensor,  # [N, 2] (height, width) of each image inside the padded batch
    ) -> ops.Candidates:
        """Return the padded candidates of a batch before NMS, clipped, in pixels of the batch."""
        found = self._scored(pixels, image_sizes)
        order = found.scores.argsort(descending=True, stable=True)
        order = order[found.scores[order].isfinite()]
        rows = [order[found.images[order] == i] for i in range(len(pixels))]
        padded = _padded(found, rows, max(map(len, rows)), float("-inf"))
        return ops.Candidates(*padded, torch.zeros(len(pixels), dtype=torch.bool, device=pixels.device))

    @torch.no_grad()
    def _scored(self, pixels: Tensor, image_sizes: Tensor) -> _rcnn.RoICandidates:
        """Return all boxes of a batch whose score is above the threshold."""
        config = self.config
        first = self.first_stage(pixels)
        rois = self.proposals(first, image_sizes)
        logits, deltas = self.second_stage(pixels, first.maps, rois)
        return _rcnn.roi_candidates(
            logits,
            deltas,
            rois,
            image_sizes,
            score_threshold=config.score_threshold,
            coder_weights=config.box_weights,
            max_log_ratio=config.max_log_ratio,
        )


def _pool(levels: Sequence[int]) -> MultiScaleRoIAlign:
    """Return the pooling of regions from some levels of the pyramid, whose maps are named by their number from 0."""
    pool = MultiScaleRoIAlign(list(map(str, range(len(levels)))), _POOLED_SIZE, _SAMPLES)
    # Without a scale and a mapping, the pooling would infer both from the sizes of the first batch and keep them. Maps
    # whose size has been rounded up would give it wrong ones.
    pool.scales = [2.0**-level for level in levels]
    pool.map_levels = initLevelMapper(levels[0], levels[-1])
    return pool


def _roi_losses(
    logits: Tensor,  # [R, K + 1]
    deltas: Tensor,  # [R, (K + 1) * 4]
    sample: Sample,
    box_weights: Sequence[float],
    class_weights: Tensor | None,  # [K] floating
) -> tuple[Tensor, Tensor]:  # [R] float32 each (float64 for float64 outputs)
    """Return the cross entropy of each region, and the smooth L1 loss of those that are matched to an object."""
    rois, labels, boxes = map(torch.cat, sample)
    map_of_rows = logits[None, :, None].permute(0, 3, 1, 2)  # [1, K + 1, R, 1], a channels_last view
    classification = ops.dense_softmax_cross_entropy([map_of_rows], labels[None] + 1, logits.shape[1])[0]
    weights = anchor_weights(labels, class_weights)
    if weights is not None:
        classification = classification * weights
    own = deltas.unflatten(1, (-1, 4))[torch.arange(len(labels), device=labels.device), labels + 1]
    targets = ops.encode_boxes(boxes, rois, coder_weights=box_weights)
    box = F.smooth_l1_loss(own.to(targets.dtype), targets, beta=1 / 9, reduction="none").sum(1)
    return classification, box.where(labels >= 0, 0)


def _padded(
    found: _rcnn.RoICandidates,
    rows: list[Tensor],  # N tensors [D_i] int64
    slots: int,
    unused_score: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # [N, D, 4], [N, D], [N, D] int64, [N, D] int64
    """Return boxes, scores, class ids and regions of some candidates of each image, with unused slots at the end."""

    def pad(values: Tensor, unused: float) -> Tensor:
        padded = values.new_full((len(rows), slots, *values.shape[1:]), unused)
        for slot, of_image in zip(padded, rows, strict=True):
            slot[: len(of_image)] = values[of_image]
        return padded

    return pad(found.boxes, 0), pad(found.scores, unused_score), pad(found.labels - 1, -1), pad(found.rois, -1)


def _sums(values: Tensor, counts: list[int]) -> Tensor:  # [R] -> [N]
    """Return the sum over the rows of each image."""
    return torch.stack([of_image.sum() for of_image in values.split(counts)])


def _mean(counts: Tensor) -> Tensor:  # [N] integer -> scalar, above 0
    """Return the mean of some numbers of samples, or 1 if all are 0 and the sums to be divided are 0 as well."""
    mean = counts.float().mean()
    return mean.where(mean > 0, 1.0)


def _as_tensor(sizes: Sequence[tuple[int, int]], beside: Tensor) -> Tensor:  # [N, 2]
    return torch.tensor(sizes, device=beside.device)
