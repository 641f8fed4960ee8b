"""RetinaNet: backbone, feature pyramid and heads; criterion and post-processing are called, not contained.

`RetinaNet.forward` keeps the contract of torchvision's detection models (lists in, dicts out). Below it lies
a path on batched tensors (`heads`, `losses`, `detections`) that has no shape that depends on values, and never waits
for the device.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor, nn

import retinanet_ops as ops
from retinanet.model.anchors import anchor_grid, base_anchors
from retinanet.model.backbone import build_backbone
from retinanet.model.clip_after_nms import suppress_unclipped
from retinanet.model.config import CUSTOM, RetinaNetConfig
from retinanet.model.float32_buffers import Float32Buffers
from retinanet.model.heads import HeadOutputs, RetinaNetHead
from retinanet.model.losses import LossNormaliser, retinanet_losses
from retinanet.model.preprocessing import Preprocessing
from retinanet.model.targets import check_targets, image_sizes_of, pack_targets, unpack_detections

#: How the names end of what a model counts as it trains, which starts anew with weights from elsewhere.
COUNTERS = ("num_batches_tracked", "normaliser.average")


class RetinaNet(Float32Buffers):
    """A RetinaNet as described by one configuration; its state-dict names are torchvision's.

    In training mode a call returns the losses `classification` and `bbox_regression`; in evaluation mode it
    returns one dict per image with `boxes` `[D, 4]`, `scores` `[D]` and `labels` `[D]`, best first.

    Args:
        config: Everything about the model; kept as `model.config`.
        backbone_weights: Path to a torchvision state dict of the backbone (ImageNet), or None.
        backbone: The module itself, for a configuration whose backbone is `custom`: it takes images `[N, 3, H, W]`,
            gives a map `[N, out_channels, H_l, W_l]` for each of `config.fpn_levels` (a dict of them, or one tensor)
            and has the attribute `out_channels`, which is `config.fpn_channels`. What of it is trained is its own.

    Raises:
        DataError: The backbone's weights cannot be read or do not fit.
        ValueError: `backbone` is missing or unasked for, or does not fit the configuration.

    Example:
        >>> model = RetinaNet(RetinaNetConfig(class_names=("tree",), backbone="resnet18"))
        >>> images = [torch.rand(3, 300, 400), torch.rand(3, 500, 400)]
        >>> boxes = torch.tensor([[10.0, 10, 60, 80]])
        >>> targets = [{"boxes": boxes, "labels": torch.tensor([0])}] * 2
        >>> losses = model(images, targets)
        >>> detections = model.eval()(images)
    """

    base_anchors: Tensor  # [L * anchors per cell, 4] float32

    def __init__(
        self,
        config: RetinaNetConfig,
        backbone_weights: str | os.PathLike[str] | None = None,
        *,
        backbone: nn.Module | None = None,
    ) -> None:
        """Builds the network with random weights, but for the backbone's where they are given."""
        super().__init__()
        self.config = config
        _check_backbone(config, backbone)
        self.backbone: nn.Module = build_backbone(config, backbone_weights) if backbone is None else backbone
        self.head = RetinaNetHead(config)
        self.transform = Preprocessing(config)
        self.normaliser = LossNormaliser(config)
        self.register_buffer("base_anchors", base_anchors(config), persistent=False)

    def forward(
        self,
        images: Sequence[Tensor] | Tensor,  # N tensors [3, H_i, W_i] in 0..1, RGB, or one [N, 3, H, W]
        targets: Sequence[dict[str, Tensor]] | None = None,
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Losses in training mode, detections in evaluation mode.

        Args:
            images: Images of any sizes, floating point in 0..1.
            targets: Needed in training, not read otherwise: for each image a dict with `boxes` `[M, 4]` (x1,
                y1, x2, y2 in pixels of that image, x1 < x2, y1 < y2) and `labels` `[M]` (integers, 0..K-1), `M`
                may be 0; optionally `crowd_boxes` `[C, 4]`: regions whose background takes no part in the
                loss. Other keys are left alone.

        Returns:
            In training mode a dict of two scalar losses. In evaluation mode a list of dicts; boxes are in
            pixels of the image that came in.

        Raises:
            ValueError: Images or targets are missing or malformed; the message names the image.
            TypeError: An image is no tensor, or not floating point.
        """
        original_sizes = image_sizes_of(images)
        for i, (height, width) in enumerate(original_sizes):
            if self.transform.vanishes(height, width):
                raise ValueError(
                    f"images[{i}]: nothing is left of {height} x {width} pixels, resized to at most "
                    f"{self.config.max_size} a side"
                )
        if self.training:
            if targets is None:
                raise ValueError("targets: expected one dict per image in training mode, got None")
            check_targets(targets, len(images), self.config.num_classes)
            keys = ("boxes", "labels", "crowd_boxes")
            batch, scaled = self.transform(images, [{k: t[k] for k in keys if k in t} for t in targets])
            ground_truth, crowd = pack_targets(scaled)
            return self.losses(batch.tensors, ground_truth, crowd)
        batch, _ = self.transform(images)
        image_sizes = torch.tensor(batch.image_sizes, device=batch.tensors.device)
        found = self.detections(batch.tensors, image_sizes)
        return self.transform.postprocess(unpack_detections(found), batch.image_sizes, original_sizes)

    @property
    def body(self) -> nn.Module:
        """The backbone without its pyramid; of a custom one, all of it."""
        body = getattr(self.backbone, "body", self.backbone)
        return body if isinstance(body, nn.Module) else self.backbone

    def heads(
        self,
        batch: Tensor,  # [N, 3, H, W] normalised
    ) -> HeadOutputs:
        """The network alone: logits and box deltas of each level."""
        maps = self.backbone(batch)
        levels = [maps] if isinstance(maps, Tensor) else list(maps.values())
        if len(levels) != len(self.config.fpn_levels):
            raise ValueError(
                f"backbone: expected a map for each of the configuration's fpn_levels {self.config.fpn_levels}, "
                f"got {len(levels)}"
            )
        return self.head(levels)

    def losses(
        self,
        batch: Tensor,  # [N, 3, H, W] normalised
        ground_truth: ops.GroundTruth,  # boxes [N, M, 4] in pixels of the batch, labels [N, M], count [N]
        crowd: ops.PaddedBoxes | None = None,  # boxes [N, C, 4], count [N]
    ) -> dict[str, Tensor]:
        """Both losses of a padded batch; see `retinanet.model.losses.retinanet_losses`."""
        outputs = self.heads(batch)
        anchors = self.anchor_grid(batch, outputs)
        return retinanet_losses(outputs, anchors, ground_truth, self.config, self.normaliser, crowd)

    def detections(
        self,
        batch: Tensor,  # [N, 3, H, W] normalised
        image_sizes: Tensor,  # [N, 2] (height, width) of each image inside the padded batch
        *,
        suppress: bool = True,
    ) -> ops.Detections:  # D = config.max_detections slots for each image
        """Padded detections of a batch, in pixels of the batch; see `retinanet_ops.detect`.

        Without `suppress` they are all candidates, before NMS: D is `config.topk` for each level.
        """
        outputs = self.heads(batch)
        anchors = self.anchor_grid(batch, outputs)
        config = self.config
        clip_after = suppress and config.clip_after_nms
        all_candidates = clip_after or not suppress
        found = ops.detect(
            outputs.cls_logits,
            outputs.box_deltas,
            anchors,
            image_sizes,
            score_threshold=config.score_threshold,
            topk_per_level=config.topk,
            # No IoU is above 1.
            iou_threshold=1.0 if all_candidates else config.nms_threshold,
            max_detections=config.topk * len(config.fpn_levels) if all_candidates else config.max_detections,
            coder_weights=config.box_weights,
            max_log_ratio=config.max_log_ratio,
            min_log_ratio=config.min_log_ratio,
        )
        return suppress_unclipped(found, outputs.box_deltas, anchors, image_sizes, config) if clip_after else found

    def anchor_grid(
        self,
        batch: Tensor,  # [N, 3, H, W]
        outputs: HeadOutputs,
    ) -> ops.AnchorGrid:
        """The anchors of a batch's outputs; see `retinanet.model.anchors`."""
        grid_sizes = tuple((level.shape[-2], level.shape[-1]) for level in outputs.cls_logits)
        return anchor_grid(self.config, self.base_anchors, (batch.shape[-2], batch.shape[-1]), grid_sizes)

    def train(self, mode: bool = True) -> RetinaNet:
        """Sets training mode, in which `backbone_norm="eval"` keeps the backbone's statistics as they are."""
        super().train(mode)
        if self.config.backbone_norm == "eval":
            for module in self.body.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self


def _check_backbone(config: RetinaNetConfig, backbone: nn.Module | None) -> None:
    if (backbone is None) == (config.backbone == CUSTOM):
        raise ValueError(
            f"backbone: expected a module if and only if the configuration's backbone is {CUSTOM!r}, "
            f"got {type(backbone).__name__} with {config.backbone!r}"
        )
    if backbone is not None and getattr(backbone, "out_channels", None) != config.fpn_channels:
        raise ValueError(
            f"backbone: expected out_channels to be the configuration's fpn_channels {config.fpn_channels}, "
            f"got {getattr(backbone, 'out_channels', 'no such attribute')}"
        )
