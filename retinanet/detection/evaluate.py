"""Evaluation on a data set: the twelve COCO numbers, and precision, recall and F1 over the score threshold."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from retinanet.common.errors import DataError, listed
from retinanet.common.modes import evaluation_mode
from retinanet.common.signals import ignore_stop_signals
from retinanet.data import DetectionDataset
from retinanet.data.fitness import check_resizable
from retinanet.detection.coco_input import CocoInput
from retinanet.detection.coco_numbers import ENGINES, input_stats
from retinanet.detection.detection_table import Columns, DetectionTable
from retinanet.detection.score_curves import ScoreCurves, score_curves
from retinanet.detection.views import with_views
from retinanet.model.detector import Detector
from retinanet.model.preprocessing import to_float
from retinanet.model.targets import ImageDetections


@dataclass(frozen=True)
class EvaluationResult:
    """The detections of a model in a data set, and their numbers.

    Attributes:
        stats: The twelve COCO numbers by name, in 0..1: average precision over IoU .50:.95 (AP), at .50 and .75, and by
            object size (s: area below 32**2, m: below 96**2, l: above); average recall with 1, 10 and 100 detections
            per image, and by size. A number that is undefined, because no object has that size, is -1.
        detections: COCO results: dicts with `image_id`, `category_id` of the data set, `bbox` (x, y, width, height) and
            `score`. They are held as arrays.
        curves: Precision, recall and F1 over the score threshold at IoU 0.5, of all classes and of each.
    """

    stats: dict[str, float]
    detections: DetectionTable
    curves: ScoreCurves


def evaluate(
    model: Detector,
    dataset: DetectionDataset,
    device: str | torch.device | None = None,
    *,
    engine: str = ENGINES[0],
    batch_size: int = 1,
    workers: int = 0,
    views: int = 1,
    progress: Callable[..., Iterable[Any]] | None = None,
) -> EvaluationResult:
    """Run a model over a data set and compare its detections with the ground truth.

    Memory holds one batch of images and 28 bytes per detection, however many images there are.

    Args:
        model: The model. It runs in evaluation mode and is then set back to the mode that it was in.
        dataset: Images and ground truth. Each of its classes must be one of the model's, by name. Detections of the
            other classes of the model are dropped.
        device: Device to compute on, to which the model is moved; None is the device of the model.
        engine: The library that computes the twelve COCO numbers, `pycocotools` or `hotcoco`. Both give the same
            numbers; hotcoco is faster.
        batch_size: Images in a batch.
        workers: Processes that load images; 0 loads them in this process.
        views: Number of mirrored views of each image: 1, 2 or 4; see `retinanet.detection.views`.
        progress: Wraps the iteration over batches, as `tqdm` does; it is called with `total=`.

    Returns:
        The numbers and the detections.

    Raises:
        DataError: The data set has a class that the model does not have.
        ValueError: `views` is not 1, 2 or 4, or there is no such engine.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine: expected {' or '.join(ENGINES)}, got {engine!r}")
    detections = detect_dataset(
        model, dataset, device, batch_size=batch_size, workers=workers, views=views, progress=progress
    )
    return evaluate_detections(dataset, detections, engine)


def detect_dataset(
    model: Detector,
    dataset: DetectionDataset,
    device: str | torch.device | None = None,
    *,
    indices: Sequence[int] | None = None,
    batch_size: int = 1,
    workers: int = 0,
    views: int = 1,
    progress: Callable[..., Iterable[Any]] | None = None,
) -> DetectionTable:
    """Run a model over images of a data set and return its detections; see `evaluate`.

    Several processes may each take some of the images. `merge_detections` then merges their tables into the table of a
    single process, and `evaluate_detections` computes the numbers.

    Args:
        model: The model.
        dataset: Images and classes.
        device: Device to compute on; None is the device of the model.
        indices: Positions of the images in the data set; None takes all.
        batch_size: Images in a batch.
        workers: Processes that load images.
        views: Number of mirrored views of each image.
        progress: Wraps the iteration over batches.

    Returns:
        The detections of the classes of the data set, on the CPU.

    Raises:
        DataError: The data set has a class that the model does not have, or an image that resizing makes vanish.
        ValueError: `views` is not 1, 2 or 4.
    """
    detector = with_views(model, views)
    device = model.device if device is None else torch.device(device)
    labels = dataset_labels(model.config.class_names, dataset)
    check_resizable(dataset, model.transform.vanishes, model.config.max_size)
    images = _Images(dataset, range(len(dataset)) if indices is None else indices)
    loader = DataLoader(
        images,
        batch_size,
        num_workers=workers,
        collate_fn=list,
        worker_init_fn=ignore_stop_signals,
        generator=torch.Generator(),
    )
    batches: Iterable[Any] = loader if progress is None else progress(loader, total=len(loader))
    parts: list[Columns] = []
    with evaluation_mode(model.to(device)), torch.inference_mode():
        for batch in batches:
            pixels = [to_float(image.to(device)) for image, _ in batch]
            for per_image, (_, index) in zip(detector(pixels), batch, strict=True):
                part = table_columns(ImageDetections(**per_image), index, labels)
                if len(part[0]):
                    parts.append(part)
    return DetectionTable.from_parts(tuple(dataset.image_ids), dataset.category_ids, parts)


def evaluate_detections(
    dataset: DetectionDataset, detections: DetectionTable, engine: str = ENGINES[0]
) -> EvaluationResult:
    """Compare detections with the ground truth of a data set.

    Args:
        dataset: The ground truth.
        detections: Detections in its images.
        engine: The library that computes the twelve COCO numbers, `pycocotools` or `hotcoco`.

    Returns:
        The numbers and the detections.

    Raises:
        ValueError: There is no such engine.
    """
    content = CocoInput.from_coco(dataset.coco, detections)
    return EvaluationResult(input_stats(content, engine), detections, score_curves(content))


class _Images(Dataset[tuple[Tensor, int]]):
    """Some images of a data set with their positions, without the ground truth."""

    def __init__(self, dataset: DetectionDataset, indices: Sequence[int]) -> None:
        self.dataset = dataset
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        position = self.indices[index]
        return self.dataset.load(position)[0], position


def dataset_labels(class_names: Sequence[str], dataset: DetectionDataset) -> NDArray[np.int32]:  # [K]
    """Return the data set's label by label of the model, or -1 for a class that the data set does not have.

    Raises:
        DataError: The data set has a class that the model does not have.
    """
    unknown = [name for name in dataset.class_names if name not in class_names]
    if unknown:
        raise DataError(
            f"{dataset.source}: class {unknown[0]!r} is not one that the model was trained for: {listed(class_names)}"
        )
    position = {name: label for label, name in enumerate(dataset.class_names)}
    return np.array([position.get(name, -1) for name in class_names], np.int32)


def table_columns(detections: ImageDetections, index: int, labels: NDArray[np.int32]) -> Columns:
    """Return the rows of a `DetectionTable` for the detections in one image."""
    corners = detections.boxes.float().cpu()
    bboxes = torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], dim=1).numpy()
    mapped = labels[detections.labels.cpu().numpy()]
    kept = mapped >= 0
    images = np.full(np.count_nonzero(kept), index, np.int32)
    return images, mapped[kept], bboxes[kept], detections.scores.float().cpu().numpy()[kept]
