"""Composed images: the boxes are those of the pixels that show the objects.

The cut-outs have colours that the black background lacks, and keep them, so that the pixels of an image tell which
object they show.
"""

import random

import numpy as np
import pytest
from PIL import Image, ImageDraw

from retinanet.data import composing
from retinanet.data.composing import CutOut, Placed, compose, trimmed

SIZE = 160
BLACK = Image.new("RGB", (400, 300))
COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]


@pytest.fixture(autouse=True)
def _true_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(composing, "BRIGHTNESS", (1, 1))
    monkeypatch.setattr(composing, "SATURATION", (1, 1))
    monkeypatch.setattr(composing, "EMPTY", 0)


def ellipse(colour: tuple[int, int, int], size: tuple[int, int]) -> CutOut:
    """Return a filled ellipse that leaves a margin around it."""
    picture = Image.new("RGBA", (size[0] + 20, size[1] + 20))
    ImageDraw.Draw(picture).ellipse((10, 10, size[0] + 9, size[1] + 9), fill=(*colour, 255))
    return CutOut("ellipse", trimmed(picture, SIZE))


def rectangle(colour: tuple[int, int, int], size: tuple[int, int]) -> CutOut:
    return CutOut("rectangle", Image.new("RGBA", size, (*colour, 255)))


def box_and_area(mask: np.ndarray) -> tuple[tuple[int, ...], int]:
    ys, xs = np.nonzero(mask)
    return (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1), len(xs)


def test_boxes_are_tight_around_pixels_with_alpha_above_a_half(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(composing, "MAX_OBJECTS", 1)
    cut_outs = [[ellipse((255, 0, 0), (70, 40)), ellipse((255, 0, 0), (40, 90))]]
    soft = at_edge = 0
    for seed in range(60):
        image, (placed,) = compose(BLACK, cut_outs, SIZE, random.Random(seed))
        red = np.asarray(image)[..., 0]  # Over black, the red of a pixel is the alpha of the object.
        assert box_and_area(red >= 128) == (placed.box, placed.area)
        soft += ((red > 0) & (red < 255)).any()
        at_edge += min(placed.box) == 0 or max(placed.box) == SIZE
    assert soft == 60, "the edges are blended"
    assert 5 < at_edge < 55


def test_hidden_pixels_count_neither_for_the_box_nor_for_the_area(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(composing, "MAX_ROTATION", 0)
    monkeypatch.setattr(composing, "SCALE", (0.4, 0.4))
    monkeypatch.setattr(composing, "MAX_OBJECTS", 3)
    whole = round(0.4 * SIZE) * round(0.2 * SIZE)
    shares = []
    for seed in range(40):
        # One class has all colours, so each may come up several times; only objects of different colours are compared.
        classes = [[rectangle(colour, (100, 50))] for colour in COLOURS]
        image, objects = compose(BLACK, classes, SIZE, random.Random(seed))
        pixels = np.asarray(image)
        labels = [placed.label for placed in objects]
        for placed in objects:
            if labels.count(placed.label) == 1:
                mask = (pixels == COLOURS[placed.label]).all(axis=2)
                assert box_and_area(mask) == (placed.box, placed.area)
            shares.append(placed.area / whole)
    assert composing.MIN_VISIBLE <= min(shares) < 0.75, "objects are hidden, but never too much"
    assert max(shares) == 1 and sum(share < 1 for share in shares) > 20


def test_objects_that_would_be_hidden_too_much_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Objects of half the side, nearly wholly visible, have room for four at most."""
    monkeypatch.setattr(composing, "SCALE", (0.5, 0.5))
    monkeypatch.setattr(composing, "MIN_VISIBLE", 0.95)
    monkeypatch.setattr(composing, "MAX_OBJECTS", 12)
    counts = [len(compose(BLACK, [[rectangle(COLOURS[0], (90, 90))]], SIZE, random.Random(s))[1]) for s in range(3)]
    assert min(counts) >= 1 and max(counts) <= 4


def test_small_cut_outs_are_not_enlarged_much_and_thin_ones_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(composing, "MAX_ROTATION", 0)
    boxes = [
        placed.box
        for seed in range(20)
        for placed in compose(BLACK, [[rectangle(COLOURS[0], (20, 20))]], SIZE, random.Random(seed))[1]
    ]
    assert max(x2 - x1 for x1, _, x2, _ in boxes) == 40
    assert all(not compose(BLACK, [[rectangle(COLOURS[0], (100, 3))]], SIZE, random.Random(s))[1] for s in range(5))


def test_classes_are_equally_likely_whatever_the_number_of_their_cut_outs() -> None:
    classes = [[rectangle(COLOURS[0], (50, 50))], [rectangle(COLOURS[1], (50, 50))] * 9]
    labels = [placed.label for s in range(60) for placed in compose(BLACK, classes, SIZE, random.Random(s))[1]]
    assert 0.4 < np.mean(labels) < 0.6 and len(labels) > 100


def test_the_numbers_of_objects(monkeypatch: pytest.MonkeyPatch) -> None:
    def counts() -> set[int]:
        classes = [[rectangle(COLOURS[0], (20, 20))]]
        return {len(compose(BLACK, classes, SIZE, random.Random(s))[1]) for s in range(40)}

    assert counts() == {1, 2, 3, 4, 5, 6}
    monkeypatch.setattr(composing, "EMPTY", 1)
    assert counts() == {0}


def test_colours_and_backgrounds_vary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    photograph = Image.linear_gradient("L").convert("RGB")
    images: list[np.ndarray] = []
    for seed in range(2):
        image, objects = compose(photograph, [[rectangle((200, 40, 40), (80, 80))]], SIZE, random.Random(seed))
        x1, y1, x2, y2 = objects[-1].box
        images.append(np.asarray(image))
        assert tuple(images[-1][(y1 + y2) // 2, (x1 + x2) // 2]) != (200, 40, 40)
    assert (images[0] != images[1]).any()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_cut_outs_are_trimmed_to_the_object_without_haze(mode: str) -> None:
    picture = Image.new("RGBA", (60, 50), (9, 9, 9, 20))
    picture.paste((200, 200, 200, 255), (10, 5, 40, 45))
    result = trimmed(picture.convert(mode), 100)
    assert result.mode == "RGBA" and result.size == (30, 40)
    assert trimmed(picture, 20).size == (15, 20)


def test_a_cut_out_without_an_opaque_pixel() -> None:
    with pytest.raises(ValueError, match="no pixel is opaque"):
        trimmed(Image.new("RGBA", (9, 9), (1, 2, 3, 127)), 100)


def test_the_same_seed_gives_the_same_image() -> None:
    def once(seed: int) -> tuple[bytes, list[Placed]]:
        image, objects = compose(BLACK, [[ellipse(COLOURS[0], (70, 40))]], SIZE, random.Random(seed))
        return image.tobytes(), objects

    assert once(3) == once(3) != once(4)
