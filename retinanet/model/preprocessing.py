"""Preprocessing: images of any size become one normalised, padded batch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.transform import GeneralizedRCNNTransform, resize_boxes

from retinanet.model.detector_config import DetectorConfig
from retinanet.model.float32_buffers import Float32Buffers


class Preprocessing(GeneralizedRCNNTransform, Float32Buffers):
    """torchvision's detection transform, extended by crowd boxes and by an option not to resize.

    Images keep their aspect ratio, unless the configuration has a `fixed_size`.

    Args:
        config: Sizes, mean and standard deviation, and the multiple to which batches are padded.
    """

    # Mean and standard deviation, each as a float32 value and the float32 remainder of its rounding. Together they have
    # the precision of float64, which not every device supports.
    colours: Tensor  # [2, 2, 3] float32
    min_size: list[int]
    max_size: int

    def __init__(self, config: DetectorConfig) -> None:
        """Take the sizes and colours from the configuration."""
        super().__init__(
            min_size=list(config.min_size or (1,)),
            max_size=config.max_size,
            image_mean=list(config.image_mean),
            image_std=list(config.image_std),
            size_divisible=config.size_divisible,
        )
        self.size = config.fixed_size
        self.resizes = config.min_size is not None or self.size is not None
        exact = torch.tensor([config.image_mean, config.image_std], dtype=torch.float64)
        rounded = exact.float()
        colours = torch.stack((rounded, (exact - rounded).float()))
        self.register_buffer("colours", colours, persistent=False)

    def vanishes(self, height: int, width: int) -> bool:
        """Return whether resizing leaves less than one pixel of the shorter side of an image."""
        return self.resizes and self.size is None and min(height, width) * self.max_size < max(height, width)

    def normalize(self, image: Tensor) -> Tensor:  # [3, H, W] floating point -> [3, H, W]
        """Subtract the mean and divide by the standard deviation.

        Overrides torchvision's version, which synchronises with the device.
        """
        if not image.is_floating_point():
            raise TypeError(f"images: expected floating point in 0..1, got {image.dtype}")
        mean, std = self.colours.to(image.dtype).sum(0)[..., None, None]
        return (image - mean) / std

    def forward(
        self,
        images: Sequence[Tensor],  # N tensors [3, H_i, W_i] floating point
        targets: Sequence[dict[str, Tensor]] | None = None,  # boxes [M, 4] and optionally crowd_boxes [C, 4]
        min_size: int | None = None,
        least_size: tuple[int, int] = (1, 1),
    ) -> tuple[ImageList, list[dict[str, Tensor]] | None]:
        """Normalise, resize and pad images, and scale the boxes in them; see `Detector.prepare`."""
        resized, scaled = [], []
        for i, image in enumerate(images):
            target = None if targets is None else dict(targets[i])
            image, target = self.resize(self.normalize(image), target, min_size)
            resized.append(image)
            scaled.append(target or {})
        sizes = [(int(image.shape[1]), int(image.shape[2])) for image in resized]
        height, width = self.padded_size([*sizes, least_size])
        batch = resized[0].new_zeros((len(resized), 3, height, width))
        for slot, image in zip(batch, resized, strict=True):
            slot[:, : image.shape[1], : image.shape[2]].copy_(image)
        return ImageList(batch, sizes), None if targets is None else scaled

    def resize(
        self,
        image: Tensor,  # [3, H, W]
        target: dict[str, Tensor] | None = None,  # boxes [M, 4] and optionally crowd_boxes [C, 4]
        min_size: int | None = None,
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        """Resize an image and the boxes in it to the size that the network takes."""
        if not self.resizes:
            return image, target
        original = (int(image.shape[-2]), int(image.shape[-1]))
        if min_size is None and self.size is None:
            min_size = int(super().torch_choice(self.min_size)) if self.training else self.min_size[-1]
        size = self.resized_size(*original, min_size)
        image = F.interpolate(image[None], size, mode="bilinear", align_corners=False)[0]
        if target is not None:
            for key in target.keys() & {"boxes", "crowd_boxes"}:
                target[key] = resize_boxes(target[key], original, size)
        return image, target

    def resized_size(self, height: int, width: int, min_size: int | None = None) -> tuple[int, int]:
        """Return the height and width of an image after resizing its shorter side to `min_size`, or to the last one."""
        if not self.resizes:
            return height, width
        if self.size is not None:
            return self.size
        shorter = self.min_size[-1] if min_size is None else min_size
        scale = min(shorter / min(height, width), self.max_size / max(height, width))
        return math.floor(height * scale), math.floor(width * scale)

    def padded_size(self, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
        """Return the height and width of a batch of images of these sizes."""
        height, width = (
            -(-max(side) // self.size_divisible) * self.size_divisible for side in zip(*sizes, strict=True)
        )
        return height, width


def to_float(image: Tensor) -> Tensor:  # [3, H, W] uint8 or floating point -> [3, H, W] floating point
    """Scale a uint8 image to 0..1; return a floating-point image as it is.

    Raises:
        TypeError: The image has another dtype.
    """
    if image.is_floating_point():
        return image
    if image.dtype != torch.uint8:
        raise TypeError(f"images: expected uint8, or floating point in 0..1, got {image.dtype}")
    return image.float() / 255
