"""The pictures of an evaluation report: the ground truth of an image beside the detections in it."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from retinanet.detection.drawing import CORRECT, MISSED, WRONG, draw_boxes, resized, write_labels
from retinanet.detection.image_errors import ImageMatches

# Side in pixels of the longer side of each half.
_SIDE = 720
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
    several = len(class_names) > 1
    names = [class_names[label] if several else "" for label in matches.object_labels]
    left = _panel(image, matches.objects, [{1: CORRECT, 0: MISSED, -1: _CROWD}[c] for c in matches.found], names)
    texts = [
        f"{class_names[label]} {score:.2f}" if several else f"{score:.2f}"
        for label, score in zip(matches.labels, matches.scores, strict=True)
    ]
    colours = [{1: CORRECT, 0: WRONG, -1: _CROWD}[code] for code in matches.correct]
    right = _panel(image, matches.detections, colours, texts)
    picture = Image.new("RGB", (2 * left.width + _GAP, left.height), (255, 255, 255))
    picture.paste(left, (0, 0))
    picture.paste(right, (left.width + _GAP, 0))
    file = io.BytesIO()
    picture.save(file, format="JPEG", quality=_QUALITY)
    return file.getvalue()


def _panel(
    image: Tensor,
    bboxes: NDArray[Any],  # [N, 4] x, y, width, height
    colours: list[tuple[int, int, int]],
    texts: list[str],
) -> Image.Image:
    picture, factor = resized(image, _SIDE)
    boxes = torch.from_numpy(np.concatenate([bboxes[:, :2], bboxes[:, :2] + bboxes[:, 2:]], axis=1)) * factor
    draw_boxes(picture, boxes, colours)
    write_labels(picture, boxes, texts, colours)
    return picture
