"""Cuts large images and their boxes into tiles.

A box belongs to every tile that shows at least `min_visible` of its area, clipped to the tile. A box that no
tile shows that much of, as one in the corner of four tiles may be, belongs to the tile that shows the most of
it, so that tiles which cover the whole image lose no box. What a tile shows of its other boxes stays
unlabelled.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

from retinanet.common.files import replacing, write_json
from retinanet.data.dataset import DetectionDataset


class Window(NamedTuple):
    """A rectangle of an image in whole pixels."""

    y: int
    x: int
    height: int
    width: int


def tile_windows(height: int, width: int, tile: int, overlap: int = 0, *, partial_edge: str = "shift") -> list[Window]:
    """Windows that cover an image, row by row.

    Args:
        height: Of the image, in pixels.
        width: Of the image, in pixels.
        tile: Side of a window. A side of the image that is shorter gives windows as short.
        overlap: Pixels that neighbours share.
        partial_edge: What happens at the right and bottom edges, where no whole tile is left: "shift" moves
            the last window back inside, so that everything is covered and the last two windows share more
            than `overlap`; "drop" leaves the rest out, so that with overlap 0 nothing is covered twice.

    Returns:
        The windows; at least one.

    Raises:
        ValueError: the tile is empty, or the overlap is not smaller than the tile.
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
    """Which boxes belong to which window, by the rule at the top of this module.

    Args:
        boxes: xyxy in pixels of the whole image.
        windows: From `tile_windows`.
        min_visible: Share of a box's area, 0 to 1.

    Returns:
        For each window the indices of its boxes, int64, ascending.
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
    """Boxes `[M, 4]` of the whole image, clipped to a window and in its coordinates."""
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
) -> dict[str, Any]:
    """Writes a data set as tiles: PNG files, and a COCO json that names them.

    Args:
        dataset: The images to cut.
        annotation_file: The COCO json to write. Its file names are relative to its own folder, or, where
            `images_dir` is not below that, to `images_dir`.
        images_dir: Folder for the tiles, named `<image>_<y>_<x>.png`; made if missing.
        tile: Side of a tile in pixels.
        overlap: Pixels that neighbouring tiles share.
        min_visible: A box belongs to the tiles that show at least this share of its area.
        partial_edge: "shift" or "drop", see `tile_windows`.

    Returns:
        The COCO content that was written.
    """
    annotation_file, images_dir = Path(annotation_file), Path(images_dir)
    images_dir.mkdir(parents=True, exist_ok=True)
    beside = annotation_file.parent
    base = beside if images_dir.is_relative_to(beside) else images_dir
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    of_image: dict[int, list[dict[str, Any]]] = {image_id: [] for image_id in dataset.image_ids}
    for entry in dataset.coco["annotations"]:
        of_image[entry["image_id"]].append(entry)
    for index, image_id in enumerate(dataset.image_ids):
        image, _ = dataset.load(index)
        windows = tile_windows(*dataset.sizes[index], tile, overlap, partial_edge=partial_edge)
        entries = of_image[image_id]
        boxes = torch.tensor([entry["bbox"] for entry in entries], dtype=torch.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        # A crowd excuses whatever lies in it, so every sliver of one is kept.
        crowd = torch.tensor([entry["iscrowd"] for entry in entries], dtype=torch.bool)
        whole, any_part = assign_boxes(boxes, windows, min_visible), assign_boxes(boxes, windows, 0.0)
        stem = _stem(dataset, index)
        for window, members, parts in zip(windows, whole, any_part, strict=True):
            path = images_dir / f"{stem}_{window.y:05d}_{window.x:05d}.png"
            pixels = image[:, window.y : window.y + window.height, window.x : window.x + window.width]
            with replacing(path) as temporary:
                to_pil_image(pixels).save(temporary, format="PNG")
            name = path.relative_to(base).as_posix()
            images.append({"id": len(images) + 1, "file_name": name, "height": window.height, "width": window.width})
            chosen = torch.cat([members[~crowd[members]], parts[crowd[parts]]])
            for box, number in zip(clip_to_window(boxes[chosen], window).tolist(), chosen.tolist(), strict=True):
                width, height = box[2] - box[0], box[3] - box[1]
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": len(images),
                        "category_id": entries[number]["category_id"],
                        "bbox": [box[0], box[1], width, height],
                        "area": width * height,
                        "iscrowd": entries[number]["iscrowd"],
                    }
                )
    content = {"images": images, "annotations": annotations, "categories": dataset.coco["categories"]}
    write_json(annotation_file, content)
    return content


def _stem(dataset: DetectionDataset, index: int) -> str:
    """The image's file name, or its id where another image of the data set has the same name."""
    stem = dataset.paths[index].stem
    alone = sum(path.stem == stem for path in dataset.paths) == 1
    return stem if alone else f"{dataset.image_ids[index]:012d}"
