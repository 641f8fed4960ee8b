"""The pictures of reports and comparisons: the ground truth of an image beside the detections in it."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from retinanet.detection.drawing import CORRECT, MISSED, TRUTH, WRONG, draw_boxes, resized, write_labels
from retinanet.detection.image_errors import ImageMatches

# Side in pixels of the longer side of each half.
_SIDE = 720
_TITLE_SIZE = 14
_GAP = 12
_CROWD = (150, 150, 150)
_QUALITY = 85


def error_picture(
    image: Tensor,  # [3, H, W] uint8
    matches: ImageMatches,
    class_names: Sequence[str],
) -> bytes:
    """Return a JPEG with the ground truth of an image on the left and the detections in it on the right.

    Objects that were found and correct detections are green, missed objects are yellow, wrong detections are red, and
    crowds and detections of crowds are grey. With several classes, each box has the name of its class.

    Args:
        image: The image, RGB.
        matches: The boxes, in pixels of the image.
        class_names: Names of the classes in the order of their ids.
    """
    colours = [{1: CORRECT, 0: MISSED, -1: _CROWD}[code] for code in matches.found]
    left = _objects(image, matches, class_names, colours, _SIDE)
    return _side_by_side([left, _detections(image, matches, class_names, _SIDE)])


def model_pictures(
    image: Tensor,  # [3, H, W] uint8
    matches: Sequence[ImageMatches],
    titles: Sequence[str],
    class_names: Sequence[str],
    side: int,
) -> bytes:
    """Return a JPEG with the ground truth of an image, and beside it the detections of several models.

    Objects are white, correct detections are green, wrong ones are red, and detections of crowds are grey. With several
    classes, each box has the name of its class.

    Args:
        image: The image, RGB.
        matches: The boxes of each model, in pixels of the image.
        titles: What the picture calls each model.
        class_names: Names of the classes in the order of their ids.
        side: Longer side of each part of the picture, in pixels.
    """
    colours = [TRUTH if code >= 0 else _CROWD for code in matches[0].found]
    panels = [("ground truth", _objects(image, matches[0], class_names, colours, side))]
    panels += [(t, _detections(image, m, class_names, side)) for t, m in zip(titles, matches, strict=True)]
    return _side_by_side([_titled(panel, title) for title, panel in panels])


def _objects(
    image: Tensor, matches: ImageMatches, class_names: Sequence[str], colours: list[tuple[int, int, int]], side: int
) -> Image.Image:
    names = [class_names[label] if len(class_names) > 1 else "" for label in matches.object_labels]
    return _panel(image, matches.objects, colours, names, side)


def _detections(image: Tensor, matches: ImageMatches, class_names: Sequence[str], side: int) -> Image.Image:
    texts = [
        f"{class_names[label]} {score:.2f}" if len(class_names) > 1 else f"{score:.2f}"
        for label, score in zip(matches.labels, matches.scores, strict=True)
    ]
    colours = [{1: CORRECT, 0: WRONG, -1: _CROWD}[code] for code in matches.correct]
    return _panel(image, matches.detections, colours, texts, side)


def _side_by_side(panels: Sequence[Image.Image]) -> bytes:
    """Return pictures of one size as a JPEG, from left to right."""
    width, height = panels[0].size
    picture = Image.new("RGB", (len(panels) * (width + _GAP) - _GAP, height), (255, 255, 255))
    for index, panel in enumerate(panels):
        picture.paste(panel, (index * (width + _GAP), 0))
    file = io.BytesIO()
    picture.save(file, format="JPEG", quality=_QUALITY)
    return file.getvalue()


def _titled(panel: Image.Image, title: str) -> Image.Image:
    """Return a picture with a title above it, which is cut at the width of the picture."""
    font = ImageFont.load_default(_TITLE_SIZE)
    result = Image.new("RGB", (panel.width, panel.height + 2 * _TITLE_SIZE), (255, 255, 255))
    ImageDraw.Draw(result).text((2, _TITLE_SIZE // 3), title, font=font, fill=(0, 0, 0))
    result.paste(panel, (0, 2 * _TITLE_SIZE))
    return result


def _panel(
    image: Tensor,
    bboxes: NDArray[Any],  # [N, 4] x, y, width, height
    colours: list[tuple[int, int, int]],
    texts: list[str],
    side: int,
) -> Image.Image:
    picture, factor = resized(image, side)
    boxes = torch.from_numpy(np.concatenate([bboxes[:, :2], bboxes[:, :2] + bboxes[:, 2:]], axis=1)) * factor
    draw_boxes(picture, boxes, colours)
    write_labels(picture, boxes, texts, colours)
    return picture
