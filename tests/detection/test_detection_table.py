"""Tables of detections: COCO results from columns, and shards that merge to what one process computes."""

from __future__ import annotations

import pytest
import torch
from evaluation_cases import random_case
from synthetic import rectangles, tiny_config

from retinanet.detection.coco_numbers import ENGINES
from retinanet.detection.detection_table import DetectionTable, merge_detections
from retinanet.detection.evaluate import detect_dataset, evaluate, evaluate_detections
from retinanet.model.network import RetinaNet


def table(seed: int = 0, images: int = 9) -> DetectionTable:
    content, detections = random_case(images, 3, 60, seed=seed)
    ids = ([entry["id"] for entry in content[key]] for key in ("images", "categories"))
    return DetectionTable.from_results(*ids, detections)


def test_a_table_is_a_list_of_results() -> None:
    content, detections = random_case(4, 3, 40, seed=1)
    ids = ([entry["id"] for entry in content[key]] for key in ("images", "categories"))
    got = DetectionTable.from_results(*ids, detections)
    assert len(got) == len(detections)
    assert list(got) == detections
    assert got[0] == detections[0] and got[-1] == detections[-1] and got[1:7:2] == detections[1:7:2]
    with pytest.raises(IndexError):
        got[len(got)]


@pytest.mark.parametrize("shards", [2, 3])
def test_shards_merge_in_the_order_of_the_data_set(shards: int) -> None:
    whole = merge_detections([table()])
    parts = [whole.take(whole.images % shards == rank) for rank in range(shards)]
    assert min(map(len, parts)) > 0
    for order in (parts, parts[::-1]):
        assert list(merge_detections(order)) == list(whole)
    # A distributed sampler repeats images to give every process equally many.
    padded = [*parts[:-1], whole.take((whole.images % shards == shards - 1) | (whole.images < 2))]
    assert list(merge_detections(padded)) == list(whole)


def test_tables_that_do_not_belong_together() -> None:
    with pytest.raises(ValueError, match="tables: expected at least one, got none"):
        merge_detections([])
    with pytest.raises(ValueError, match=r"tables\[1\]: its image_ids differ from those of tables\[0\]"):
        merge_detections([table(seed=0), table(seed=1)])


@pytest.mark.parametrize("ranks", [2, 3])
def test_processes_together_compute_what_one_process_does(tmp_path, ranks: int) -> None:
    dataset = rectangles(tmp_path, 7, size=64)
    torch.manual_seed(0)
    model = RetinaNet(tiny_config(score_threshold=0.0, max_detections=30)).eval()
    expected = evaluate(model, dataset)
    shards = [detect_dataset(model, dataset, indices=range(rank, len(dataset), ranks)) for rank in range(ranks)]
    for engine in ENGINES:
        result = evaluate_detections(dataset, merge_detections(shards), engine)
        assert list(result.detections) == list(expected.detections)
        assert result.stats == expected.stats
        assert result.curves.thresholds(model.config.class_names) == expected.curves.thresholds(
            model.config.class_names
        )
    assert len(expected.detections) == 7 * 30
