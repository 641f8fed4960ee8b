"""Opening COCO data sets: what is read, cached and kept."""

import json
import pickle
import time
from pathlib import Path

import pytest
import torch
from dataset_cases import PHOTO, coco, folder, opened, with_annotation  # noqa: F401  fixture
from torch.utils.data import DataLoader

from retinanet.common.errors import DataError
from retinanet.data import open_dataset
from retinanet.data.images import read_image


def test_coco_is_read(folder: Path) -> None:
    dataset = opened(folder, coco())
    assert (dataset.class_names, dataset.category_ids) == (("bush", "tree"), (3, 7))
    assert (dataset.image_ids, dataset.sizes, len(dataset)) == ([10, 4], [(40, 60), (40, 60)], 2)
    image, target = dataset.load(0)
    assert image.dtype == torch.uint8 and image.shape == (3, 40, 60)
    assert torch.equal(image, read_image(folder / "a.png"))
    assert target["boxes"].tolist() == [[5, 6, 25, 16], [1.5, 2.5, 4.75, 6.5]]
    assert target["boxes"].dtype == torch.float32 and target["labels"].dtype == torch.int64
    assert target["labels"].tolist() == [1, 0]
    assert target["crowd_boxes"].tolist() == [[30, 0, 60, 40]]
    assert target["image_id"] == 10


@pytest.mark.parametrize(
    ("info", "end"), [({"description": "composed\nimages"}, " (composed\\nimages)"), ([1], ""), ({}, "")]
)
def test_the_summary_has_the_description_of_the_source(folder: Path, info: object, end: str) -> None:
    dataset = opened(folder, coco(info=info))
    assert dataset.description == end.strip(" ()")
    assert dataset.summary().endswith(f"1 images without boxes{end}")


def test_images_without_boxes_are_kept(folder: Path) -> None:
    _, target = opened(folder, coco()).load(1)
    assert target["boxes"].shape == (0, 4) and target["labels"].shape == (0,) and target["crowd_boxes"].shape == (0, 4)
    assert target["image_id"] == 4


def test_content_for_pycocotools_has_source_ids_and_no_annotation_zero(folder: Path) -> None:
    content = opened(folder, coco()).coco
    assert [entry["id"] for entry in content["annotations"]] == [1, 2, 3]
    assert [entry["category_id"] for entry in content["annotations"]] == [7, 3, 3]
    assert [entry["area"] for entry in content["annotations"]] == [150, 13, 1200]
    assert [entry["iscrowd"] for entry in content["annotations"]] == [0, 0, 1]
    assert content["images"][1] == {"id": 4, "file_name": "b.png", "height": 40, "width": 60}


def test_a_returned_target_can_be_changed_without_harm(folder: Path) -> None:
    dataset = opened(folder, coco())
    dataset.load(0)[1]["boxes"].zero_()
    assert dataset.load(0)[1]["boxes"].abs().sum() > 0


@pytest.mark.parametrize("cache_bytes", [0, 2**20])
def test_cached_or_not_the_data_is_the_same_in_worker_processes(folder: Path, cache_bytes: int) -> None:
    dataset = opened(folder, coco(), cache_bytes=cache_bytes)
    again = pickle.loads(pickle.dumps(dataset))
    loaded = list(DataLoader(again, batch_size=None, num_workers=1))
    for index, (image, target) in enumerate(loaded):
        assert torch.equal(image, dataset.load(index)[0])
        assert torch.equal(target["boxes"], dataset.load(index)[1]["boxes"])


def test_images_are_decoded_lazily_without_cache(folder: Path) -> None:
    dataset = opened(folder, coco(), cache_bytes=0)
    (folder / "a.png").unlink()
    with pytest.raises(DataError, match=r"a\.png: no such file$"):
        dataset.load(0)
    assert dataset.load(1)[0].shape == (3, 40, 60)


def test_images_dir(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "ann.json").write_text(json.dumps(coco()))
    assert len(open_dataset(tmp_path / "elsewhere" / "ann.json", folder)) == 2


@pytest.mark.parametrize("overhang", [0.25, 1.0])
def test_a_box_that_overhangs_by_up_to_a_pixel_is_clipped(folder: Path, overhang: float) -> None:
    dataset = opened(folder, with_annotation(bbox=[-overhang, 10, 60 + 2 * overhang, 30 + overhang]))
    assert dataset.load(0)[1]["boxes"].tolist() == [[0, 10, 60, 40]]
    assert dataset.coco["annotations"][0]["bbox"] == [0, 10, 60, 30]


def test_the_vendored_photograph() -> None:
    dataset = open_dataset(PHOTO.with_suffix(".xml"), voc_one_based=False)
    image, target = dataset.load(0)
    assert image.shape == (3, 400, 400) and dataset.class_names == ("Tree",)
    assert len(target["boxes"]) == 61 and target["boxes"][0].tolist() == [203, 67, 227, 90]


def test_an_interrupt_does_not_wait_for_the_other_images(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = [{"id": number, "file_name": f"{number}.png"} for number in range(600)]
    for image in images:
        (folder / str(image["file_name"])).symlink_to(folder / "a.png")
    started: list[Path] = []

    def slow(path: Path, _: int | None) -> torch.Tensor:
        started.append(path)
        time.sleep(0.01)
        return torch.zeros(3, 40, 60, dtype=torch.uint8)

    def interrupted(results, total: int):
        yield next(iter(results))
        raise KeyboardInterrupt

    monkeypatch.setattr("retinanet.data.opening.read_image", slow)
    with pytest.raises(KeyboardInterrupt):
        opened(folder, coco(images=images, annotations=[]), progress=interrupted)
    assert 0 < len(started) < 600
