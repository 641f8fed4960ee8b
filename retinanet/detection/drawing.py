"""Pictures of detections, and the curve of a training run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image
from torchvision.utils import draw_bounding_boxes

import retinanet_ops as ops
from retinanet.common.files import replacing

_SMALL_PICTURE = 800  # pictures below this are enlarged, so that labels fit beside small boxes
_FONT_SIZE = 12
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
_TRUTH, _RIGHT, _WRONG = (255, 255, 255), (60, 230, 90), (255, 90, 60)


def class_colours(count: int) -> list[tuple[int, int, int]]:
    """Bright colours, one for each class; they repeat after ten."""
    return [_PALETTE[index % len(_PALETTE)] for index in range(count)]


def draw_detections(
    image: Tensor,  # [3, H, W] uint8
    boxes: Tensor,  # [D, 4]
    scores: Tensor,  # [D]
    labels: Tensor,  # [D] int64
    class_names: Sequence[str],
) -> Image.Image:
    """A picture with boxes in the colour of their class, labelled with name and score.

    With one class the labels are scores alone. Pictures smaller than 800 pixels are enlarged.

    Args:
        image: RGB.
        boxes: xyxy in pixels of `image`.
        scores: 0 to 1.
        labels: Positions in `class_names`.
        class_names: Names of the classes.

    Returns:
        The annotated picture.
    """
    picture, factor = _enlarged(image, boxes)
    palette = class_colours(len(class_names))
    colours = [palette[label] for label in labels.tolist()]
    picture = _with_boxes(picture, boxes * factor, colours)
    prefix = [f"{class_names[label]} " if len(class_names) > 1 else "" for label in labels.tolist()]
    texts = [f"{name}{score:.2f}" for name, score in zip(prefix, scores.tolist(), strict=True)]
    _write_labels(picture, boxes * factor, texts, colours)
    return picture


def draw_comparison(
    image: Tensor,  # [3, H, W] uint8
    boxes: Tensor,  # [D, 4]
    scores: Tensor,  # [D]
    truth: Tensor,  # [M, 4]
    iou_threshold: float = 0.5,
) -> tuple[Image.Image, int]:
    """Detections of one class over the ground truth, with a line below that explains the colours and counts.

    Detections are matched best score first, each to the unclaimed box that it overlaps most.

    Args:
        image: RGB.
        boxes: Detections, xyxy in pixels of `image`.
        scores: 0 to 1.
        truth: Ground truth, xyxy.
        iou_threshold: A detection with at least this IoU is right.

    Returns:
        The annotated picture, and the number of detections that are right.
    """
    right = match_greedily(boxes, scores, truth, iou_threshold)
    picture, factor = _enlarged(image, truth)
    picture = _with_boxes(picture, truth * factor, [_TRUTH] * len(truth))
    colours = [_RIGHT if is_right else _WRONG for is_right in right]
    picture = _with_boxes(picture, boxes * factor, colours)
    _write_labels(picture, boxes * factor, [f"{score:.2f}" for score in scores.tolist()], colours)
    legend = [
        (_TRUTH, f"drawn by hand: {len(truth)}"),
        (_RIGHT, f"detected, IoU >= {iou_threshold:g}: {sum(right)}"),
        (_WRONG, f"detected, not matched: {len(right) - sum(right)}"),
    ]
    return _with_legend(picture, legend), sum(right)


def match_greedily(
    boxes: Tensor,  # [D, 4]
    scores: Tensor,  # [D]
    truth: Tensor,  # [M, 4]
    iou_threshold: float = 0.5,
) -> list[bool]:
    """Whether each detection is right: best score first, each claims the free box that it overlaps most."""
    right = [False] * len(boxes)
    if not len(boxes) or not len(truth):
        return right
    overlap = ops.box_iou(boxes, truth)
    for index in scores.argsort(descending=True, stable=True).tolist():
        best, column = overlap[index].max(dim=0)
        if best >= iou_threshold:
            right[index] = True
            overlap[:, column] = -1
    return right


def save_picture(picture: Image.Image, path: Path) -> None:
    """Writes a PNG, whole or not at all."""
    with replacing(path) as temporary:
        picture.save(temporary, format="PNG")


def save_curve(
    path: Path,
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    x_label: str,
    y_label: str,
    title: str,
) -> None:
    """Plots curves into a PNG, whole or not at all.

    Args:
        path: The file.
        curves: x and y of each curve, by its name.
        x_label: Of the horizontal axis.
        y_label: Of the vertical axis.
        title: Above the plot.
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


def _enlarged(image: Tensor, boxes: Tensor) -> tuple[Image.Image, float]:
    picture = to_pil_image(image)
    factor = max(1, round(_SMALL_PICTURE / max(picture.size))) if max(picture.size) < _SMALL_PICTURE else 1
    if factor > 1:
        picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.BICUBIC)
    return picture, float(factor)


def _with_boxes(picture: Image.Image, boxes: Tensor, colours: list[tuple[int, int, int]]) -> Image.Image:
    if not len(boxes):
        return picture
    width = 2 if max(picture.size) < 2000 else 3
    return to_pil_image(draw_bounding_boxes(pil_to_tensor(picture), boxes, colors=colours, width=width))


def _write_labels(picture: Image.Image, boxes: Tensor, texts: list[str], colours: list[tuple[int, int, int]]) -> None:
    """Small text on a patch of the box's colour, above the box or, at the top of the picture, inside it."""
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(_FONT_SIZE)
    for (x, y, _, _), text, colour in zip(boxes.tolist(), texts, colours, strict=True):
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
