"""Synthetic input: random boxes, and small data sets of coloured rectangles on noise with exact boxes."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor
from torchvision.utils import save_image

from retinanet.data import DetectionDataset, open_dataset
from retinanet.model.config import RetinaNetConfig

CLASS_NAMES = ("red", "blue")
CATEGORY_IDS = (3, 11)

#: Configuration of a network that learns a data set of `rectangles` in seconds on one core.
TINY_MODEL = {
    "class_names": CLASS_NAMES,
    "category_ids": CATEGORY_IDS,
    "backbone": "resnet18",
    "backbone_norm": "batch",
    "trainable_backbone_layers": None,
    "fpn_levels": (3, 4),
    "fpn_channels": 32,
    "head_depth": 1,
    "head_norm": "group",
    "head_norm_groups": 8,
    "anchor_sizes": ((16.0, 24.0), (32.0, 48.0)),
    "aspect_ratios": (1.0,),
    "min_size": None,
}


def tiny_config(**changes: object) -> RetinaNetConfig:
    """Return the configuration of a small network for these data sets, with some fields replaced."""
    return RetinaNetConfig.from_dict({**TINY_MODEL, **changes})


def random_boxes(count: int, height: int, width: int) -> Tensor:  # [count, 4]
    """Return random boxes with sides of at least 5 pixels, inside an image of at least 50 x 50."""
    corner = torch.rand(count, 2) * torch.tensor([width, height]) * 0.6
    return torch.cat([corner, corner + 5 + torch.rand(count, 2) * torch.tensor([width, height]) * 0.3], dim=1)


def rectangles(folder: Path, count: int, *, size: int = 96, seed: int = 0) -> DetectionDataset:
    """Write and open a data set of `count` square images with one to three rectangles each that do not overlap."""
    rng = torch.Generator().manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for image_id in range(100, 100 + count):
        picture = 0.4 + 0.2 * torch.rand(3, size, size, generator=rng)
        taken: list[list[int]] = []
        for _ in range(int(torch.randint(1, 4, (1,), generator=rng))):
            width, height = torch.randint(14, size // 2, (2,), generator=rng).tolist()
            x = int(torch.randint(0, size - width, (1,), generator=rng))
            y = int(torch.randint(0, size - height, (1,), generator=rng))
            if any(x < a + c and a < x + width and y < b + d and b < y + height for a, b, c, d in taken):
                continue
            taken.append([x, y, width, height])
            label = int(torch.randint(0, 2, (1,), generator=rng))
            picture[:, y : y + height, x : x + width] = 0.1
            picture[2 * label, y : y + height, x : x + width] = 0.95
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": CATEGORY_IDS[label],
                    "bbox": [x, y, width, height],
                    "area": width * height,
                    "iscrowd": 0,
                }
            )
        save_image(picture, folder / f"{image_id}.png")
        images.append({"id": image_id, "file_name": f"{image_id}.png", "width": size, "height": size})
    categories = [{"id": i, "name": n} for i, n in zip(CATEGORY_IDS, CLASS_NAMES, strict=True)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations.json").write_text(json.dumps(content))
    return open_dataset(folder / "annotations.json")
