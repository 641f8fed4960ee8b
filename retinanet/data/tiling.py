"""Cutting large images and their boxes into tiles.

A box belongs to every tile that shows at least `min_visible` of its area, and is clipped to the tile. If no tile shows
that much of a box, as may happen where four tiles meet, it belongs to the tile that shows the most of it. So tiles that
cover the whole image lose no box. In a tile to which a box does not belong, the visible part of the box is unlabelled.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

from retinanet.common.files import replacing, write_json
from retinanet.common.names import FreeNames
from retinanet.data.coco import coco_content
from retinanet.data.dataset import DetectionDataset
from retinanet.data.records import Box, BoxRecord

#: Bytes of a tile's name after that of its image, with up to eight digits a side.
_ROOM = len("_00000000_00000000.png")


class Window(NamedTuple):
    """A rectangle of an image in whole pixels."""

    y: int
    x: int
    height: int
    width: int


def tile_windows(height: int, width: int, tile: int, overlap: int = 0, *, partial_edge: str = "shift") -> list[Window]:
    """Return windows that cover an image, row by row.

    Args:
        height: Height of the image in pixels.
        width: Width of the image in pixels.
        tile: Side of a window in pixels. A window is smaller if the image is smaller.
        overlap: Pixels that neighbouring windows share.
        partial_edge: What to do at the right and bottom edges if no whole window is left. "shift" moves the last window
            back inside, so that everything is covered and the last two windows share more than `overlap`. "drop" leaves
            the rest uncovered, so that with overlap 0 nothing is covered twice.

    Returns:
        The windows; at least one.

    Raises:
        ValueError: The tile is empty, the overlap is not smaller than the tile, or `partial_edge` is unknown.
    """
    if tile < 1:
        raise ValueError(f"tile: expected a positive number of pixels, got {tile}")
    if not 0 <= overlap < tile:
        raise ValueError(f"overlap: expected 0 to {tile - 1} (less than the tile), got {overlap}")
    if partial_edge not in ("shift", "drop"):
        raise ValueError(f'partial_edge: expected "shift" or "drop", got {partial_edge!r}')
    tops, lefts = (_starts(side, tile, tile - overlap, partial_edge) for side in (height, width))
    return [Window(y, x, min(tile, height), min(tile, width)) for y in tops for x in lefts]


def _starts(length: int, tile: int, stride: int, partial_edge: str) -> list[int]:
    if length <= tile:
        return [0]
    starts = list(range(0, length - tile + 1, stride))
    if partial_edge == "shift" and starts[-1] + tile < length:
        starts.append(length - tile)
    return starts


def assign_boxes(
    boxes: Tensor,  # [M, 4]
    windows: list[Window],
    min_visible: float = 0.4,
) -> list[Tensor]:
    """Assign boxes to windows by the rule in the docstring of this module.

    Args:
        boxes: The boxes, xyxy in pixels of the whole image.
        windows: The windows, from `tile_windows`.
        min_visible: Share of a box's area, 0 to 1, that a window must show to get the box.

    Returns:
        For each window the indices of its boxes, int64, in ascending order.
    """
    corners = torch.tensor([(w.x, w.y, w.x + w.width, w.y + w.height) for w in windows], dtype=torch.float64)
    exact = boxes.double()
    low = torch.maximum(exact[None, :, :2], corners[:, None, :2])
    high = torch.minimum(exact[None, :, 2:], corners[:, None, 2:])
    share = (high - low).clamp(min=0).prod(dim=2) / (exact[:, 2:] - exact[:, :2]).prod(dim=1)  # [W, M]
    belongs = (share >= min_visible) & (share > 0)
    covered = (exact[:, 2] <= corners[:, 2].max()) & (exact[:, 3] <= corners[:, 3].max())
    orphans = (covered & ~belongs.any(dim=0)).nonzero().flatten()
    belongs[share[:, orphans].argmax(dim=0), orphans] = True
    return [row.nonzero().flatten() for row in belongs]


def clip_to_window(boxes: Tensor, window: Window) -> Tensor:
    """Clip boxes `[M, 4]` of the whole image to a window, and return them in pixels of the window."""
    limit = boxes.new_tensor([window.width, window.height, window.width, window.height])
    corner = boxes.new_tensor([window.x, window.y, window.x, window.y])
    return torch.minimum((boxes - corner).clamp(min=0), limit)


def tile_dataset(
    dataset: DetectionDataset,
    annotation_file: str | Path,
    images_dir: str | Path,
    *,
    tile: int = 400,
    overlap: int = 0,
    min_visible: float = 0.4,
    partial_edge: str = "shift",
    progress: Callable[..., Iterable[Any]] | None = None,
) -> dict[str, Any]:
    """Write a data set as tiles: PNG files, and a COCO json of their boxes.

    Args:
        dataset: The images to cut.
        annotation_file: The COCO json to write. Its file names are relative to its own folder or, if `images_dir` is
            not below that folder, to `images_dir`.
        images_dir: Folder for the tiles, which are named `<image>_<y>_<x>.png`; of several images of one name, the
            second is `<image>_2`, and so on. It is created if missing.
        tile: Side of a tile in pixels.
        overlap: Pixels that neighbouring tiles share.
        min_visible: Share of a box's area, 0 to 1, that a tile must show to get the box.
        partial_edge: "shift" or "drop", see `tile_windows`.
        progress: Wraps the iteration over the images, as `tqdm` does.

    Returns:
        The COCO content that was written.
    """
    annotation_file, images_dir = Path(annotation_file), Path(images_dir)
    images_dir.mkdir(parents=True, exist_ok=True)
    beside = annotation_file.parent
    base = beside if images_dir.is_relative_to(beside) else images_dir
    images: list[tuple[int, str, int, int]] = []
    records: list[BoxRecord] = []
    of_image: dict[int, list[BoxRecord]] = defaultdict(list)
    for record in dataset.boxes:
        of_image[record.image_id].append(record)
    names = FreeNames(images_dir)
    for index in progress(range(len(dataset))) if progress else range(len(dataset)):
        image_id = dataset.image_ids[index]
        image, _ = dataset.load(index)
        windows = tile_windows(*dataset.sizes[index], tile, overlap, partial_edge=partial_edge)
        stem = names.take(dataset.paths[index].stem, room=_ROOM)
        for window, boxes in zip(windows, _boxes_of_windows(of_image[image_id], windows, min_visible), strict=True):
            path = images_dir / f"{stem}_{window.y:05d}_{window.x:05d}.png"
            pixels = image[:, window.y : window.y + window.height, window.x : window.x + window.width]
            with replacing(path) as temporary:
                to_pil_image(pixels).save(temporary, format="PNG")
            images.append((len(images) + 1, path.relative_to(base).as_posix(), window.height, window.width))
            records += [record._replace(image_id=len(images)) for record in boxes]
    categories = dict(zip(dataset.category_ids, dataset.class_names, strict=True))
    content = coco_content(images, records, categories, dataset.description)
    write_json(annotation_file, content)
    return content


def _boxes_of_windows(records: list[BoxRecord], windows: list[Window], min_visible: float) -> list[list[BoxRecord]]:
    """Return the boxes of each window, clipped, in pixels of the window: first the objects, then the crowds."""
    boxes = torch.tensor([record.box for record in records], dtype=torch.float64).reshape(-1, 4)
    # Background under a crowd must not be learned, so a tile gets every part of a crowd, however small.
    crowd = torch.tensor([record.crowd for record in records], dtype=torch.bool)
    visible, any_part = assign_boxes(boxes, windows, min_visible), assign_boxes(boxes, windows, 0.0)
    result = []
    for window, members, parts in zip(windows, visible, any_part, strict=True):
        chosen = torch.cat([members[~crowd[members]], parts[crowd[parts]]])
        clipped = clip_to_window(boxes[chosen], window).tolist()
        result.append([_cut(records[i], tuple(box)) for i, box in zip(chosen.tolist(), clipped, strict=True)])
    return result


def _cut(record: BoxRecord, box: Box) -> BoxRecord:
    return record._replace(box=box, area=(box[2] - box[0]) * (box[3] - box[1]))
