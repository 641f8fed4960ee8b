"""`DetectionDataset`: images with boxes, from COCO json or Pascal VOC xml, which are checked before use."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from retinanet.common.errors import DataError, listed
from retinanet.data.coco import coco_content, read_coco
from retinanet.data.images import check_image, image_size, read_image
from retinanet.data.problems import Problems
from retinanet.data.records import (
    Box,
    BoxRecord,
    ImageRecord,
    Source,
    check_sizes,
    collect_boxes,
    collect_categories,
    collect_images,
)
from retinanet.data.voc import read_voc

#: Decoded images are kept in memory if all images of a data set together take at most this many bytes.
CACHE_BYTES = 512 * 2**20

Target = dict[str, Any]


class DetectionDataset(Dataset[tuple[Tensor, Target]]):
    """Images and boxes of one annotation file or folder, which `open_dataset` opens and checks.

    Attributes:
        source: The annotation file (COCO) or folder (VOC).
        class_names: Names of the classes; the position is the label.
        category_ids: Ids of the categories in the source; the position is the label.
        image_ids: Id of each image, by index.
        paths: File of each image, by index.
        sizes: `(height, width)` of each image after its EXIF orientation, by index.
        boxes: Every box, in the order of the source.
    """

    def __init__(
        self,
        source: Path,
        images: Sequence[ImageRecord],
        boxes: Sequence[BoxRecord],
        categories: dict[int, str],
        cache: dict[int, Tensor] | None = None,
    ) -> None:
        """Combine parts that have been checked; use `open_dataset` instead."""
        self.source = source
        self.class_names: tuple[str, ...] = tuple(categories.values())
        self.category_ids: tuple[int, ...] = tuple(categories)
        self.image_ids: list[int] = [image.image_id for image in images]
        self.paths: list[Path] = [image.path for image in images]
        self.sizes: list[tuple[int, int]] = [(int(image.height or 0), int(image.width or 0)) for image in images]
        self.boxes = list(boxes)
        objects: dict[int, list[BoxRecord]] = {image_id: [] for image_id in self.image_ids}
        crowds: dict[int, list[BoxRecord]] = {image_id: [] for image_id in self.image_ids}
        for record in boxes:
            (crowds if record.crowd else objects)[record.image_id].append(record)
        self._boxes = [_box_tensor([r.box for r in objects[i]]) for i in self.image_ids]
        self._labels = [torch.tensor([r.label for r in objects[i]], dtype=torch.int64) for i in self.image_ids]
        self._crowd_boxes = [_box_tensor([r.box for r in crowds[i]]) for i in self.image_ids]
        self._cache = cache

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
            "boxes": self._boxes[index].clone(),
            "labels": self._labels[index].clone(),
            "crowd_boxes": self._crowd_boxes[index].clone(),
            "image_id": self.image_ids[index],
        }
        if self._cache is None:
            return read_image(self.paths[index]), target
        return self._cache[index], target

    @cached_property
    def coco(self) -> dict[str, Any]:
        """COCO content for pycocotools: the source's ids, boxes as xywh, annotations numbered from 1."""
        images = (
            (image_id, path.name, height, width)
            for image_id, path, (height, width) in zip(self.image_ids, self.paths, self.sizes, strict=True)
        )
        return coco_content(images, self.boxes, dict(zip(self.category_ids, self.class_names, strict=True)))

    def summary(self) -> str:
        """Return the numbers of images, boxes and classes, in words."""
        empty = len(self) - len({record.image_id for record in self.boxes})
        text = f"{len(self)} images, {len(self.boxes)} boxes, {len(self.class_names)} classes"
        return text + (f", {empty} images without boxes" if empty else "")


def _box_tensor(boxes: list[Box]) -> Tensor:  # [len(boxes), 4]
    return torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)


def open_dataset(
    path: str | Path,
    images_dir: str | Path | None = None,
    *,
    class_names: Sequence[str] | None = None,
    voc_one_based: bool = True,
    decode_check: bool = True,
    cache_bytes: int = CACHE_BYTES,
    progress: Callable[..., Iterable[Any]] | None = None,
) -> DetectionDataset:
    """Open a data set and check all of it, so that no error appears in the middle of a training run.

    Images without boxes are kept; they are background. Category ids need not be contiguous. Boxes that overhang their
    image by at most one pixel are clipped; boxes that overhang further are errors.

    Args:
        path: A COCO json file, or a folder of Pascal VOC xml files.
        images_dir: The folder to which file names are relative. None takes the folder of the json. For VOC, None takes
            `JPEGImages` beside the folder of the xml files if it exists, else the folder of the xml files.
        class_names: The classes in the order of their labels. VOC has no list of classes, so a validation set needs the
            list of its training set; None takes the classes that occur, sorted. For COCO, the list must equal that of
            the file.
        voc_one_based: False for xml files whose boxes are already 0-based corners, as some tools write them.
        decode_check: Whether to decode every image once, which finds files that are cut short. False reads headers
            only.
        cache_bytes: Decoded images are kept in memory if all of them together take at most this many bytes.
        progress: Wraps the iteration over the images, as `tqdm` does; called with `total=`.

    Returns:
        The data set.

    Raises:
        DataError: Anything is wrong. The message has one line "file: entry: reason" for each of the first five wrong
            entries, and then their count.
    """
    path = Path(path)
    source, folder = _read(path, None if images_dir is None else Path(images_dir), class_names, voc_one_based)
    problems = Problems(source.path)
    categories = collect_categories(source, problems)
    if class_names is not None and not problems.lines and list(categories.values()) != list(class_names):
        raise DataError(
            f"{path}: categories: expected the classes {listed(class_names)}; got {listed(list(categories.values()))}"
        )
    records = collect_images(source, folder, problems)
    check_sizes(records, image_size, problems)
    boxes = collect_boxes(source, records, categories, problems)
    problems.raise_if_any()
    images = list(records.values())
    cache = _decode(images, decode_check, cache_bytes, problems, progress)
    return DetectionDataset(path, images, boxes, categories, cache)


def _read(
    path: Path, images_dir: Path | None, class_names: Sequence[str] | None, voc_one_based: bool
) -> tuple[Source, Path]:
    """Return the entries of a data set, and the folder of its images."""
    if images_dir is not None and not images_dir.is_dir():
        raise DataError(f"{images_dir}: expected a folder of images, got no folder of this name")
    if not path.is_dir():
        return read_coco(path), images_dir or path.parent
    if images_dir is None:
        images_dir = path.parent / "JPEGImages"
        if not images_dir.is_dir():
            images_dir = path
    return read_voc(path, images_dir, class_names, one_based=voc_one_based), images_dir


def _decode(
    images: list[ImageRecord],
    decode_check: bool,
    cache_bytes: int,
    problems: Problems,
    progress: Callable[..., Iterable[Any]] | None,
) -> dict[int, Tensor] | None:
    """Decode all images if they fit into the cache or `decode_check` is set; return the cache if they fit."""
    size = sum(3 * int(image.height or 0) * int(image.width or 0) for image in images)
    keep = size <= cache_bytes
    if not (keep or decode_check):
        return None

    def decode(image: ImageRecord) -> Tensor | DataError | None:
        try:
            if keep:
                return read_image(image.path)
            check_image(image.path)
            return None
        except DataError as error:
            return error

    cache: dict[int, Tensor] = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results: Iterable[Any] = pool.map(decode, images)
        for index, result in enumerate(progress(results, total=len(images)) if progress else results):
            if isinstance(result, DataError):
                problems.add(images[index].where, str(result))
            elif result is not None:
                cache[index] = result
    problems.raise_if_any()
    return cache if keep else None
