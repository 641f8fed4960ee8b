"""`DetectionDataset`: images with boxes that have been checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from retinanet.data.coco import coco_content
from retinanet.data.images import read_image
from retinanet.data.problems import Kind
from retinanet.data.records import Box, BoxRecord, ImageRecord

Target = dict[str, Any]


class DetectionDataset(Dataset[tuple[Tensor, Target]]):
    """Images and boxes of one annotation file or folder, which `open_dataset` opens and checks.

    Attributes:
        source: The annotation file or folder.
        class_names: Names of the classes; the position is the label.
        category_ids: Ids of the categories in the source; the position is the label.
        image_ids: Id of each image, by index.
        paths: File of each image, by index.
        sizes: `(height, width)` of each image after its EXIF orientation, by index.
        boxes: Every box, in the order of the source.
        mended: Number of faults of each kind that reading the source mended.
        description: What the source says of itself, such as "composed images"; may be empty.
    """

    def __init__(
        self,
        source: Path,
        images: Sequence[ImageRecord],
        boxes: Sequence[BoxRecord],
        categories: dict[int, str],
        cache: dict[int, Tensor] | None = None,
        mended: Mapping[Kind, int] | None = None,
        max_pixels: int | None = None,
        description: str = "",
    ) -> None:
        """Combine parts that have been checked; use `open_dataset` instead."""
        self.source = source
        self.class_names: tuple[str, ...] = tuple(categories.values())
        self.category_ids: tuple[int, ...] = tuple(categories)
        self.image_ids: list[int] = [image.image_id for image in images]
        self.paths: list[Path] = [image.path for image in images]
        self.sizes: list[tuple[int, int]] = [(image.height, image.width) for image in images]
        self.boxes = list(boxes)
        self.mended = dict(mended or {})
        self.description = description
        objects: dict[int, list[BoxRecord]] = {image_id: [] for image_id in self.image_ids}
        crowds: dict[int, list[BoxRecord]] = {image_id: [] for image_id in self.image_ids}
        for record in boxes:
            (crowds if record.crowd else objects)[record.image_id].append(record)
        self._boxes = [_box_tensor([r.box for r in objects[i]]) for i in self.image_ids]
        self._labels = [torch.tensor([r.label for r in objects[i]], dtype=torch.int64) for i in self.image_ids]
        self._crowd_boxes = [_box_tensor([r.box for r in crowds[i]]) for i in self.image_ids]
        self._cache = cache
        self._max_pixels = max_pixels

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        """Return `load(index)`."""
        return self.load(index)

    def load(self, index: int) -> tuple[Tensor, Target]:
        """Return one image and its boxes; the image may be shared with later calls and must not be changed in place.

        Args:
            index: 0 to `len(self) - 1`.

        Returns:
            The image, uint8 RGB `[3, H, W]`, and its target: `boxes` float32 `[M, 4]` xyxy pixels, `labels`
            int64 `[M]`, `crowd_boxes` float32 `[C, 4]`, `image_id` int.

        Raises:
            DataError: The file has vanished or been damaged since it was checked.
        """
        target = {
            "boxes": self.boxes_of(index),
            "labels": self._labels[index].clone(),
            "crowd_boxes": self._crowd_boxes[index].clone(),
            "image_id": self.image_ids[index],
        }
        if self._cache is None:
            return read_image(self.paths[index], self._max_pixels), target
        return self._cache[index], target

    def boxes_of(self, index: int) -> Tensor:  # [M, 4] float32
        """Return the boxes of one image without its crowds, xyxy in pixels, without reading the image."""
        return self._boxes[index].clone()

    @cached_property
    def coco(self) -> dict[str, Any]:
        """COCO content for pycocotools: the source's ids, boxes as xywh, annotations numbered from 1."""
        images = (
            (image_id, path.name, height, width)
            for image_id, path, (height, width) in zip(self.image_ids, self.paths, self.sizes, strict=True)
        )
        return coco_content(images, self.boxes, dict(zip(self.category_ids, self.class_names, strict=True)))

    def contents(self) -> str:
        """Return the numbers of images, boxes and classes, and the description of the source, in words."""
        empty = len(self) - len({record.image_id for record in self.boxes})
        text = f"{len(self)} images, {len(self.boxes)} boxes, {len(self.class_names)} classes"
        text += f", {empty} images without boxes" if empty else ""
        return text + (f" ({self.description})" if self.description else "")

    def summary(self) -> str:
        """Return `contents()` and the numbers of the faults that were mended, in words."""
        mended = ", ".join(kind.count_mended(number) for kind, number in self.mended.items())
        return self.contents() + (f"; mended: {mended}" if mended else "")


def _box_tensor(boxes: list[Box]) -> Tensor:  # [len(boxes), 4]
    return torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
