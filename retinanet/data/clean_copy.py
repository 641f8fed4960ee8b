"""Writing a data set as a COCO json with its images, in which everything that was mended stays mended."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Collection
from pathlib import Path

from retinanet.common.errors import DataError
from retinanet.common.files import write_json
from retinanet.common.names import FreeNames
from retinanet.data.dataset import DetectionDataset

#: Errors of a file system that has no hard links, or none across its border, to this owner's file, or any more.
_NO_LINK = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS)


def write_clean_copy(dataset: DetectionDataset, folder: Path, name: str, without: Collection[int] = ()) -> Path:
    """Write a data set that opens without errors, also in a strict reading.

    Leave out the images with a wrong annotation, since their objects without a box would be taken for background.

    Images are hard links to the files of the data set where the file system allows it, else copies.

    Args:
        dataset: The images and boxes to write.
        folder: The folder to write into; it must exist.
        name: Name of the json file and of the folder of its images.
        without: Indices of images to leave out with their boxes.

    Returns:
        The json file, `folder/NAME.json`, whose images are in `folder/images/NAME/`.

    Raises:
        DataError: No image is left.
    """
    kept = [index for index in range(len(dataset)) if index not in without]
    if not kept:
        raise DataError(f"{dataset.source}: no image is free of errors, so nothing is left for a clean copy")
    images = folder / "images" / name
    images.mkdir(parents=True)
    file_names: dict[int, str] = {}
    names = FreeNames(images)
    for index in kept:
        source, image_id = dataset.paths[index], dataset.image_ids[index]
        file_name = names.take(source.stem, suffix=source.suffix)
        _link(source, images / file_name)
        file_names[image_id] = f"images/{name}/{file_name}"
    content = dataset.coco
    entries = [
        {**entry, "file_name": file_names[entry["id"]]} for entry in content["images"] if entry["id"] in file_names
    ]
    boxes = [entry for entry in content["annotations"] if entry["image_id"] in file_names]
    write_json(folder / f"{name}.json", {**content, "images": entries, "annotations": boxes})
    return folder / f"{name}.json"


def _link(source: Path, target: Path) -> None:
    """Make a hard link to a file, or a copy of it if the file system has no link for it.

    Raises:
        OSError: The target exists, or the file cannot be read or written.
    """
    try:
        os.link(source.resolve(), target)
    except OSError as error:
        if error.errno not in _NO_LINK:
            raise
        # Writing into a file that exists could change the original to which it is a link.
        with source.open("rb") as content, target.open("xb") as copy:
            shutil.copyfileobj(content, copy)
