"""The twelve COCO numbers: known cases, category ids of the data set, and no printing."""

from __future__ import annotations

import copy
import gc
import tracemalloc
import weakref

import pytest
import torch
from synthetic import CATEGORY_IDS, rectangles, tiny_config
from torch import Tensor, nn

from retinanet.common.errors import DataError
from retinanet.detection.coco_numbers import STAT_NAMES, coco_stats
from retinanet.detection.evaluate import detect_dataset, evaluate
from retinanet.model.network import RetinaNet


class Oracle(RetinaNet):
    """A model that returns the objects of the data set in order, shifted by some pixels."""

    def __init__(self, dataset, shift: float = 0.0, **changes: object) -> None:
        super().__init__(tiny_config(**changes))
        self.truth = [dataset.load(i)[1] for i in range(len(dataset))]
        self.shift = shift
        self.seen: list[int] = []

    def forward(self, images, targets=None) -> list[dict[str, Tensor]]:
        detections = []
        for image in images:
            assert image.is_floating_point() and 0 <= image.min() and image.max() <= 1
            target = self.truth[len(self.seen)]
            self.seen.append(target["image_id"])
            scores = torch.linspace(0.9, 0.5, len(target["labels"]))
            detections.append({"boxes": target["boxes"] + self.shift, "scores": scores, "labels": target["labels"]})
        return detections


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory):
    return rectangles(tmp_path_factory.mktemp("evaluation"), 5)


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_perfect_detections(dataset, capsys, batch_size: int) -> None:
    before = copy.deepcopy(dataset.coco)
    result = evaluate(Oracle(dataset).train(), dataset, batch_size=batch_size)
    assert tuple(result.stats) == STAT_NAMES
    for name in ("AP", "AP50", "AP75", "AR100"):
        assert result.stats[name] == pytest.approx(1.0)
    assert result.stats["APl"] == -1  # nothing is that large
    assert {d["category_id"] for d in result.detections} == set(CATEGORY_IDS)
    assert [d["image_id"] for d in result.detections] == [a["image_id"] for a in dataset.coco["annotations"]]
    expected = dataset.coco["annotations"][0]["bbox"]
    assert result.detections[0]["bbox"] == pytest.approx(expected)
    assert capsys.readouterr() == ("", "")
    assert dataset.coco == before


def test_shifted_detections_fail_the_strict_thresholds(dataset) -> None:
    stats = evaluate(Oracle(dataset, shift=2.0), dataset).stats
    assert stats["AP50"] == pytest.approx(1.0)
    assert 0.1 < stats["AP"] < 0.9


def test_known_precision() -> None:
    truth = {
        "images": [{"id": 1, "width": 100, "height": 100}],
        "categories": [{"id": 5, "name": "a"}],
        "annotations": [
            {"id": i, "image_id": 1, "category_id": 5, "bbox": [20 * i, 0, 10, 10], "area": 100, "iscrowd": 0}
            for i in (1, 2)
        ],
    }
    right = {"image_id": 1, "category_id": 5, "bbox": [20, 0, 10, 10], "score": 0.5}
    wrong = {"image_id": 1, "category_id": 5, "bbox": [60, 50, 10, 10], "score": 0.9}
    # A false positive first, then half of the objects: precision 1/2 up to recall 1/2, that is 51 of 101 points.
    assert coco_stats(truth, [wrong, right])["AP"] == pytest.approx(0.5 * 51 / 101)
    assert coco_stats(truth, [right])["AP"] == pytest.approx(51 / 101)
    assert coco_stats(truth, [right])["AR100"] == pytest.approx(0.5)


def test_no_detections_and_no_objects(dataset) -> None:
    stats = coco_stats(dataset.coco, [])
    assert stats["AP"] == 0 and stats["AR100"] == 0
    stats = coco_stats({**dataset.coco, "annotations": []}, [])
    assert set(stats.values()) == {-1}


def test_model_keeps_its_mode_and_needs_no_gradient(dataset) -> None:
    model = RetinaNet(tiny_config(score_threshold=0.0, max_detections=5)).train()
    statistics = model.backbone.body.bn1.running_mean.clone()
    result = evaluate(model, dataset, batch_size=2)
    assert model.training
    assert torch.equal(model.backbone.body.bn1.running_mean, statistics)
    assert len(result.detections) == 5 * len(dataset)
    assert all(isinstance(m, nn.Module) and m.training for m in model.modules())
    single = evaluate(model, dataset, batch_size=1)
    assert [d["image_id"] for d in single.detections] == [d["image_id"] for d in result.detections]


def test_memory_holds_one_batch_and_the_detections(dataset) -> None:
    repeats, per_image, batch_size = 60, 40, 3
    alive: list[weakref.ref[Tensor]] = []

    class Model(RetinaNet):
        def forward(self, images, targets=None) -> list[dict[str, Tensor]]:
            alive.extend(weakref.ref(image) for image in images)
            assert sum(reference() is not None for reference in alive) <= batch_size
            boxes = torch.tensor([[1.0, 1, 9, 9]]).expand(per_image, 4)
            one = {"boxes": boxes, "scores": torch.ones(per_image), "labels": torch.zeros(per_image, dtype=torch.int64)}
            return [one] * len(images)

    model = Model(tiny_config())
    indices = list(range(len(dataset))) * repeats
    detect_dataset(model, dataset, indices=indices[:6], batch_size=batch_size)
    gc.collect()
    tracemalloc.start()
    try:
        table = detect_dataset(model, dataset, indices=indices, batch_size=batch_size)
        gc.collect()
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(table) == len(indices) * per_image
    assert kept < 40 * len(table)  # 28 bytes in the arrays; a dict takes more than 500
    assert len(alive) == len(indices) + 6


@pytest.mark.parametrize("engine", ["coco", "", None])
def test_unknown_engine_is_refused_before_the_detection(dataset, engine) -> None:
    with pytest.raises(ValueError, match="engine: expected pycocotools or hotcoco, got"):
        evaluate(Oracle(dataset), dataset, engine=engine)


def test_curves_and_thresholds(dataset) -> None:
    result = evaluate(Oracle(dataset), dataset, engine="hotcoco")
    assert result.stats == evaluate(Oracle(dataset), dataset).stats
    best = result.curves.overall.best_threshold()
    assert best is not None and result.curves.overall.at(best).f1 == 1
    thresholds = result.curves.thresholds(("blue", "green", "red"))
    assert thresholds is not None and thresholds.by_class[1] is None and None not in thresholds.by_class[::2]


def test_labels_are_matched_by_name(dataset) -> None:
    model = Oracle(dataset, class_names=("green", "blue", "red"), category_ids=(1, 2, 3))
    for target in model.truth:
        target["labels"] = 2 - target["labels"]  # red is 2, blue is 1 in this model
    model.truth[0] = {k: torch.cat([v, v[:1]]) if isinstance(v, Tensor) else v for k, v in model.truth[0].items()}
    model.truth[0]["labels"][-1] = 0  # a class that the data set does not have
    result = evaluate(model, dataset)
    assert result.stats["AP"] == pytest.approx(1.0)
    assert len(result.detections) == len(dataset.coco["annotations"])


def test_unknown_class_of_the_data_set(dataset) -> None:
    model = RetinaNet(tiny_config(class_names=("red", "green")))
    with pytest.raises(
        DataError, match="annotations.json: class 'blue' is not one that the model was trained for: red"
    ):
        evaluate(model, dataset)
