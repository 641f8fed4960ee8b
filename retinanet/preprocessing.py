"""From images of any size to one normalised, padded batch, and boxes back to the images' own pixels."""

from __future__ import annotations

from torch import Tensor
from torchvision.models.detection.transform import GeneralizedRCNNTransform, resize_boxes

from retinanet.config import RetinaNetConfig


class Preprocessing(GeneralizedRCNNTransform):
    """torchvision's detection transform; crowd boxes follow the image too, and resizing can be off.

    Args:
        config: Gives sizes, mean and standard deviation, and the multiple that batches are padded to.
    """

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
