"""The summary before training: sizes, the smallest object, steps, and warnings of choices that are probably wrong."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from synthetic import rectangles

from retinanet.data import DetectionDataset, TrainTransform
from retinanet.data.records import BoxRecord
from retinanet.model.config import RetinaNetConfig
from retinanet.model.preprocessing import Preprocessing
from retinanet.training.options import TrainOptions
from retinanet.training.summary import describe_training, seen_sizes, size_warnings

CONFIG = RetinaNetConfig()
OPTIONS = TrainOptions(epochs=3, batch_size=4, evaluate_every=2)


class Pictures:
    """The part of a data set that the summary reads."""

    def __init__(self, *sizes: tuple[int, int], boxes: tuple[tuple[float, float], ...] = ((40.0, 40.0),)) -> None:
        self.sizes = list(sizes)
        self.image_ids = list(range(len(sizes)))
        self.boxes = [BoxRecord(0, 0, (1.0, 1.0, 1 + w, 1 + h), w * h, False) for w, h in boxes]

    def __len__(self) -> int:
        return len(self.sizes)

    def boxes_of(self, index: int) -> torch.Tensor:
        return torch.tensor([record.box for record in self.boxes if record.image_id == index]).reshape(-1, 4)


def summary(
    train: Pictures, val: Pictures | None = None, options: TrainOptions = OPTIONS, **config: object
) -> list[str]:
    return describe_training(replace(CONFIG, **config), options, train, val)  # type: ignore[arg-type]


def warnings(train: Pictures, val: Pictures | None, transform: TrainTransform, **config: object) -> list[str]:
    options = replace(OPTIONS, transform=transform)
    return size_warnings(replace(CONFIG, **config), options, train, val)  # type: ignore[arg-type]


def test_small_pictures_are_enlarged_with_a_word() -> None:
    assert summary(Pictures(*[(192, 192)] * 10), Pictures((192, 192))) == [
        "the network sees pictures of 192 x 192 pixels at 800 x 800, enlarged 4.2 times; --min-size 0 leaves them as "
        "they are, for 1/17 of the work in a step",
        "the smallest objects that it can match have about 5 x 5 pixels in the pictures",
        "3 epochs of 3 steps with 4 pictures each: 9 steps, and an evaluation after every 2 epochs",
    ]


def test_pictures_of_several_sizes_and_without_resizing() -> None:
    mixed = Pictures((1000, 4000), (400, 400), (600, 800), boxes=((20.0, 20.0), (500.0, 5.0)))
    assert summary(mixed)[:2] == [
        "the network sees pictures of 400 x 400 to 4000 x 1000 pixels at 1333 x 333 to 1066 x 800, enlarged "
        "1.3 times in the median; --min-size 0 leaves them as they are, for 1/2 of the work in a step",
        "the smallest objects that it can match have about 17 x 17 pixels in the pictures; 100.0 % of the boxes reach "
        "an IoU of 0.5 with no anchor (see --anchor-sizes, --aspect-ratios and --min-size)",
    ]
    assert summary(mixed, min_size=None)[0] == (
        "the network sees pictures of 400 x 400 to 4000 x 1000 pixels as they are"
    )


def test_crops_are_resized_as_well() -> None:
    options = replace(OPTIONS, transform=TrainTransform(crop=400, scale=(0.5, 2.0)))
    lines = summary(Pictures((1600, 1600)), Pictures((1600, 1600)), options)
    assert lines[0].startswith("the network sees training crops of 400 x 400 pixels at 800 x 800, enlarged 2.0 times")
    assert lines[1] == (
        "the network sees validation pictures of 1600 x 1600 pixels at 800 x 800, reduced to 0.50 of their size"
    )


def test_the_sizes_are_those_of_the_preprocessing(tmp_path: Path) -> None:
    data: DetectionDataset = rectangles(tmp_path, 1, size=90)
    for config in (replace(CONFIG, min_size=(64, 120)), replace(CONFIG, min_size=(800,), max_size=300)):
        transform = Preprocessing(config).eval()
        for size in (data.sizes[0], (60, 200), (333, 100)):
            image, _ = transform.resize(torch.zeros(3, *size))
            assert image.shape[1:] == seen_sizes(config, [size]).network[0]


def test_the_smallest_object_has_the_required_overlap() -> None:
    # The smallest anchors have 32 x 32 pixels: a square of 23 has an IoU of 0.52 with one, and of 22 one of 0.47.
    for side, fits in ((23.0, True), (22.0, False)):
        pictures = Pictures((800, 800), boxes=((side, side),))
        centre = 400.0  # a multiple of the stride, at which anchors are centred
        x1, x2 = centre - side / 2, centre + side / 2
        pictures.boxes = [BoxRecord(0, 0, (x1, x1, x2, x2), side * side, False)]
        line = summary(pictures)[1]
        assert ("% of the boxes" not in line) is fits and "about 23 x 23 pixels" in line


def test_a_crop_larger_than_the_pictures() -> None:
    small = Pictures((192, 180), (100, 192))
    assert warnings(small, None, TrainTransform(crop=5000)) == [
        "--crop 5000: nothing is cropped, because no training picture has a side of more than 192 pixels"
    ]
    assert warnings(small, None, TrainTransform(crop=191)) == []
    assert warnings(small, None, TrainTransform(crop=300, scale=(1.0, 2.0))) == []


@pytest.mark.parametrize(("min_size", "times"), [((800,), "4.0"), (None, "")])
def test_objects_of_another_size_in_validation(min_size: tuple[int, ...] | None, times: str) -> None:
    large = Pictures((1600, 1600))
    found = warnings(large, large, TrainTransform(crop=400), min_size=min_size)
    expected = (
        f"objects are {times} times as large in training as in validation, because crops and whole pictures are "
        "resized to the same size; --min-size 0 resizes neither"
    )
    assert found == ([expected] if times else [])
