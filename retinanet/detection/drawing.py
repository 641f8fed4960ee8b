"""Pictures of detections, and curves of training runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

from retinanet.common.files import replacing

# Comparisons whose longer side is below this many pixels are enlarged, so that labels fit beside small boxes.
_SMALL_PICTURE = 800
# Labels and lines grow with the square root of the picture's longer side: 12 and 2 pixels for a side of 800.
_FONT_SCALE, _LINE_SCALE = 0.42, 0.07
_SMALLEST_FONT = 9
_PALETTE = (
    (255, 225, 25),
    (0, 220, 255),
    (255, 110, 200),
    (130, 255, 90),
    (255, 150, 40),
    (190, 140, 255),
    (255, 80, 80),
    (110, 170, 255),
    (170, 255, 195),
    (230, 190, 140),
)
#: Colours of objects, correct detections, wrong detections and missed objects.
TRUTH, CORRECT, WRONG, MISSED = (255, 255, 255), (60, 230, 90), (255, 90, 60), (255, 225, 25)


def class_colours(count: int) -> list[tuple[int, int, int]]:
    """Return a bright colour for each class. The colours repeat after ten classes."""
    return [_PALETTE[index % len(_PALETTE)] for index in range(count)]


def draw_detections(
    image: Tensor,  # [3, H, W] uint8
    boxes: Tensor,  # [D, 4]
    scores: Tensor,  # [D]
    labels: Tensor,  # [D] int64
    class_names: Sequence[str],
) -> Image.Image:
    """Draw boxes in the colour of their class, labelled with class name and score.

    With one class, the labels are scores only. Lines and labels grow with the picture.

    Args:
        image: The picture, RGB.
        boxes: Boxes, xyxy in pixels of `image`.
        scores: Scores in 0..1.
        labels: Indices into `class_names`.
        class_names: Names of the classes.

    Returns:
        The annotated picture, of the same size.
    """
    picture = to_pil_image(image)
    palette = class_colours(len(class_names))
    colours = [palette[label] for label in labels.tolist()]
    draw_boxes(picture, boxes, colours)
    prefix = [f"{class_names[label]} " if len(class_names) > 1 else "" for label in labels.tolist()]
    texts = [f"{name}{score:.2f}" for name, score in zip(prefix, scores.tolist(), strict=True)]
    write_labels(picture, boxes, texts, colours)
    return picture


def draw_comparison(
    image: Tensor,  # [3, H, W] uint8
    boxes: Tensor,  # [D, 4]
    scores: Tensor,  # [D]
    truth: Tensor,  # [M, 4]
    correct: Sequence[bool],
) -> Image.Image:
    """Draw detections of one class over the ground truth, with a legend below that gives the counts.

    Args:
        image: The picture, RGB.
        boxes: Detections, xyxy in pixels of `image`.
        scores: Scores in 0..1.
        truth: Ground truth, xyxy in pixels of `image`.
        correct: Whether each detection is correct.

    Returns:
        The annotated picture.
    """
    picture, factor = _enlarged(image)
    draw_boxes(picture, truth * factor, [TRUTH] * len(truth))
    colours = [CORRECT if is_correct else WRONG for is_correct in correct]
    draw_boxes(picture, boxes * factor, colours)
    write_labels(picture, boxes * factor, [f"{score:.2f}" for score in scores.tolist()], colours)
    legend = [
        (TRUTH, f"drawn by hand: {len(truth)}"),
        (CORRECT, f"detected, IoU >= 0.5: {sum(correct)}"),
        (WRONG, f"detected, not matched: {len(correct) - sum(correct)}"),
    ]
    return _with_legend(picture, legend)


def save_curve(
    path: Path,
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    x_label: str,
    y_label: str,
    title: str,
) -> None:
    """Plot curves into a PNG file, written atomically.

    Args:
        path: The file.
        curves: The x and y values of each curve, by its name.
        x_label: Label of the horizontal axis.
        y_label: Label of the vertical axis.
        title: Title above the plot.
    """
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, (x, y) in curves.items():
        axes.plot(x, y, label=name, linewidth=1.5, marker="." if len(x) < 60 else None)
    axes.set(xlabel=x_label, ylabel=y_label, title=title)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def resized(image: Tensor, side: int) -> tuple[Image.Image, float]:
    """Return an image [3, H, W] uint8 as a picture whose longer side has so many pixels, and the factor."""
    factor = side / max(image.shape[-2:])
    size = [max(1, round(length * factor)) for length in (image.shape[-1], image.shape[-2])]
    return to_pil_image(image).resize((size[0], size[1]), Image.Resampling.LANCZOS), factor


def _enlarged(image: Tensor) -> tuple[Image.Image, float]:
    picture = to_pil_image(image)
    factor = max(1, round(_SMALL_PICTURE / max(picture.size))) if max(picture.size) < _SMALL_PICTURE else 1
    if factor > 1:
        picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.BICUBIC)
    return picture, float(factor)


def draw_boxes(picture: Image.Image, boxes: Tensor, colours: list[tuple[int, int, int]]) -> None:
    """Draw boxes, xyxy in pixels of the picture, each in its colour."""
    width = max(1, round(_LINE_SCALE * math.sqrt(max(picture.size))))
    pen = ImageDraw.Draw(picture)
    # Coordinates are truncated to whole pixels, as in torchvision's `draw_bounding_boxes`.
    for box, colour in zip(boxes.to(torch.int64).tolist(), colours, strict=True):
        pen.rectangle(box, outline=colour, width=width)


def write_labels(picture: Image.Image, boxes: Tensor, texts: list[str], colours: list[tuple[int, int, int]]) -> None:
    """Write texts on patches in the colours of the boxes: above a box or, at the top of the picture, inside it."""
    size = max(_SMALLEST_FONT, round(_FONT_SCALE * math.sqrt(max(picture.size))))
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(size)
    for (x, y, _, _), text, colour in zip(boxes.tolist(), texts, colours, strict=True):
        if not text:
            continue
        left, top, right, bottom = pen.textbbox((0, 0), text, font=font)
        width, height = right - left, bottom - top
        x = min(max(x, 0), max(picture.width - width - 4, 0))
        y = y - height - 4 if y >= height + 4 else y
        pen.rectangle((x, y, x + width + 3, y + height + 3), fill=colour)
        dark = sum(colour) > 380
        pen.text((x + 2 - left, y + 2 - top), text, font=font, fill=(0, 0, 0) if dark else (255, 255, 255))


def _with_legend(picture: Image.Image, entries: list[tuple[tuple[int, int, int], str]]) -> Image.Image:
    font = ImageFont.load_default(16)
    result = Image.new("RGB", (picture.width, picture.height + 30), (40, 40, 40))
    result.paste(picture, (0, 0))
    pen = ImageDraw.Draw(result)
    x = 10
    for colour, text in entries:
        pen.rectangle((x, picture.height + 9, x + 12, picture.height + 21), outline=colour, width=3)
        pen.text((x + 20, picture.height + 6), text, font=font, fill=(255, 255, 255))
        x += 44 + int(pen.textlength(text, font=font))
    return result
