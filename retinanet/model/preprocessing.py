"""Preprocessing: images of any size become one normalised, padded batch."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.models.detection.transform import GeneralizedRCNNTransform, resize_boxes

from retinanet.model.config import RetinaNetConfig
from retinanet.model.float32_buffers import Float32Buffers


class Preprocessing(GeneralizedRCNNTransform, Float32Buffers):
    """torchvision's detection transform, extended by crowd boxes and by an option not to resize.

    Args:
        config: Sizes, mean and standard deviation, and the multiple to which batches are padded.
    """

    # Mean and standard deviation, each as a float32 value and the float32 remainder of its rounding. Together they have
    # the precision of float64, which not every device supports.
    colours: Tensor  # [2, 2, 3] float32
    max_size: int

    def __init__(self, config: RetinaNetConfig) -> None:
        """Take the sizes and colours from the configuration."""
        super().__init__(
            min_size=list(config.min_size or (1,)),
            max_size=config.max_size,
            image_mean=list(config.image_mean),
            image_std=list(config.image_std),
            size_divisible=config.size_divisible,
        )
        self.resizes = config.min_size is not None
        exact = torch.tensor([config.image_mean, config.image_std], dtype=torch.float64)
        rounded = exact.float()
        colours = torch.stack((rounded, (exact - rounded).float()))
        self.register_buffer("colours", colours, persistent=False)

    def vanishes(self, height: int, width: int) -> bool:
        """Return whether resizing leaves less than one pixel of the shorter side of an image."""
        return self.resizes and min(height, width) * self.max_size < max(height, width)

    def normalize(self, image: Tensor) -> Tensor:  # [3, H, W] floating point -> [3, H, W]
        """Subtract the mean and divide by the standard deviation.

        Overrides torchvision's version, which synchronises with the device.
        """
        if not image.is_floating_point():
            raise TypeError(f"images: expected floating point in 0..1, got {image.dtype}")
        mean, std = self.colours.to(image.dtype).sum(0)[..., None, None]
        return (image - mean) / std

    def resize(
        self,
        image: Tensor,  # [3, H, W]
        target: dict[str, Tensor] | None = None,  # boxes [M, 4] and optionally crowd_boxes [C, 4]
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        """Resize an image and the boxes in it to the size that the network takes."""
        if not self.resizes:
            return image, target
        original = image.shape[-2:]
        image, target = super().resize(image, target)
        if target is not None and "crowd_boxes" in target:
            target["crowd_boxes"] = resize_boxes(target["crowd_boxes"], original, image.shape[-2:])
        return image, target


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
