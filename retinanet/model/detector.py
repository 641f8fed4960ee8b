"""What every detector shares: the contract of torchvision's detection models, batches, and score thresholds.

`Detector.forward` takes lists and returns dicts. `prepare` turns lists into a batch. `losses` and `detections` work on
that batch. In one-stage detectors, none of their shapes depends on values, and they never synchronise with the device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torchvision.models.detection.transform import resize_boxes

import retinanet_ops as ops
from retinanet.model.config import RetinaNetConfig
from retinanet.model.detector_config import DetectorConfig
from retinanet.model.float32_buffers import Float32Buffers
from retinanet.model.heads import HeadOutputs
from retinanet.model.losses import ImageLosses, Normaliser, mean_losses
from retinanet.model.preprocessing import Preprocessing, to_float
from retinanet.model.ssd_config import SSDConfig
from retinanet.model.targets import (
    Batch,
    ImageDetections,
    check_images,
    check_targets,
    pad_targets,
    split_detections,
)
from retinanet.model.thresholds import ScoreThresholds

_TARGET_KEYS = ("boxes", "labels", "crowd_boxes")

Padded = TypeVar("Padded", ops.GroundTruth, ops.PaddedBoxes)


class Detector(Float32Buffers):
    """Base of the detectors. A subclass builds a network and has the methods that raise NotImplementedError here.

    In training mode a call returns the losses `loss_names`. In evaluation mode it returns one dict per image with
    `boxes` `[D, 4]`, `scores` `[D]` and `labels` `[D]`, best first.

    Args:
        config: The configuration, which is kept as `model.config`.
        normaliser: The divisor of an image's loss sums.

    Attributes:
        config: The configuration.
        score_thresholds: The score thresholds with the best F1 on a validation set, or None if none were chosen. They
            do not change what a call returns; `config.score_threshold` does.
    """

    #: Names of the losses, in the order in which a run writes them.
    loss_names: ClassVar[tuple[str, ...]] = ("classification", "bbox_regression")

    config: DetectorConfig
    class_weights: Tensor | None  # [K] float32

    def __init__(self, config: DetectorConfig, normaliser: Normaliser) -> None:
        """Make everything but the network."""
        super().__init__()
        self.config = config
        self.score_thresholds: ScoreThresholds | None = None
        self.transform = Preprocessing(config)
        self.normaliser = normaliser
        weights = torch.tensor(config.class_weights, dtype=torch.float32) if config.class_weights else None
        self.register_buffer("class_weights", weights, persistent=False)

    def forward(
        self,
        images: Sequence[Tensor] | Tensor,  # N tensors [3, H_i, W_i] in 0..1, RGB, or one [N, 3, H, W]
        targets: Sequence[dict[str, Tensor]] | None = None,
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Return losses in training mode and detections in evaluation mode.

        Args:
            images: Images of any sizes, floating point in 0..1.
            targets: Needed in training mode and ignored otherwise. For each image a dict with `boxes` `[M, 4]` (x1, y1,
                x2, y2 in pixels of that image, x1 < x2, y1 < y2) and `labels` `[M]` (integers, 0..K-1), where `M` may
                be 0, and optionally `crowd_boxes` `[C, 4]`: regions whose background takes no part in the loss. Other
                keys are ignored.

        Returns:
            In training mode a dict of scalar losses. In evaluation mode a list of dicts, with boxes in pixels of
            the original images.

        Raises:
            ValueError: Images or targets are missing or malformed. The message names the image.
            TypeError: An image is not a tensor, or not floating point.
        """
        check_images(images)
        for i, image in enumerate(images):
            if not image.is_floating_point():
                raise TypeError(f"images[{i}]: expected floating point in 0..1, got {image.dtype}")
        if self.training:
            if targets is None:
                raise ValueError("targets: expected one dict per image in training mode, got None")
            check_targets(targets, len(images), self.config.num_classes)
            batch = self.prepare(images, targets)
            assert batch.ground_truth is not None
            return self.losses(batch.pixels, batch.ground_truth, batch.crowds, batch.image_sizes)
        batch = self.prepare(images)
        detections = self.detections(batch.pixels, batch.size_tensor())
        return [image._asdict() for image in self.split(detections, batch)]

    def prepare(
        self,
        images: Sequence[Tensor] | Tensor,  # N tensors [3, H_i, W_i], RGB, uint8 or floating point in 0..1
        targets: Sequence[Mapping[str, Tensor]] | None = None,
        device: torch.device | None = None,
        *,
        min_size: int | None = None,
        least_size: tuple[int, int] = (1, 1),
    ) -> Batch:
        """Resize, normalise and pad images, and scale and pad their targets, without reading a value of any tensor.

        Args:
            images: Images of any sizes. uint8 images are scaled to 0..1 after the transfer.
            targets: Targets as `forward` takes them, or None. Their values are not checked; see `check_targets`. They
                are scaled and padded where they are, so that targets on the host need one transfer per padded tensor.
            device: Device for the batch; None leaves images and targets on their devices.
            min_size: Length to which the shorter side of every image is resized, one of the configuration's. In
                training mode, None draws one for each image from the global random generator. In evaluation mode it
                takes the last.
            least_size: Height and width in pixels to which the batch is padded at least.

        Returns:
            The batch. Its ground truth is None without targets.

        Raises:
            ValueError: An image is malformed, or too elongated to be resized. The message names the image.
            TypeError: An image is not a tensor, or neither uint8 nor floating point.
        """
        original_sizes = check_images(images)
        for i, (height, width) in enumerate(original_sizes):
            if self.transform.vanishes(height, width):
                raise ValueError(
                    f"images[{i}]: too elongated: resizing {height} x {width} pixels to max_size "
                    f"{self.config.max_size} leaves less than one pixel"
                )
        if device is not None:
            images = [image.to(device, non_blocking=True) for image in images]
        boxes = None if targets is None else [{k: t[k] for k in _TARGET_KEYS if k in t} for t in targets]
        padded, scaled = self.transform([to_float(image) for image in images], boxes, min_size, least_size)
        ground_truth, crowds = (None, None) if scaled is None else pad_targets(scaled)
        if device is not None:
            ground_truth, crowds = _to_device(ground_truth, device), _to_device(crowds, device)
        return Batch(padded.tensors, padded.image_sizes, ground_truth, crowds, original_sizes)

    def split(self, detections: ops.Detections | ops.Candidates, batch: Batch) -> list[ImageDetections]:
        """Split padded detections or candidates by image, with boxes in pixels of the original images.

        The lengths depend on values, so this method synchronises with the device.
        """
        images = zip(split_detections(detections), batch.image_sizes, batch.original_sizes, strict=True)
        return [image._replace(boxes=resize_boxes(image.boxes, size, original)) for image, size, original in images]

    @property
    def score_threshold(self) -> float | None:
        """The threshold of `score_thresholds` for all classes together, or None if none was chosen."""
        return None if self.score_thresholds is None else self.score_thresholds.overall

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return self.transform.colours.device

    @property
    def body(self) -> nn.Module:
        """The part of the network that `backbone_lr_factor` slows down."""
        raise NotImplementedError

    def losses(
        self,
        pixels: Tensor,  # [N, 3, H, W] normalised
        ground_truth: ops.GroundTruth,  # boxes [N, M, 4] in pixels of the batch, labels [N, M], count [N]
        crowds: ops.PaddedBoxes | None = None,  # boxes [N, C, 4], count [N]
        image_sizes: Sequence[tuple[int, int]] | None = None,  # height, width of each image inside the padded batch
    ) -> dict[str, Tensor]:
        """Return the losses of a padded batch; see `retinanet.model.losses.mean_losses`."""
        return mean_losses(self.image_losses(pixels, ground_truth, crowds, image_sizes), self.normaliser)

    def image_losses(
        self,
        pixels: Tensor,  # [N, 3, H, W] normalised
        ground_truth: ops.GroundTruth,  # boxes [N, M, 4] in pixels of the batch, labels [N, M], count [N]
        crowds: ops.PaddedBoxes | None = None,  # boxes [N, C, 4], count [N]
        image_sizes: Sequence[tuple[int, int]] | None = None,  # height, width of each image inside the padded batch
    ) -> ImageLosses:
        """Return the sums of the losses of each image of a padded batch.

        A detector that clips boxes in training needs `image_sizes`; None is the size of the batch for all images.
        """
        raise NotImplementedError

    def detections(
        self,
        pixels: Tensor,  # [N, 3, H, W] normalised
        image_sizes: Tensor,  # [N, 2] (height, width) of each image inside the padded batch
    ) -> ops.Detections:  # config.max_detections slots for each image
        """Return the padded detections of a batch, in pixels of the batch; see `retinanet_ops.detect`."""
        raise NotImplementedError

    def candidates(
        self,
        pixels: Tensor,  # [N, 3, H, W] normalised
        image_sizes: Tensor,  # [N, 2] (height, width) of each image inside the padded batch
    ) -> ops.Candidates:
        """Return the padded candidates of a batch before NMS, clipped, in pixels of the batch."""
        raise NotImplementedError


