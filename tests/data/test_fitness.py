"""Data sets that can be read and not be used: nothing to learn, no metric, images that resizing makes vanish."""

from pathlib import Path

import pytest
from dataset_cases import coco, folder, opened, with_annotation, write_image  # noqa: F401  fixture

from retinanet.common.errors import DataError
from retinanet.data.fitness import check_learnable, check_measurable, check_resizable


def message(check, *arguments) -> str:
    with pytest.raises(DataError) as caught:
        check(*arguments)
    return str(caught.value)


def test_nothing_to_learn_from(folder: Path) -> None:
    source = folder / "ann.json"
    crowd = opened(folder, with_annotation(iscrowd=1))
    reason = "all 1 boxes are marked iscrowd or difficult, which neither training nor evaluation counts"
    remedy = "unmark the objects to detect"
    assert message(check_learnable, crowd) == f"{source}: nothing to learn from: {reason}; {remedy}"
    undefined = f"{source}: AP50 is undefined on this validation set: "
    assert message(check_measurable, crowd, "AP50") == f"{undefined}{reason}; {remedy}"
    empty = opened(folder, coco(annotations=[]))
    assert message(check_learnable, empty) == f"{source}: nothing to learn from: none of the 2 images has a box"
    assert message(check_measurable, empty, "AP50") == f"{undefined}none of the 2 images has a box"
    check_learnable(opened(folder, coco()))


def test_a_metric_of_one_size_needs_objects_of_that_size(folder: Path) -> None:
    write_image(folder / "c.png", 400, 300)
    images = [{"id": 1, "file_name": "c.png"}]
    for metric, side in (("APs", 31), ("ARm", 60), ("APl", 97)):
        box = {"id": 1, "image_id": 1, "category_id": 7, "bbox": [5, 6, side, side]}
        fitting = opened(folder, coco(images=images, annotations=[box]))
        check_measurable(fitting, metric)
        for other in {"APs", "APm", "APl"} - {metric.replace("AR", "AP")}:
            text = message(check_measurable, fitting, other)
            assert f": {other} is undefined on this validation set: no object is " in text
            assert text.endswith("pixels; choose another metric")
        check_measurable(fitting, "AP")


def test_images_that_resizing_makes_vanish(folder: Path) -> None:
    write_image(folder / "a.png", 1000, 2)
    write_image(folder / "b.png", 2, 3000)
    images = [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "b.png"}]
    box = {"id": 1, "image_id": 1, "category_id": 7, "bbox": [5, 0, 100, 2]}
    dataset = opened(folder, coco(images=images, annotations=[box]))

    def vanishes(height: int, width: int) -> bool:
        return min(height, width) * 400 < max(height, width)

    text = message(check_resizable, dataset, vanishes, 400)
    assert text.startswith(f"{folder}/ann.json: {folder}/a.png: 1000 x 2 pixels are too elongated: resizing to the ")
    assert "less than one pixel (2 such images); cut it with `retinanet tile`" in text
    check_resizable(dataset, vanishes, 400, 800)  # Crops of 800 pixels have at most 800 x 2.
    # At half the size, 1600 x 2 pixels become a crop of 800 x 1.
    message(check_resizable, dataset, vanishes, 400, 800, 0.5)
