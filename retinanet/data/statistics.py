"""What a data set consists of, and what in it deserves a look although it is no fault."""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from retinanet.data.dataset import DetectionDataset
from retinanet.data.problems import Finding, Kind
from retinanet.data.records import Box

_READ_BYTES = 2**20


@dataclass(frozen=True)
class ClassCount:
    """How often a class occurs.

    Attributes:
        name: The class.
        boxes: Its boxes, without crowds.
        images: Images with at least one of them.
    """

    name: str
    boxes: int
    images: int


@dataclass(frozen=True)
class Statistics:
    """Numbers and sizes of the images and boxes of a data set.

    Attributes:
        images: Number of images.
        empty_images: Images without a box.
        boxes: Number of boxes, without crowds.
        crowds: Number of crowds.
        classes: Every class, in the order of the labels.
        image_sizes: Smallest, median and largest shorter side, then longer side, in pixels.
        box_sides: Smallest, median and largest square root of a box's area, in pixels.
        box_share: Shares of small (area below 32 x 32), medium and large (from 96 x 96) boxes.
    """

    images: int
    empty_images: int
    boxes: int
    crowds: int
    classes: tuple[ClassCount, ...]
    image_sizes: tuple[tuple[float, float, float], tuple[float, float, float]]
    box_sides: tuple[float, float, float]
    box_share: tuple[float, float, float]

    def to_dict(self) -> dict[str, Any]:
        """Return the content as JSON values."""
        return asdict(self)


def statistics(dataset: DetectionDataset) -> Statistics:
    """Count the images, boxes and classes of a data set."""
    objects = [record for record in dataset.boxes if not record.crowd]
    boxes = Counter(record.label for record in objects)
    images = Counter(label for _, label in {(record.image_id, record.label) for record in objects})
    areas = torch.tensor([_area(record.box) for record in objects], dtype=torch.float64)
    small, large = (areas < 32**2).double(), (areas >= 96**2).double()
    count = max(1, len(objects))
    shares = small.sum().item() / count, (1 - small - large).sum().item() / count, large.sum().item() / count
    return Statistics(
        images=len(dataset),
        empty_images=len(dataset) - len({record.image_id for record in dataset.boxes}),
        boxes=len(objects),
        crowds=len(dataset.boxes) - len(objects),
        classes=tuple(ClassCount(name, boxes[i], images[i]) for i, name in enumerate(dataset.class_names)),
        image_sizes=(_spread([min(size) for size in dataset.sizes]), _spread([max(size) for size in dataset.sizes])),
        box_sides=_spread(areas.sqrt().tolist()),
        box_share=shares,
    )


def remarkable(dataset: DetectionDataset) -> list[Finding]:
    """Return classes without boxes, boxes that occur twice, and images with equal files."""
    used = {record.label for record in dataset.boxes if not record.crowd}
    findings = [
        Finding.of(Kind.UNUSED_CLASS, f"{dataset.source}: class {name}", "has no box")
        for label, name in enumerate(dataset.class_names)
        if label not in used
    ]
    path_of = dict(zip(dataset.image_ids, dataset.paths, strict=True))
    seen: set[tuple[int, int, Box, bool]] = set()
    for record in dataset.boxes:
        key = (record.image_id, record.label, record.box, record.crowd)
        if key in seen:
            name, box = dataset.class_names[record.label], ", ".join(f"{value:g}" for value in record.box)
            where = f"{dataset.source}: {path_of[record.image_id]}"
            findings.append(Finding.of(Kind.SAME_BOX, where, f"{name} at ({box}) occurs more than once"))
        seen.add(key)
    return findings + _equal_files(dataset)


def _equal_files(dataset: DetectionDataset) -> list[Finding]:
    """Return the images whose file has the content of an earlier one; only files of equal length are read."""
    of_length: dict[int, list[Path]] = defaultdict(list)
    for path in dataset.paths:
        of_length[os.path.getsize(path)].append(path)
    findings = []
    for paths in of_length.values():
        first: dict[bytes, Path] = {}
        for path in paths if len(paths) > 1 else ():
            other = first.setdefault(_digest(path), path)
            if other is not path:
                findings.append(Finding.of(Kind.SAME_IMAGE, f"{dataset.source}: {path}", f"equals {other}"))
    return findings


def _digest(path: Path) -> bytes:
    digest = hashlib.blake2b()
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return digest.digest()


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _spread(values: list[int] | list[float]) -> tuple[float, float, float]:
    """Return the smallest, the median and the largest value; zeros if there is none."""
    ordered = sorted(values) or [0]
    return ordered[0], ordered[len(ordered) // 2], ordered[-1]