class DenseAnchorDetector(Detector):
    """Base of the detectors whose heads return the logits and box deltas of anchors, which `ops.detect` takes."""

    config: RetinaNetConfig | SSDConfig

    def heads(self, pixels: Tensor) -> HeadOutputs:  # [N, 3, H, W] normalised
        """Run the network alone and return the logits and box deltas of each level."""
        raise NotImplementedError

    def detections(
        self,
        pixels: Tensor,  # [N, 3, H, W] normalised
        image_sizes: Tensor,  # [N, 2] (height, width) of each image inside the padded batch
    ) -> ops.Detections:  # config.max_detections slots for each image
        """Return the padded detections of a batch, in pixels of the batch; see `retinanet_ops.detect`."""
        return self.detections_of(self.heads(pixels), pixels, image_sizes)

    def detections_of(
        self,
        outputs: HeadOutputs,
        pixels: Tensor,  # [N, 3, H, W], of which only the size is used
        image_sizes: Tensor,  # [N, 2] (height, width) of each image inside the padded batch
    ) -> ops.Detections:  # config.max_detections slots for each image
        """Return the padded detections of a batch from the outputs of `heads`."""
        return ops.detect(
            *self._head_arguments(outputs, pixels),
            image_sizes,
            iou_threshold=self.config.nms_threshold,
            max_detections=self.config.max_detections,
            clip=self._clip,
            **self._candidate_options(),
        )

    def candidates(
        self,
        pixels: Tensor,  # [N, 3, H, W] normalised
        image_sizes: Tensor,  # [N, 2] (height, width) of each image inside the padded batch
    ) -> ops.Candidates:
        """Return the padded candidates of a batch before NMS, clipped, in pixels of the batch."""
        arguments = self._head_arguments(self.heads(pixels), pixels)
        return ops.candidates(*arguments, image_sizes, **self._candidate_options())

    def _head_arguments(
        self,
        outputs: HeadOutputs,
        pixels: Tensor,  # [N, 3, H, W]
    ) -> tuple[list[Tensor], list[Tensor], Tensor | ops.AnchorGrid]:
        """Return logits whose sigmoids are scores, box deltas, and the anchors of both."""
        raise NotImplementedError

    def _candidate_options(self) -> dict[str, Any]:
        config = self.config
        return {
            "score_threshold": config.score_threshold,
            "topk_per_level": config.topk,
            "coder_weights": config.box_weights,
            "max_log_ratio": config.max_log_ratio,
        }

    @property
    def _clip(self) -> str:
        """When boxes are clipped to the image; see `retinanet_ops.detect`."""
        return "before_nms"


def _to_device(padded: Padded | None, device: torch.device) -> Padded | None:
    return None if padded is None else type(padded)(*(tensor.to(device, non_blocking=True) for tensor in padded))
