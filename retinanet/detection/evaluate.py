"""Evaluation on a data set: the twelve COCO numbers, computed by pycocotools."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from retinanet.common.errors import DataError, listed
from retinanet.data import DetectionDataset
from retinanet.detection.views import with_views
from retinanet.model.network import RetinaNet
from retinanet.model.preprocessing import to_float
from retinanet.model.targets import ImageDetections

#: Meaning of each of the twelve COCO numbers, in the order of pycocotools.
STAT_MEANINGS = {
    "AP": "IoU 0.50:0.95, all sizes, 100 detections per image",
    "AP50": "IoU 0.50",
    "AP75": "IoU 0.75",
    "APs": "small objects (area below 32 x 32)",
    "APm": "medium objects (area below 96 x 96)",
    "APl": "large objects",
    "AR1": "recall with 1 detection per image",
    "AR10": "recall with 10 detections per image",
    "AR100": "recall with 100 detections per image",
    "ARs": "recall, small objects",
    "ARm": "recall, medium objects",
    "ARl": "recall, large objects",
}
#: Names of the twelve COCO numbers, in the order of pycocotools.
STAT_NAMES = tuple(STAT_MEANINGS)


@dataclass(frozen=True)
class EvaluationResult:
    """The detections of a model in a data set, and their COCO numbers.

    Attributes:
        stats: The twelve COCO numbers by name, in 0..1: average precision over IoU .50:.95 (AP), at .50 and .75, and by
            object size (s: area below 32**2, m: below 96**2, l: above); average recall with 1, 10 and 100 detections
            per image, and by size. A number that is undefined, because no object has that size, is -1.
        detections: COCO results: dicts with `image_id`, `category_id` of the data set, `bbox` (x, y, width, height) and
            `score`.
    """

    stats: dict[str, float]
    detections: list[dict[str, Any]]


def evaluate(
    model: RetinaNet,
    dataset: DetectionDataset,
    device: str | torch.device | None = None,
    *,
    batch_size: int = 1,
    workers: int = 0,
    views: int = 1,
    progress: Callable[..., Iterable[Any]] | None = None,
) -> EvaluationResult:
    """Run a model over a data set and compute its COCO numbers.

    Args:
        model: The model. It runs in evaluation mode and is then set back to the mode that it was in.
        dataset: Images and ground truth. Each of its classes must be one of the model's, by name. Detections of the
            other classes of the model are dropped.
        device: Device to compute on, to which the model is moved; None is the device of the model.
        batch_size: Images in a batch.
        workers: Processes that load images; 0 loads them in this process.
        views: Number of mirrored views of each image: 1, 2 or 4; see `retinanet.detection.views`.
        progress: Wraps the iteration over batches, as `tqdm` does; it is called with `total=`.

    Returns:
        The COCO numbers and the detections.

    Raises:
        DataError: The data set has a class that the model does not have.
        ValueError: `views` is not 1, 2 or 4.
    """
    detector = with_views(model, views)
    device = model.base_anchors.device if device is None else torch.device(device)
    categories = _categories(model, dataset)
    loader = DataLoader(_Images(dataset), batch_size, num_workers=workers, collate_fn=list, generator=torch.Generator())
    batches: Iterable[Any] = loader if progress is None else progress(loader, total=len(loader))
    detections: list[dict[str, Any]] = []
    with _evaluating(model.to(device)), torch.inference_mode():
        for batch in batches:
            images = [to_float(image.to(device)) for image, _ in batch]
            for per_image, (_, image_id) in zip(detector(images), batch, strict=True):
                detections += _to_coco(ImageDetections(**per_image), image_id, categories)
    return EvaluationResult(coco_stats(dataset.coco, detections), detections)


def coco_stats(ground_truth: dict[str, Any], detections: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Compute the twelve COCO numbers of detections.

    Args:
        ground_truth: COCO content with `images`, `annotations` and `categories`.
        detections: COCO results; may be empty.

    Returns:
        The numbers by name, in 0..1, or -1 where a number is undefined.
    """
    annotations = [
        {**d, "id": i, "iscrowd": 0, "area": d["bbox"][2] * d["bbox"][3]} for i, d in enumerate(detections, start=1)
    ]
    # Keep pycocotools from printing its results.
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(_indexed(ground_truth), _indexed({**ground_truth, "annotations": annotations}), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return dict(zip(STAT_NAMES, map(float, evaluation.stats), strict=True))


class _Images(Dataset[tuple[Tensor, int]]):
    """Images and their ids, without the ground truth."""

    def __init__(self, dataset: DetectionDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, target = self.dataset.load(index)
        return image, target["image_id"]


def _categories(model: RetinaNet, dataset: DetectionDataset) -> dict[int, int]:
    """Return the data set's category id by label of the model, for the classes that the data set has."""
    names = model.config.class_names
    unknown = [name for name in dataset.class_names if name not in names]
    if unknown:
        raise DataError(
            f"{dataset.source}: class {unknown[0]!r} is not one that the model was trained for: {listed(names)}"
        )
    return {names.index(n): c for n, c in zip(dataset.class_names, dataset.category_ids, strict=True)}


def _to_coco(detections: ImageDetections, image_id: int, categories: dict[int, int]) -> list[dict[str, Any]]:
    corners = detections.boxes.float().cpu()
    boxes = torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], dim=1)
    rows = zip(boxes.tolist(), detections.scores.tolist(), detections.labels.tolist(), strict=True)
    return [
        {"image_id": image_id, "category_id": categories[label], "bbox": box, "score": score}
        for box, score, label in rows
        if label in categories
    ]


def _indexed(content: dict[str, Any]) -> COCO:
    coco = COCO()
    # pycocotools changes the annotations, so it gets a copy of those of the data set.
    coco.dataset = {**content, "annotations": [dict(annotation) for annotation in content["annotations"]]}
    coco.createIndex()
    return coco


@contextlib.contextmanager
def _evaluating(model: RetinaNet) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
