"""How well anchors fit the boxes of a data set."""

import json
from collections.abc import Sequence

import pytest
import torch
from PIL import Image
from synthetic import CATEGORY_IDS, CLASS_NAMES, tiny_config

import retinanet_ops as ops
from retinanet import RetinaNet
from retinanet.data import DetectionDataset, open_dataset
from retinanet.training.anchor_reach import best_anchor_ious


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> DetectionDataset:
    """Return images of two sizes with random boxes, one of them a crowd."""
    folder, rng = tmp_path_factory.mktemp("reach"), torch.Generator().manual_seed(0)
    images, annotations = [], []
    for image_id in range(5):
        size = (90, 60) if image_id % 2 else (64, 100)
        Image.new("RGB", size).save(folder / f"{image_id}.png")
        images.append({"id": image_id, "file_name": f"{image_id}.png"})
        for _ in range(image_id):
            x, y, width, height = (torch.rand(4, generator=rng) * 30 + 1).tolist()
            entry = {"image_id": image_id, "category_id": CATEGORY_IDS[0], "bbox": [x, y, width, height]}
            annotations.append(entry | {"iscrowd": int(len(annotations) == 3)})
    categories = [{"id": i, "name": n} for i, n in zip(CATEGORY_IDS, CLASS_NAMES, strict=True)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "ann.json").write_text(json.dumps(content))
    return open_dataset(folder / "ann.json")


@pytest.mark.parametrize("min_size", [None, (128,)])
def test_ious_are_those_with_the_anchors_of_the_network(dataset: DetectionDataset, min_size: tuple | None) -> None:
    config = tiny_config(min_size=min_size, max_size=150)
    network = RetinaNet(config).eval()
    expected = []
    for index in range(len(dataset)):
        image, target = dataset.load(index)
        if len(target["boxes"]):
            batch = network.prepare([image], [target])
            assert batch.ground_truth is not None
            with torch.no_grad():
                grid = network.anchor_grid(batch.pixels, network.heads(batch.pixels))
            expected.append(ops.box_iou(batch.ground_truth.boxes[0], grid.boxes()).amax(dim=1))
    result = best_anchor_ious(config, dataset)
    assert len(result) == len(dataset.boxes) - 1
    torch.testing.assert_close(result.sort().values, torch.cat(expected).sort().values)


@pytest.mark.parametrize(("count", "indices"), [(1, [2]), (3, [0, 2, 4]), (4, [0, 1, 3, 4]), (9, range(5))])
def test_a_part_of_the_images(dataset: DetectionDataset, count: int, indices: Sequence[int]) -> None:
    boxes = sum(len(dataset.boxes_of(index)) for index in indices)
    assert len(best_anchor_ious(tiny_config(), dataset, max_images=count)) == boxes


def test_images_that_vanish_have_no_boxes_to_match(dataset: DetectionDataset) -> None:
    assert len(best_anchor_ious(tiny_config(min_size=(128,), max_size=1), dataset)) == 0
