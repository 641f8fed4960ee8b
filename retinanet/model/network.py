"""RetinaNet: backbone, feature pyramid and heads; criterion and post-processing are called, not contained.

`RetinaNet.forward` keeps the contract of torchvision's detection models (lists in, dicts out). Below it lies
a path on batched tensors (`heads`, `losses`, `detections`) that has no shape that depends on values, and never waits
for the device.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

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
        crowd: ops.GroundTruth | None = None,  # boxes [N, C, 4], count [N]
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
            topk=config.topk,
            # No IoU is above 1.
            iou_threshold=1.0 if all_candidates else config.nms_threshold,
            max_detections=config.topk * len(config.fpn_levels) if all_candidates else config.max_detections,
            weights=config.box_weights,
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


def image_sizes_of(images: Sequence[Tensor] | Tensor) -> list[tuple[int, int]]:
    """Height and width of each image `[3, H, W]`.

    Raises:
        TypeError: An image is no tensor.
        ValueError: There are no images, or one of another shape.
    """
    if not len(images):
        raise ValueError("images: expected at least one image, got none")
    for i, image in enumerate(images):
        if not isinstance(image, Tensor):
            raise TypeError(f"images[{i}]: expected a tensor, got {type(image).__name__}")
        if image.dim() != 3 or image.shape[0] != 3 or not image.numel():
            raise ValueError(f"images[{i}]: expected shape [3, H, W] with pixels in it, got {list(image.shape)}")
    return [(int(image.shape[1]), int(image.shape[2])) for image in images]


def check_targets(targets: Sequence[dict[str, Any]], num_images: int, num_classes: int) -> None:
    """Checks training targets, reading their values.

    Args:
        targets: One dict per image with `boxes`, `labels` and perhaps `crowd_boxes`.
        num_images: Number of images in the batch.
        num_classes: Labels must be below this.

    Raises:
        ValueError: The first thing that is wrong, with the image and the box.
    """
    if len(targets) != num_images:
        raise ValueError(f"targets: expected one dict for each of the {num_images} images, got {len(targets)}")
    for i, target in enumerate(targets):
        if not isinstance(target, Mapping):
            raise ValueError(f"targets[{i}]: expected a dict, got {type(target).__name__}")
        for key in ("boxes", "labels"):
            if not isinstance(target.get(key), Tensor):
                raise ValueError(f"targets[{i}]: expected a tensor {key!r}, got {type(target.get(key)).__name__}")
        labels = target["labels"]
        for key in ("boxes", "crowd_boxes"):
            if key in target:
                _check_boxes(target[key], f"targets[{i}]['{key}']")
        is_integer = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
        if not is_integer or list(labels.shape) != [len(target["boxes"])]:
            raise ValueError(
                f"targets[{i}]['labels']: expected integers of shape [{len(target['boxes'])}], "
                f"got {labels.dtype} of shape {list(labels.shape)}"
            )
        bad = (labels < 0) | (labels >= num_classes)
        if bad.any():
            row = int(bad.nonzero()[0])
            raise ValueError(
                f"targets[{i}]['labels']: expected class ids in 0..{num_classes - 1}, "
                f"got {int(labels[row])} at row {row}"
            )


def _check_boxes(boxes: Tensor, name: str) -> None:
    if boxes.dim() != 2 or boxes.shape[1] != 4 or not boxes.is_floating_point():
        raise ValueError(f"{name}: expected floating boxes of shape [M, 4], got {boxes.dtype} {list(boxes.shape)}")
    # Written so that NaN fails as well.
    bad = ~((boxes[:, 2:] > boxes[:, :2]) & boxes[:, :2].isfinite() & boxes[:, 2:].isfinite()).all(1)
    if bad.any():
        row = int(bad.nonzero()[0])
        raise ValueError(f"{name}: expected x1 < x2 and y1 < y2, finite, got {boxes[row].tolist()} at row {row}")


def pack_targets(targets: Sequence[dict[str, Tensor]]) -> tuple[ops.GroundTruth, ops.GroundTruth | None]:
    """Pads the targets of a batch.

    Args:
        targets: One dict per image with `boxes` `[M_i, 4]`, `labels` `[M_i]` and perhaps `crowd_boxes` `[C_i,
            4]`.

    Returns:
        Ground truth, and the crowd regions, or None if no image has any.
    """
    ground_truth = ops.pack_ground_truth([t["boxes"] for t in targets], [t["labels"] for t in targets])
    if not any(len(t["crowd_boxes"]) for t in targets if "crowd_boxes" in t):
        return ground_truth, None
    return ground_truth, ops.pack_ground_truth([t.get("crowd_boxes", t["boxes"][:0]) for t in targets])


def unpack_detections(found: ops.Detections) -> list[dict[str, Tensor]]:
    """One dict per image with `boxes` `[D, 4]`, `scores` `[D]` and `labels` `[D]`, from padded detections.

    The lengths depend on values: this is where the host waits for the device.
    """
    return [
        {"boxes": found.boxes[i, :n], "scores": found.scores[i, :n], "labels": found.labels[i, :n]}
        for i, n in enumerate(found.count.tolist())
    ]


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
