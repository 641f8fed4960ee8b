"""From images of any size to one normalised, padded batch, and boxes back to the images' own pixels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torchvision.models.detection.transform import GeneralizedRCNNTransform, resize_boxes

from retinanet.model.config import RetinaNetConfig
from retinanet.model.float32_buffers import Float32Buffers


class Preprocessing(GeneralizedRCNNTransform, Float32Buffers):
    """torchvision's detection transform; crowd boxes follow the image too, and resizing can be off.

    Args:
        config: Gives sizes, mean and standard deviation, and the multiple that batches are padded to.
    """

    # Mean and standard deviation, and what float32 rounds off them: not every device has float64.
    colours: Tensor  # [2, 2, 3] float32
    max_size: int
    postprocess: Callable[..., list[dict[str, Tensor]]]

    def __init__(self, config: RetinaNetConfig) -> None:
        """Takes the sizes and colours from the configuration."""
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
        """Whether resizing leaves less than one pixel of an image's shorter side."""
        return self.resizes and min(height, width) * self.max_size < max(height, width)

    def normalize(
        self,
        image: Tensor,  # [3, H, W] floating point
    ) -> Tensor:  # [3, H, W]
        """An image less the mean colour, by the standard deviation; torchvision's own waits for the device."""
        if not image.is_floating_point():
            raise TypeError(f"images: expected floating point in 0..1, got {image.dtype}")
        mean, std = self.colours.to(image.dtype).sum(0)[..., None, None]
        return (image - mean) / std

    def resize(
        self,
        image: Tensor,  # [3, H, W]
        target: dict[str, Tensor] | None = None,  # boxes [M, 4] and perhaps crowd_boxes [C, 4]
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        """One image and the boxes in it at the size that the network sees."""
        if not self.resizes:
            return image, target
        original = image.shape[-2:]
        image, target = super().resize(image, target)
        if target is not None and "crowd_boxes" in target:
            target["crowd_boxes"] = resize_boxes(target["crowd_boxes"], original, image.shape[-2:])
        return image, target


def to_float(image: Tensor) -> Tensor:  # [3, H, W] -> [3, H, W] float32
    """An image as the model takes it: uint8 is scaled to 0..1, floating point is left alone."""
    return image if image.is_floating_point() else image.float() / 255
