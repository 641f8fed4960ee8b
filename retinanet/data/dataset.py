"""`DetectionDataset`: images with boxes, from COCO json or Pascal VOC xml, checked before it is used."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from retinanet.common.errors import DataError, listed
from retinanet.data.coco import (
    ImageRecord,
    Source,
    check_sizes,
    collect_boxes,
    collect_categories,
    collect_images,
    read_coco,
)
from retinanet.data.images import check_image, image_size, read_image
from retinanet.data.problems import Problems
from retinanet.data.voc import read_voc

CACHE_BYTES = 512 * 2**20

Target = dict[str, Any]


class DetectionDataset(Dataset[tuple[Tensor, Target]]):
    """Images and boxes of one annotation file or folder. Made by `open_dataset`, which checks everything.

    Attributes:
        source: The annotation file (COCO) or folder (VOC).
        class_names: Names of the classes; the position is the label.
        category_ids: The categories' ids in the source; the position is the label.
        image_ids: Id of each image, by index.
        paths: File of each image, by index.
        sizes: `(height, width)` of each image after its EXIF orientation, by index.
        coco: COCO content for pycocotools: the source's ids, clean boxes, annotations numbered from 1.
    """

    def __init__(
        self,
        source: Path,
        records: Sequence[ImageRecord],
        categories: dict[int, str],
        annotations: list[dict[str, Any]],
        cache: dict[int, Tensor] | None = None,
    ) -> None:
        """Puts checked parts together; `open_dataset` is the way to one."""
        self.source = source
        self.class_names: tuple[str, ...] = tuple(categories.values())
        self.category_ids: tuple[int, ...] = tuple(categories)
        self.image_ids: list[int] = [record.image_id for record in records]
        self.paths: list[Path] = [record.path for record in records]
        self.sizes: list[tuple[int, int]] = [(int(record.height or 0), int(record.width or 0)) for record in records]
        self.coco: dict[str, Any] = {
            "images": [
                {"id": image_id, "file_name": path.name, "height": height, "width": width}
                for image_id, path, (height, width) in zip(self.image_ids, self.paths, self.sizes, strict=True)
            ],
            "annotations": annotations,
            "categories": [{"id": identity, "name": name} for identity, name in categories.items()],
        }
        self._boxes = [_boxes(record.boxes) for record in records]
        self._labels = [torch.tensor(record.labels, dtype=torch.int64) for record in records]
        self._crowd_boxes = [_boxes(record.crowd_boxes) for record in records]
        self._cache = cache

    def __len__(self) -> int:
        """Number of images."""
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        """`load(index)`."""
        return self.load(index)

    def load(self, index: int) -> tuple[Tensor, Target]:
        """One image and its boxes; the image may be shared and must not be changed in place.

        Args:
            index: 0 to `len(self) - 1`.

        Returns:
            The image, uint8 RGB `[3, H, W]`, and its target: `boxes` float32 `[M, 4]` xyxy pixels, `labels`
            int64 `[M]`, `crowd_boxes` float32 `[C, 4]`, `image_id` int.

        Raises:
            DataError: the file has vanished or been damaged since it was checked.
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


def _boxes(rows: list[tuple[float, float, float, float]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float32).reshape(-1, 4)


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
    """Opens a data set and checks all of it: nothing that is wrong is left for the middle of a training run.

    Images without boxes are kept; they are background. Category ids need not be contiguous. Boxes that
    overhang their image by at most one pixel are clipped, others are errors.

    Args:
        path: A COCO json file, or a folder of Pascal VOC xml files.
        images_dir: What file names are relative to. None: the json's folder; for VOC the xml files' folder,
            or `JPEGImages` beside it where that exists.
        class_names: For VOC, which has no list of classes: the order of the labels (a validation set takes
            its training set's). For COCO it must equal the file's own.
        voc_one_based: False for xml files whose boxes are 0-based corners already, as some tools write them.
        decode_check: Decodes every image once, which finds files that are cut short. False reads headers
            only.
        cache_bytes: Decoded images are kept in memory if all of them together take no more than this.
        progress: Wraps the iteration over the images, as `tqdm` does; called with `total=`.

    Returns:
        The data set.

    Raises:
        DataError: anything is wrong. One line "file: entry: reason" for each of the first five entries, and
            the count.
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
    check_sizes(source, records, image_size, problems)
    annotations = collect_boxes(source, records, categories, problems)
    problems.raise_if_any()
    rows = list(records.values())
    cache = _decode(rows, decode_check, cache_bytes, problems, progress)
    return DetectionDataset(path, rows, categories, annotations, cache)


def _read(
    path: Path, images_dir: Path | None, class_names: Sequence[str] | None, voc_one_based: bool
) -> tuple[Source, Path]:
    if images_dir is not None and not images_dir.is_dir():
        raise DataError(f"{images_dir}: no such folder of images")
    if not path.is_dir():
        return read_coco(path), images_dir or path.parent
    if images_dir is None:
        images_dir = path.parent / "JPEGImages"
        if not images_dir.is_dir():
            images_dir = path
    return read_voc(path, images_dir, class_names, one_based=voc_one_based), images_dir


def _decode(
    records: list[ImageRecord],
    decode_check: bool,
    cache_bytes: int,
    problems: Problems,
    progress: Callable[..., Iterable[Any]] | None,
) -> dict[int, Tensor] | None:
    """Decodes all images if asked to or if they fit into the cache; returns the cache, if there is one."""
    size = sum(3 * int(record.height or 0) * int(record.width or 0) for record in records)
    keep = size <= cache_bytes
    if not (keep or decode_check):
        return None

    def decode(record: ImageRecord) -> Tensor | DataError | None:
        try:
            if keep:
                return read_image(record.path)
            check_image(record.path)
            return None
        except DataError as error:
            return error

    cache: dict[int, Tensor] = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results: Iterable[Any] = pool.map(decode, records)
        for index, result in enumerate(progress(results, total=len(records)) if progress else results):
            if isinstance(result, DataError):
                problems.add(records[index].where, str(result))
            elif result is not None:
                cache[index] = result
    problems.raise_if_any()
    return cache if keep else None
