"""Augmentation of an image and its boxes; one explicit generator supplies all randomness."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor
from torchvision.transforms.v2 import functional as F

from retinanet.common.errors import ConfigError
from retinanet.common.validation import as_tuples, check_fields, checked, flag, integer, number, numbers, optional

# Random numbers per sample, all drawn at once, so that an option does not shift the numbers of the others.
_DRAWS = 12


@dataclass(frozen=True)
class TrainTransform:
    """Random flips, quarter turns, scale, crop and colour for training.

    The region to crop is chosen before scaling, so the cost of a small crop does not depend on the size of the
    photograph. The same image, target and generator state give the same result, bit for bit.

    Attributes:
        horizontal_flip: Probability of a mirror image.
        vertical_flip: Probability of an upside-down image; for pictures taken from above.
        quarter_turns: Whether to turn by 0, 90, 180 or 270 degrees, all equally likely; for pictures taken
            from above.
        scale: Smallest and largest scaling factor. The factor's logarithm is uniformly distributed.
        crop: Side in pixels of a square crop; None keeps the whole image. An image that is smaller after scaling keeps
            its smaller size.
        crop_on_object: Probability that a crop is placed around one of the image's objects, all equally likely, with
            the object's centre anywhere in the crop; otherwise the crop lies anywhere in the image. This is useful
            if large parts of the images are empty. A value above 0 needs `crop`. The object itself must still pass
            `min_visible`.
        min_visible: A box is kept, and clipped, if at least this share of its area is inside the crop.
        min_side: A box is kept if both its sides are at least this long after clipping and scaling, in pixels.
        brightness: The factor on the brightness is between `1 - brightness` and `1 + brightness`.
        contrast: The same for contrast.
        saturation: The same for saturation.
        hue: The shift of the hue is between `-hue` and `hue`, in turns of the colour circle; at most 0.5.

    Raises:
        ConfigError: A value is out of its range; the message names the attribute.
    """

    horizontal_flip: float = checked(0.5, number(0, 1))
    vertical_flip: float = checked(0.0, number(0, 1))
    quarter_turns: bool = checked(False, flag())
    scale: tuple[float, float] = (1.0, 1.0)
    crop: int | None = checked(None, optional(integer(1)))
    crop_on_object: float = checked(0.0, number(0, 1))
    min_visible: float = checked(0.4, number(0, 1))
    min_side: float = checked(1.0, number(low=0))
    brightness: float = checked(0.0, number(0, 1))
    contrast: float = checked(0.0, number(0, 1))
    saturation: float = checked(0.0, number(0, 1))
    hue: float = checked(0.0, number(0, 0.5))

    def __post_init__(self) -> None:
        """Turn lists into tuples and check every field."""
        as_tuples(self)
        check_fields(self)
        scale = self.scale
        if not numbers(2, positive=True).accepts(scale) or scale[0] > scale[1]:
            raise ConfigError(f"scale: expected 0 < smallest <= largest, got {self.scale}")
        if self.crop_on_object and self.crop is None:
            raise ConfigError(f"crop_on_object: expected 0 without a crop, got {self.crop_on_object}; set crop, too")

    def __call__(
        self,
        image: Tensor,  # [3, H, W] uint8
        target: dict[str, Any],
        rng: Generator,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Augment one sample; the arguments are not changed.

        Args:
            image: The image, RGB.
            target: `boxes` `[M, 4]`, `labels` `[M]` and optionally `crowd_boxes` `[C, 4]`; other keys are kept.
            rng: A CPU generator.

        Returns:
            The new image `[3, H', W']` uint8, and the new target.
        """
        draw = torch.rand(_DRAWS, generator=rng, dtype=torch.float64).tolist()
        boxes, labels = target["boxes"], target["labels"]
        crowd = target.get("crowd_boxes")
        count = len(boxes)
        joined = boxes if crowd is None else torch.cat([boxes, crowd])

        centre = None
        if count and draw[10] < self.crop_on_object:
            x1, y1, x2, y2 = boxes[int(draw[11] * count)].tolist()
            centre = ((x1 + x2) / 2, (y1 + y2) / 2)
        image, joined, share = self._crop_and_scale(image, joined, centre, draw[0], draw[1], draw[2])
        if draw[3] < self.horizontal_flip:
            image, joined = F.horizontal_flip(image), _flip_x(joined, image.shape[-1])
        if draw[4] < self.vertical_flip:
            image, joined = F.vertical_flip(image), _flip_y(joined, image.shape[-2])
        if self.quarter_turns:
            for _ in range(int(draw[5] * 4)):
                image, joined = torch.rot90(image, 1, (-2, -1)), _turn(joined, image.shape[-1])
        image = self._colour(image, draw[6:10])

        sides = joined[:, 2:] - joined[:, :2]
        visible = (sides.amin(dim=1) >= self.min_side) & (share >= self.min_visible)
        result = dict(target)
        result["boxes"] = joined[:count][visible[:count]]
        result["labels"] = labels[visible[:count]]
        if crowd is not None:
            # Background under a crowd must not be learned, so every part of a crowd is kept, however small.
            result["crowd_boxes"] = joined[count:][sides[count:].amin(dim=1) > 0]
        return image.contiguous(), result

    def _crop_and_scale(
        self,
        image: Tensor,
        boxes: Tensor,  # [B, 4]
        centre: tuple[float, float] | None,  # x, y of a point that must be inside the crop
        at_scale: float,
        at_x: float,
        at_y: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Crop and scale; also return the share of each box's area that is inside the crop, `[B]`."""
        height, width = image.shape[-2:]
        low, high = self.scale
        factor = low * (high / low) ** at_scale
        region_h, region_w = height, width
        if self.crop is not None:
            region = max(1, round(self.crop / factor))
            region_h, region_w = min(height, region), min(width, region)
        if centre is None:
            x, y = int(at_x * (width - region_w + 1)), int(at_y * (height - region_h + 1))
        else:
            x = min(max(int(centre[0]) - int(at_x * region_w), 0), width - region_w)
            y = min(max(int(centre[1]) - int(at_y * region_h), 0), height - region_h)
        image = image[:, y : y + region_h, x : x + region_w]

        area = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)
        corner = boxes.new_tensor([x, y, x, y])
        limit = boxes.new_tensor([region_w, region_h, region_w, region_h])
        boxes = torch.minimum((boxes - corner).clamp(min=0), limit)
        share = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1) / area

        new_h, new_w = max(1, round(region_h * factor)), max(1, round(region_w * factor))
        if self.crop is not None:
            new_h, new_w = min(new_h, self.crop), min(new_w, self.crop)
        if (new_h, new_w) != (region_h, region_w):
            image = F.resize(image, [new_h, new_w], antialias=True)
            ratio = [new_w / region_w, new_h / region_h]
            boxes = boxes * boxes.new_tensor(ratio + ratio)
        return image, boxes, share

    def _colour(self, image: Tensor, draw: list[float]) -> Tensor:
        if self.brightness:
            image = F.adjust_brightness(image, 1 + self.brightness * (2 * draw[0] - 1))
        if self.contrast:
            image = F.adjust_contrast(image, 1 + self.contrast * (2 * draw[1] - 1))
        if self.saturation:
            image = F.adjust_saturation(image, 1 + self.saturation * (2 * draw[2] - 1))
        if self.hue:
            image = F.adjust_hue(image, self.hue * (2 * draw[3] - 1))
        return image


def _flip_x(boxes: Tensor, width: int) -> Tensor:
    x1, y1, x2, y2 = boxes.unbind(dim=1)
    return torch.stack([width - x2, y1, width - x1, y2], dim=1)


def _flip_y(boxes: Tensor, height: int) -> Tensor:
    x1, y1, x2, y2 = boxes.unbind(dim=1)
    return torch.stack([x1, height - y2, x2, height - y1], dim=1)


def _turn(boxes: Tensor, width: int) -> Tensor:
    """Turn boxes by 90 degrees counter-clockwise with an image that was `width` wide."""
    x1, y1, x2, y2 = boxes.unbind(dim=1)
    return torch.stack([y1, width - x2, y2, width - x1], dim=1)
