"""Composed images: cut-outs of objects pasted on photographs, with the exact box of what remains visible of each.

All randomness comes from a `random.Random` of the caller, so an image depends on it, the inputs and the version of
Pillow alone.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

#: Share of the images that have no object.
EMPTY = 0.05
MAX_OBJECTS = 6
#: The longest side of an object, as a share of the image's side.
SCALE = (0.12, 0.5)
#: A cut-out is enlarged at most this much, because a blurred object would give itself away.
MAX_ENLARGEMENT = 2.0
MAX_ROTATION = 15.0  # Degrees, to either side.
#: Factors of brightness and saturation of an object; the background's brightness varies within the same bounds.
BRIGHTNESS, SATURATION = (0.8, 1.2), (0.7, 1.3)
#: Share of an object's pixels that the edge of the image and other objects leave visible.
MIN_VISIBLE = 0.6
#: Pixels of each side of a visible box.
MIN_SIDE = 8
#: A pixel belongs to an object if its alpha is at least this, which is more than half.
OPAQUE = 128
#: Alpha below this is the remainder of a shadow or of a soft brush, and counts as none.
_HAZE = 32
#: Attempts to place an object; it is left out if none succeeds.
_TRIES = 20


@dataclass(frozen=True)
class CutOut:
    """The picture of an object without its surroundings.

    Attributes:
        name: Name of the object's source.
        picture: RGBA, trimmed to the object.
    """

    name: str
    picture: Image.Image


class Placed(NamedTuple):
    """An object in a composed image.

    Attributes:
        label: Position of its class in the list of classes.
        name: Name of its cut-out.
        box: xyxy in whole pixels; it is tight around the visible pixels.
        area: Number of the visible pixels.
    """

    label: int
    name: str
    box: tuple[int, int, int, int]
    area: int


def trimmed(picture: Image.Image, longest: int) -> Image.Image:
    """Return a picture with transparency as RGBA, trimmed to its object.

    Args:
        picture: The picture, in any mode.
        longest: A longer side is reduced to this, in pixels.

    Raises:
        ValueError: No pixel is opaque.
    """
    picture = picture.convert("RGBA")
    alpha = picture.getchannel("A").point(lambda value: value if value >= _HAZE else 0)
    if not any(alpha.histogram()[OPAQUE:]):
        raise ValueError("no pixel is opaque")
    picture.putalpha(alpha)
    picture = picture.crop(alpha.getbbox())
    picture.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    return picture


def compose(
    photograph: Image.Image, classes: Sequence[Sequence[CutOut]], size: int, rng: random.Random
) -> tuple[Image.Image, list[Placed]]:
    """Paste random objects on a random crop of a photograph.

    All classes are equally likely, and so are all cut-outs of a class. A later object may cover a part of an earlier
    one, but at least `MIN_VISIBLE` of each remains visible: an object that would break this is placed anew, and left
    out if no attempt succeeds.

    Args:
        photograph: RGB, with sides of at least `MIN_SIDE` pixels.
        classes: The cut-outs of each class.
        size: Side of the image in pixels.
        rng: The source of randomness.

    Returns:
        The image, RGB, and its objects in the order in which they were pasted.
    """
    image = _background(photograph, size, rng)
    # 0 is the background, and k the pixels that show the k-th object.
    owners = np.zeros((size, size), dtype=np.uint8)
    sources: list[tuple[int, str]] = []
    totals: list[int] = []  # Opaque pixels of each object, hidden ones included.
    count = 0 if rng.random() < EMPTY else rng.randint(1, MAX_OBJECTS)
    for label in [rng.randrange(len(classes)) for _ in range(count)]:
        for _ in range(_TRIES):
            cut_out = classes[label][rng.randrange(len(classes[label]))]
            picture = _varied(cut_out.picture, size, rng)
            x, y = (rng.randint(-(side // 3), size - side + side // 3) for side in picture.size)
            placed = _with_object(owners, totals, picture, x, y)
            if placed is not None:
                owners, total = placed
                totals.append(total)
                sources.append((label, cut_out.name))
                image.paste(picture, (x, y), picture)
                break
    objects = []
    for number, (label, name) in enumerate(sources, start=1):
        mask = owners == number
        objects.append(Placed(label, name, _box(mask), int(mask.sum())))
    return image, objects


def _background(photograph: Image.Image, size: int, rng: random.Random) -> Image.Image:
    """Return a square crop of a photograph, resized, mirrored at random, and a little darker or brighter."""
    shortest = min(photograph.size)
    side = round(_log_uniform(max(shortest / 4, min(shortest, size / 2)), shortest, rng))
    x, y = (rng.randint(0, length - side) for length in photograph.size)
    crop = photograph.resize((size, size), Image.Resampling.LANCZOS, box=(x, y, x + side, y + side))
    if rng.random() < 0.5:
        crop = ImageOps.mirror(crop)
    return ImageEnhance.Brightness(crop).enhance(rng.uniform(*BRIGHTNESS))


def _varied(picture: Image.Image, size: int, rng: random.Random) -> Image.Image:
    """Return a cut-out turned a little, mirrored at random, in another size and colour; RGBA, trimmed."""
    longest = _log_uniform(SCALE[0] * size, SCALE[1] * size, rng)
    if rng.random() < 0.5:
        picture = ImageOps.mirror(picture)
    turned = picture.rotate(rng.uniform(-MAX_ROTATION, MAX_ROTATION), Image.Resampling.BICUBIC, expand=True)
    turned = turned.crop(turned.getchannel("A").getbbox())
    factor = min(longest / max(turned.size), MAX_ENLARGEMENT)
    width, height = (max(1, round(side * factor)) for side in turned.size)
    resized = turned.resize((width, height), Image.Resampling.LANCZOS)
    colours = ImageEnhance.Brightness(resized.convert("RGB")).enhance(rng.uniform(*BRIGHTNESS))
    result = ImageEnhance.Color(colours).enhance(rng.uniform(*SATURATION))
    result.putalpha(resized.getchannel("A"))
    return result


def _with_object(
    owners: np.ndarray,  # [S, S]
    totals: list[int],
    picture: Image.Image,
    x: int,
    y: int,
) -> tuple[np.ndarray, int] | None:
    """Return the owners of the pixels after an object is pasted, and its number of opaque pixels.

    Returns:
        None if too little of the object, or of one under it, would be visible.
    """
    size = len(owners)
    opaque = np.asarray(picture.getchannel("A")) >= OPAQUE  # [H, W]
    height, width = opaque.shape
    top, left = max(0, y), max(0, x)
    bottom, right = min(size, y + height), min(size, x + width)
    result = owners.copy()
    result[top:bottom, left:right][opaque[top - y : bottom - y, left - x : right - x]] = len(totals) + 1
    everyone = [*totals, int(opaque.sum())]
    if everyone[-1] == 0:
        return None
    visible = np.bincount(result.ravel(), minlength=len(everyone) + 1)[1:]
    if any(seen < MIN_VISIBLE * total for seen, total in zip(visible.tolist(), everyone, strict=True)):
        return None
    for number in range(1, len(everyone) + 1):
        x1, y1, x2, y2 = _box(result == number)
        if min(x2 - x1, y2 - y1) < MIN_SIDE:
            return None
    return result, everyone[-1]


def _box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Return the tight box of a mask `[S, S]` with at least one pixel, xyxy."""
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _log_uniform(low: float, high: float, rng: random.Random) -> float:
    return math.exp(rng.uniform(math.log(low), math.log(high)))
