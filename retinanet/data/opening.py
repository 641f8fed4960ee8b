"""Opening a data set: its form is recognised, and all of it is checked before it is used."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from retinanet.common.errors import DataError, listed
from retinanet.data.dataset import DetectionDataset
from retinanet.data.forms import read_source
from retinanet.data.images import MAX_PIXELS, check_image, image_size, read_image
from retinanet.data.problems import Kind, Problems
from retinanet.data.records import (
    ImageRecord,
    check_sizes,
    collect_boxes,
    collect_categories,
    collect_images,
    image_reason,
)

#: Decoded images are kept in memory if all images of a data set together take at most this many bytes.
CACHE_BYTES = 512 * 2**20


@dataclass(frozen=True)
class ReadOptions:
    """How a data set is read; `open_dataset` describes each field."""

    class_names: Sequence[str] | None = None
    voc_one_based: bool = True
    decode_check: bool = True
    cache_bytes: int = CACHE_BYTES
    max_pixels: int | None = MAX_PIXELS
    strict: bool = False
    split: str | None = None
    csv_columns: Sequence[str] | None = None


@dataclass(frozen=True)
class Inspection:
    """What is in a data set.

    Attributes:
        dataset: The images and boxes that are free of errors.
        problems: Every error, and every fault that was mended.
        form: The form of the annotations, in words.
    """

    dataset: DetectionDataset
    problems: Problems
    form: str


def open_dataset(
    path: str | Path,
    images_dir: str | Path | None = None,
    *,
    class_names: Sequence[str] | None = None,
    voc_one_based: bool = True,
    decode_check: bool = True,
    cache_bytes: int = CACHE_BYTES,
    max_pixels: int | None = MAX_PIXELS,
    strict: bool = False,
    split: str | None = None,
    csv_columns: Sequence[str] | None = None,
    progress: Callable[..., Iterable[Any]] | None = None,
) -> DetectionDataset:
    """Open a data set and check all of it, so that no error appears in the middle of a training run.

    Images without boxes are kept; they are background. Category ids need not be contiguous. What has one right reading
    is mended and counted in the data set's `mended`: boxes without area are left out, boxes that overhang their image
    are clipped, and so on (`retinanet.data.problems.Kind`). Everything else is an error.

    Args:
        path: A COCO json file; a folder of Pascal VOC xml files, one xml file, a folder with `Annotations` and
            `JPEGImages`, or a list in its `ImageSets`; the data.yaml of a YOLO data set, or its folder; or a CSV table
            of boxes.
        images_dir: The folder to which file names are relative. None takes the folder of the json or CSV file. For VOC,
            None takes `JPEGImages` beside the folder of the xml files if it exists, else the folder of the xml files.
            For YOLO, None takes what the data.yaml says.
        class_names: The classes in the order of their labels. VOC and CSV have no list of classes, so a validation set
            needs the list of its training set; None takes the classes that occur, sorted. For COCO and YOLO, the list
            must equal that of the file.
        voc_one_based: False for xml files whose boxes are already 0-based corners, as some tools write them.
        decode_check: Whether to decode every image once, which finds files that are cut short. False reads headers
            only.
        cache_bytes: Decoded images are kept in memory if all of them together take at most this many bytes.
        max_pixels: Pixels of the largest image that is accepted; None accepts any, for images that will be cut into
            tiles.
        strict: Whether faults that could be mended are errors.
        split: "train", "val" or "test" of a YOLO data set. None takes the only one that there is.
        csv_columns: Names of the columns of a CSV table, such as `("path", "xmin", "xmax", "ymin", "ymax", "class")`.
            None takes its header, or `path,x1,y1,x2,y2,class` if there is none.
        progress: Wraps the iteration over the images, as `tqdm` does; called with `total=`.

    Returns:
        The data set.

    Raises:
        DataError: Anything is wrong. The message has one line "file: entry: reason" for each of the first five wrong
            entries, and then their count.
    """
    options = ReadOptions(class_names, voc_one_based, decode_check, cache_bytes, max_pixels, strict, split, csv_columns)
    return _open(path, images_dir, options, progress, stop_at_errors=True).dataset


def inspect_dataset(
    path: str | Path,
    images_dir: str | Path | None = None,
    options: ReadOptions | None = None,
    progress: Callable[..., Iterable[Any]] | None = None,
) -> Inspection:
    """Read a data set as `open_dataset` does, and collect all errors instead of raising them.

    Args:
        path: As in `open_dataset`.
        images_dir: As in `open_dataset`.
        options: The other arguments of `open_dataset`.
        progress: As in `open_dataset`.

    Returns:
        The findings, and the images and boxes that are free of errors.

    Raises:
        DataError: Nothing can be read, because the annotation file is missing, or is none.
    """
    return _open(path, images_dir, options or ReadOptions(), progress, stop_at_errors=False)


def _open(
    path: str | Path,
    images_dir: str | Path | None,
    options: ReadOptions,
    progress: Callable[..., Iterable[Any]] | None,
    stop_at_errors: bool,
) -> Inspection:
    path = Path(path)
    problems = Problems(path, strict=options.strict)
    source = read_source(path, None if images_dir is None else Path(images_dir), options, problems)
    categories = collect_categories(source, problems)
    if (
        options.class_names is not None
        and not problems.errors
        and list(categories.values()) != list(options.class_names)
    ):
        problems.add(
            Kind.CLASS,
            f"{path}: categories",
            f"expected the classes {listed(options.class_names)}; got {listed(list(categories.values()))}",
        )
        problems.raise_if_any()
    records = collect_images(source, problems)
    with _threads() as pool:
        images = list(records.values())
        sizes = pool.map(lambda image: _attempt(image_size, image.path, options.max_pixels), images)
        check_sizes(images, sizes, problems)
        boxes = collect_boxes(source, records, categories, problems)
        if stop_at_errors:
            problems.raise_if_any()
        images = [image for image in images if image.height]
        decoded = _decode(pool, images, options, problems, progress)
    if stop_at_errors:
        problems.raise_if_any()
    cache = None if decoded is None else dict(enumerate(decoded.values()))
    usable = [image for image in images if image.height]
    ids = {image.image_id for image in usable}
    boxes = [box for box in boxes if box.image_id in ids]
    dataset = DetectionDataset(
        path, usable, boxes, categories, cache, problems.counts(), options.max_pixels, source.description
    )
    return Inspection(dataset, problems, source.form)


@contextmanager
def _threads() -> Iterator[ThreadPoolExecutor]:
    """Yield a pool that drops what it has not started when the block raises, as on Ctrl-C."""
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _decode(
    pool: ThreadPoolExecutor,
    images: list[ImageRecord],
    options: ReadOptions,
    problems: Problems,
    progress: Callable[..., Iterable[Any]] | None,
) -> dict[int, Tensor] | None:
    """Decode all images if they fit into the cache or `decode_check` is set; return those that were kept, by id.

    An image that cannot be decoded gets the height 0. The result is None if the images do not fit.
    """
    keep = sum(3 * image.height * image.width for image in images) <= options.cache_bytes
    if not (keep or options.decode_check):
        return None
    kept: dict[int, Tensor] = {}
    read = read_image if keep else check_image
    results: Iterable[Any] = pool.map(lambda image: _attempt(read, image.path, options.max_pixels), images)
    for image, result in zip(images, progress(results, total=len(images)) if progress else results, strict=True):
        if isinstance(result, DataError):
            problems.add(Kind.IMAGE, image.where, image_reason(image, result))
            image.height = 0
        elif result is not None:
            kept[image.image_id] = result
    return kept if keep else None


def _attempt(read: Callable[[Path, int | None], Any], path: Path, max_pixels: int | None) -> Any:
    """Return what a reader of images returns, or the DataError that it raises."""
    try:
        return read(path, max_pixels)
    except DataError as error:
        return error
