"""Augmentation: boxes follow the pixels, and only the generator decides the result."""

import pytest
import torch

from retinanet.data import TrainTransform


def marked_sample() -> tuple[torch.Tensor, dict]:
    """Return a black image with coloured rectangles, which their boxes must still frame after any transform."""
    image = torch.zeros(3, 120, 160, dtype=torch.uint8)
    boxes = torch.tensor([[10, 20, 50, 60], [80, 30, 140, 50], [100, 70, 120, 110.0]])
    for channel, (x1, y1, x2, y2) in enumerate(boxes.int().tolist()):
        image[channel, y1:y2, x1:x2] = 255
    return image, {
        "boxes": boxes,
        "labels": torch.tensor([0, 1, 2]),
        "crowd_boxes": torch.tensor([[0, 0, 9, 9.0]]),
        "image_id": 3,
    }


def extent(mask: torch.Tensor) -> list[int]:
    rows, columns = mask.any(dim=1).nonzero().flatten(), mask.any(dim=0).nonzero().flatten()
    return [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("crop", [None, 96])
def test_boxes_follow_the_pixels(seed: int, crop: int | None) -> None:
    transform = TrainTransform(0.5, 0.5, True, (0.6, 1.6), crop, min_visible=0.01)
    image, target = transform(*marked_sample(), torch.Generator().manual_seed(seed))
    assert image.dtype == torch.uint8 and image.is_contiguous()
    for box, label in zip(target["boxes"], target["labels"], strict=True):
        visible = torch.tensor(extent(image[label] > 127), dtype=torch.float32)
        assert (visible - box).abs().max() <= 1.0


@pytest.mark.parametrize("quarter", range(4))
def test_flips_and_turns_are_exact(quarter: int) -> None:
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        draw = torch.rand(12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        if int(draw[5] * 4) == quarter:
            break
    image, target = TrainTransform(1.0, 1.0, True)(*marked_sample(), generator)
    for box, label in zip(target["boxes"], target["labels"], strict=True):
        assert extent(image[label] > 0) == box.tolist()
    assert image.shape[1:] == ((120, 160) if quarter % 2 == 0 else (160, 120))


def test_only_the_generator_decides_the_result() -> None:
    transform = TrainTransform(0.5, 0.5, True, (0.7, 1.4), 64, brightness=0.3, contrast=0.3, saturation=0.3, hue=0.1)
    sample = marked_sample()
    results = []
    for global_seed in (1, 2):
        torch.manual_seed(global_seed)
        results.append([transform(*sample, torch.Generator().manual_seed(seed)) for seed in range(6)])
    for (image, target), (other_image, other) in zip(*results, strict=True):
        assert torch.equal(image, other_image)
        assert torch.equal(target["boxes"], other["boxes"]) and torch.equal(target["labels"], other["labels"])
    assert len({image.sum().item() for image, _ in results[0]}) > 1
    assert torch.equal(sample[0], marked_sample()[0]) and torch.equal(sample[1]["boxes"], marked_sample()[1]["boxes"])


def test_crop_drops_what_is_hardly_visible_and_clips_the_rest() -> None:
    image = torch.zeros(3, 100, 100, dtype=torch.uint8)
    boxes = torch.tensor([[x, 0.0, x + 10, 10] for x in range(0, 100, 2)][:46])
    target = {"boxes": boxes, "labels": torch.arange(len(boxes)), "crowd_boxes": boxes.clone()}
    transform = TrainTransform(0.0, crop=50, min_visible=0.5)
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        draw = torch.rand(12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        left, top = int(draw[1] * 51), int(draw[2] * 51)
        _, result = transform(image, target, generator)
        inside = (boxes[:, 2].clamp(max=left + 50) - boxes[:, 0].clamp(min=left)).clamp(min=0)
        seen = inside * max(0, 10 - top)
        assert result["labels"].tolist() == (seen >= 50).nonzero().flatten().tolist()
        assert len(result["crowd_boxes"]) == int((seen > 0).sum())
        if len(result["boxes"]):
            assert result["boxes"].min() >= 0 and result["boxes"].max() <= 50


@pytest.mark.parametrize("scale", [(1.0, 1.0), (0.5, 2.0)])
def test_a_crop_on_an_object_holds_its_centre(scale: tuple[float, float]) -> None:
    image = torch.zeros(3, 300, 400, dtype=torch.uint8)
    image[:, 20:31, 380:391] = 255
    target = {"boxes": torch.tensor([[380.0, 20, 391, 31]]), "labels": torch.tensor([0])}
    places = set()
    for seed in range(40):
        transform = TrainTransform(0.0, scale=scale, crop=40, crop_on_object=1.0, min_visible=0.0)
        cropped, result = transform(image, target, torch.Generator().manual_seed(seed))
        assert max(cropped.shape[1:]) <= 40 and len(result["boxes"]) == 1
        assert cropped.amax() > 127
        places.add(tuple(result["boxes"][0].tolist()))
    assert len(places) > 10


def test_crops_on_objects_of_an_image_without_any() -> None:
    target = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    image = torch.zeros(3, 60, 60, dtype=torch.uint8)
    cropped, _ = TrainTransform(crop=40, crop_on_object=1.0)(image, target, torch.Generator().manual_seed(0))
    assert cropped.shape[1:] == (40, 40)


def test_a_crop_larger_than_the_image_keeps_all_of_it() -> None:
    image, target = TrainTransform(0.0, crop=500)(*marked_sample(), torch.Generator().manual_seed(0))
    assert torch.equal(image, marked_sample()[0]) and torch.equal(target["boxes"], marked_sample()[1]["boxes"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": (0, 1)}, r"scale: expected 0 < smallest <= largest, got \(0, 1\)"),
        ({"crop": 0}, "crop: expected an integer of at least 1, or none, got 0"),
        ({"crop": 9, "crop_on_object": -0.1}, "crop_on_object: expected a number in 0..1, got -0.1"),
        ({"crop_on_object": 0.5}, "crop_on_object: expected 0 without a crop, got 0.5"),
        ({"horizontal_flip": 1.5}, "horizontal_flip: expected a number in 0..1, got 1.5"),
        ({"hue": 0.7}, "hue: expected a number in 0..0.5, got 0.7"),
    ],
)
def test_wrong_augmentation(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainTransform(**options)
