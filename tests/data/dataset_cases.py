"""Small data sets on disk, which the tests of data sets share."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from retinanet.common.errors import DataError
from retinanet.data import DetectionDataset, open_dataset

PHOTO = Path(__file__).parents[1] / "fixtures" / "OSBS_029.png"


def write_image(path: Path, width: int = 60, height: int = 40, seed: int = 0) -> None:
    """Write a picture of random pixels."""
    pixels = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    Image.frombytes("RGB", (width, height), bytes(pixels.flatten().tolist())).save(path)


def coco(**changes: object) -> dict:
    """Return COCO content with two images of 60 x 40 pixels, the second without boxes, and categories 7 and 3."""
    content = {
        "images": [
            {"id": 10, "file_name": "a.png", "width": 60, "height": 40},
            {"id": 4, "file_name": "b.png"},
        ],
        "annotations": [
            {"id": 0, "image_id": 10, "category_id": 7, "bbox": [5, 6, 20, 10], "area": 150, "iscrowd": 0},
            {"id": 5, "image_id": 10, "category_id": 3, "bbox": [1.5, 2.5, 3.25, 4]},
            {"id": 9, "image_id": 10, "category_id": 3, "bbox": [30, 0, 30, 40], "iscrowd": 1},
        ],
        "categories": [{"id": 7, "name": "tree"}, {"id": 3, "name": "bush"}],
    }
    return content | changes


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with the two images of `coco`."""
    write_image(tmp_path / "a.png")
    write_image(tmp_path / "b.png", seed=1)
    return tmp_path


def opened(folder: Path, content: object, **options: object) -> DetectionDataset:
    """Write content to `ann.json` and open it."""
    (folder / "ann.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return open_dataset(folder / "ann.json", **options)


def refusal(folder: Path, content: object, **options: object) -> str:
    """Return the message of the error that opening the content raises."""
    with pytest.raises(DataError) as caught:
        opened(folder, content, **options)
    return str(caught.value)


def with_annotation(**changes: object) -> dict:
    """Return `coco()` with a single annotation, changed as given; an Ellipsis removes an entry."""
    entry = {"id": 1, "image_id": 10, "category_id": 7, "bbox": [5, 6, 20, 10]} | changes
    return coco(annotations=[{key: value for key, value in entry.items() if value is not ...}])
