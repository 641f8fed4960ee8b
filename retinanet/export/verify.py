"""Comparison of an exported file with the model that it was made from, on images."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.transform import resize_boxes

import retinanet_ops as ops
from retinanet.common.errors import DataError
from retinanet.common.modes import evaluation_mode
from retinanet.data import DetectionDataset
from retinanet.data.images import read_image
from retinanet.detection.detection_table import Columns, DetectionTable
from retinanet.detection.evaluate import dataset_labels, evaluate_detections, table_columns
from retinanet.export.exporting import check_format
from retinanet.export.families import Exportable, exportable
from retinanet.export.runners import Runner, load_runners
from retinanet.model.preprocessing import to_float
from retinanet.model.targets import ImageDetections

#: Images in a batch of a file that takes any number.
_BATCH = 2
#: Detections of one class are one detection of both programs if their IoU is at least this.
_SAME_OBJECT_IOU = 0.5


@dataclass(frozen=True)
class Tolerance:
    """How far an exported file may be from its model.

    Attributes:
        boxes: Largest difference of a coordinate, in pixels of the input.
        share: Largest difference of a coordinate, as a share of the longer side of the box, that is added to it.
        scores: Largest difference of a score.
        unpaired: Largest share of detections that only one of both has.
        outputs: Largest difference of an output of the heads, as a share of the largest value of that output.
    """

    boxes: float
    share: float
    scores: float
    unpaired: float
    outputs: float


FLOAT32 = Tolerance(boxes=1e-3, share=0.0, scores=1e-4, unpaired=0.0, outputs=1e-4)
#: Half precision has 11 bits, so that a detection near a threshold may be found by one of both only.
HALF = Tolerance(boxes=1.0, share=0.02, scores=0.02, unpaired=0.05, outputs=5e-2)


@dataclass
class Verification:
    """The differences between an exported file, as an engine runs it, and its model.

    A difference that is not finite is infinite, also where both are NaN.

    Attributes:
        engine: Name of the engine.
        images: Number of images.
        detections: Number of detections of the model.
        boxes: Largest difference of a coordinate of a detection that both have, in pixels of the input.
        excess: Largest difference of a coordinate, as a multiple of what the tolerance allows.
        scores: Largest difference of a score of a detection that both have.
        unpaired: Number of detections that only one of both has. A detection whose score is within the tolerance of
            the score threshold, or of the last detection of an image whose slots are full, is not counted.
        counts: Number of images with another number of detections.
        outputs: Largest difference of each output of the heads, as a share of its largest value, by name.
        ap: Average precision of the model and of the file, or None without annotations.
    """

    engine: str
    tolerance: Tolerance
    images: int = 0
    detections: int = 0
    boxes: float = 0.0
    excess: float = 0.0
    scores: float = 0.0
    unpaired: int = 0
    counts: int = 0
    outputs: dict[str, float] = field(default_factory=dict)
    ap: tuple[float, float] | None = None

    @property
    def compared(self) -> bool:
        """Whether there was anything to compare: outputs of the heads, or detections of one of both."""
        return bool(self.outputs) or self.detections > 0 or self.unpaired > 0

    @property
    def agrees(self) -> bool:
        """Whether there was anything to compare, and all differences are within the tolerance."""
        limit = self.tolerance
        return (
            self.compared
            and self.excess <= 1
            and self.scores <= limit.scores
            and self.unpaired <= limit.unpaired * max(1, self.detections)
            and all(value <= limit.outputs for value in self.outputs.values())
        )


class _Pair(NamedTuple):
    """The detections of the model and of an exported file in one image, in pixels of the image."""

    model: ImageDetections
    file: ImageDetections


def verify_export(
    model: nn.Module,
    path: str | os.PathLike[str],
    images: DetectionDataset | Sequence[str | os.PathLike[str]],
    *,
    format: str | None = None,
    progress: Callable[..., Iterable[Any]] | None = None,
) -> list[Verification]:
    """Compare an exported file with its model on images.

    Both get the same pixels, resized and padded as the metadata of the file say.

    Args:
        model: The model that was exported.
        path: The exported file.
        images: A data set, for which average precisions are computed as well, or picture files.
        format: Format of the file, as in `export_model`.
        progress: Wraps the iteration over batches, as `tqdm` does; it is called with `total=`.

    Returns:
        The differences for each engine that this machine has for the format.

    Raises:
        ConfigError: There is no such format.
        UsageError: The package of the engine is not installed.
        DataError: The file or a picture cannot be read, there are no pictures, the data set has a class that the
            model does not have, or the file has no names of classes.
    """
    path = Path(path)
    source = exportable(model)
    runners = load_runners(path, check_format(path, format))
    if not len(images):
        raise DataError(f"{path}: expected at least one image to verify it on, got none")
    metadata = runners[0].metadata
    if isinstance(images, DetectionDataset) and metadata.postprocess != "raw" and not metadata.class_names:
        raise DataError(
            f"{path}: expected the names of the classes, which a data set needs, in the metadata, got none; export the "
            "model with class_names, or verify the file on pictures"
        )
    with evaluation_mode(model):
        return [_verify(source, runner, images, progress) for runner in runners]


@torch.inference_mode()
def _verify(
    source: Exportable,
    runner: Runner,
    images: DetectionDataset | Sequence[str | os.PathLike[str]],
    progress: Callable[..., Iterable[Any]] | None,
) -> Verification:
    metadata = runner.metadata
    found = Verification(runner.engine, HALF if metadata.half else FLOAT32)
    dataset = images if isinstance(images, DetectionDataset) else None
    labels = None if dataset is None or metadata.postprocess == "raw" else dataset_labels(metadata.class_names, dataset)
    columns: tuple[list[Columns], list[Columns]] = ([], [])
    number = metadata.batch or _BATCH
    starts = range(0, len(images), number)
    for start in starts if progress is None else progress(starts, total=len(starts)):
        batch = range(start, min(start + number, len(images)))
        pairs = _compare_batch(source, runner, [_load(images, i) for i in batch], found)
        for index, pair in zip(batch, pairs, strict=bool(pairs)):
            if labels is not None:
                for parts, detections in zip(columns, pair, strict=True):
                    parts.append(table_columns(detections, index, labels))
    found.images = len(images)
    if dataset is not None and labels is not None:
        tables = (DetectionTable.from_parts(dataset.image_ids, dataset.category_ids, parts) for parts in columns)
        of_model, of_file = (evaluate_detections(dataset, table).stats["AP"] for table in tables)
        found.ap = of_model, of_file
    return found


def _load(images: DetectionDataset | Sequence[str | os.PathLike[str]], index: int) -> Tensor:  # [3, H, W] in 0..1
    if isinstance(images, DetectionDataset):
        return to_float(images.load(index)[0])
    return to_float(read_image(Path(images[index])))


def _compare_batch(source: Exportable, runner: Runner, images: list[Tensor], found: Verification) -> list[_Pair]:
    """Add the differences in some images to those that were found; return the detections in each image, if any."""
    metadata, device = runner.metadata, source.mean.device
    originals = [(image.shape[-2], image.shape[-1]) for image in images]
    sizes = [metadata.rule.resized_size(*size) for size in originals]
    resized = [
        F.interpolate(image.to(device)[None], size, mode="bilinear", align_corners=False)[0]
        for image, size in zip(images, sizes, strict=True)
    ]
    # A file for a fixed number of images gets the last one several times.
    missing = (metadata.batch or len(images)) - len(images)
    resized, sizes = resized + resized[-1:] * missing, sizes + sizes[-1:] * missing
    padded = metadata.rule.padded_size(sizes)
    size_tensor = torch.tensor(sizes, device=device)
    outputs = runner.run(_padded(resized, padded), size_tensor)
    pixels = _padded([source.normalize(image) for image in resized], padded)
    if metadata.postprocess == "raw":
        maps = [level for levels in source.heads(pixels) for level in levels]
        for name, expected, got in zip(metadata.outputs, maps, outputs, strict=True):
            share = (expected - got.to(device)).abs().max() / expected.abs().max().clamp(min=1e-6)
            found.outputs[name] = _larger(found.outputs.get(name, 0.0), share)
        return []
    in_model = source.reference(pixels, size_tensor)[: len(images)]
    boxes, scores, labels, count = (output.to(device) for output in outputs)
    in_file = [
        ImageDetections(boxes[i, :n], scores[i, :n], labels[i, :n]) for i, n in enumerate(count.tolist()[: len(images)])
    ]
    pairs = []
    for ours, theirs, size, original in zip(in_model, in_file, sizes, originals, strict=False):
        compare_detections(ours, theirs, found, source.score_threshold, boxes.shape[1])
        pairs.append(
            _Pair(
                *(side._replace(boxes=resize_boxes(side.boxes, list(size), list(original))) for side in (ours, theirs))
            )
        )
    return pairs


def _padded(images: Sequence[Tensor], size: tuple[int, int]) -> Tensor:  # [N, 3, H, W]
    batch = images[0].new_zeros(len(images), 3, *size)
    for slot, image in zip(batch, images, strict=True):
        slot[:, : image.shape[1], : image.shape[2]] = image
    return batch


def compare_detections(
    expected: ImageDetections, got: ImageDetections, found: Verification, threshold: float, slots: int
) -> None:
    """Add the differences between the detections of the model and of the file in one image, in any order."""
    if not (got.boxes.isfinite().all() and got.scores.isfinite().all()):
        found.boxes = found.excess = math.inf
    found.detections += len(expected.labels)
    found.counts += len(expected.labels) != len(got.labels)
    pairs = list(_pairs(expected, got))
    for side, own, other in ((0, expected, got), (1, got, expected)):
        cut_off = float(other.scores.min()) if len(other.scores) == slots else threshold
        # A score of NaN is not within the tolerance either.
        lone = ~(own.scores <= cut_off + found.tolerance.scores)
        lone[torch.tensor([pair[side] for pair in pairs], dtype=torch.int64, device=lone.device)] = False
        found.unpaired += int(lone.sum())
    if not pairs:
        return
    ours, theirs = (torch.tensor(rows, device=got.labels.device) for rows in zip(*pairs, strict=True))
    boxes, others = expected.boxes[ours], got.boxes[theirs]
    differences = (boxes - others).abs().amax(1)
    limit = found.tolerance.boxes + found.tolerance.share * (boxes[:, 2:] - boxes[:, :2]).amax(1)
    found.boxes = _larger(found.boxes, differences.max())
    found.excess = _larger(found.excess, (differences / limit).max())
    found.scores = _larger(found.scores, (expected.scores[ours] - got.scores[theirs]).abs().max())


def _larger(largest: float, difference: Tensor) -> float:
    """Return the larger of two differences. One that is not finite is infinite, because `max` may skip NaN."""
    return max(largest, float(difference) if difference.isfinite() else math.inf)


def _pairs(expected: ImageDetections, got: ImageDetections) -> Iterator[tuple[int, int]]:
    """Yield the rows of detections that both have: of one class, each with the nearest that is left, best first."""
    if not len(expected.labels) or not len(got.labels):
        return
    distance = (expected.boxes[:, None] - got.boxes).abs().amax(2)  # [D, E]
    # A box without area has IoU 0 even with itself.
    same = (ops.box_iou(expected.boxes, got.boxes) >= _SAME_OBJECT_IOU) | (distance < 1e-3)
    same &= expected.labels[:, None] == got.labels
    # Equal boxes with several scores would otherwise be paired in any order.
    distance = distance + (expected.scores[:, None] - got.scores).abs()
    distance = distance.masked_fill(~same, float("inf"))
    for row in range(len(distance)):
        value, column = distance[row].min(0)
        if value.isfinite():
            yield row, int(column)
            distance[:, column] = float("inf")
