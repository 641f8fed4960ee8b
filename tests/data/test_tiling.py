"""Tiles: every pixel and every box is in one, and what is written reads back."""

from pathlib import Path

import pytest
import torch

from retinanet.data import open_dataset, tile_dataset, tile_windows
from retinanet.data.tiling import Window, assign_boxes, clip_to_window

PHOTO = Path(__file__).parents[1] / "fixtures" / "OSBS_029.png"


@pytest.mark.parametrize(("height", "width"), [(1, 1), (99, 100), (100, 101), (250, 733), (400, 400)])
@pytest.mark.parametrize(("tile", "overlap"), [(100, 0), (100, 30), (64, 63)])
def test_windows_cover_every_pixel(height: int, width: int, tile: int, overlap: int) -> None:
    covered = torch.zeros(height, width, dtype=torch.int64)
    windows = tile_windows(height, width, tile, overlap)
    for y, x, h, w in windows:
        assert (
            0 <= y
            and 0 <= x
            and y + h <= height
            and x + w <= width
            and h == min(tile, height)
            and w == min(tile, width)
        )
        covered[y : y + h, x : x + w] += 1
    assert covered.min() >= 1 and len(set(windows)) == len(windows)


def test_dropped_edges_cover_nothing_twice() -> None:
    assert tile_windows(120, 250, 100, partial_edge="drop") == [
        Window(0, 0, 100, 100),
        Window(0, 100, 100, 100),
    ]
    assert tile_windows(50, 250, 100, partial_edge="drop") == [Window(0, 0, 50, 100), Window(0, 100, 50, 100)]


@pytest.mark.parametrize(("tile", "overlap", "name"), [(0, 0, "tile"), (10, 10, "overlap"), (10, -1, "overlap")])
def test_wrong_tiles(tile: int, overlap: int, name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        tile_windows(100, 100, tile, overlap)


@pytest.mark.parametrize("min_visible", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("overlap", [0, 40])
def test_tiling_loses_no_box(min_visible: float, overlap: int) -> None:
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(500, 2, generator=generator) * torch.tensor([700.0, 500.0])
    boxes = torch.cat([corner, corner + 1 + torch.rand(500, 2, generator=generator) * 80], dim=1)
    windows = tile_windows(581, 781, 100, overlap)
    members = assign_boxes(boxes, windows, min_visible)
    assert torch.cat(members).unique().tolist() == list(range(500))
    area = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)
    count = torch.cat(members).bincount(minlength=500)
    for window, indices in zip(windows, members, strict=True):
        parts = clip_to_window(boxes[indices], window)
        assert (parts >= 0).all() and (parts <= 100).all()
        share = (parts[:, 2:] - parts[:, :2]).prod(dim=1) / area[indices]
        assert ((share >= min_visible - 1e-4) | (count[indices] == 1)).all() and (share > 0).all()


def test_a_box_in_the_corner_of_four_tiles_goes_where_most_of_it_is() -> None:
    windows = tile_windows(200, 200, 100)
    members = assign_boxes(torch.tensor([[80.0, 79, 119, 119]]), windows, 0.4)
    assert [len(indices) for indices in members] == [1, 0, 0, 0]


def test_tiled_photograph_reads_back(tmp_path: Path) -> None:
    dataset = open_dataset(PHOTO.parent, voc_one_based=False)
    tile_dataset(dataset, tmp_path / "tiles.json", tmp_path / "images", tile=150, overlap=20, min_visible=0.4)
    tiles = open_dataset(tmp_path / "tiles.json")
    photo, target = dataset.load(0)
    windows = tile_windows(400, 400, 150, 20)
    assert len(tiles) == len(windows) == 9 and tiles.class_names == ("Tree",)
    found = []
    for index, window in enumerate(windows):
        image, part = tiles.load(index)
        assert torch.equal(image, photo[:, window.y : window.y + 150, window.x : window.x + 150])
        found += [tuple(box) for box in (part["boxes"] + torch.tensor([window.x, window.y] * 2)).tolist()]
    whole = {tuple(box) for box in target["boxes"].tolist()}
    inside = [
        box
        for box in whole
        if any(w.x <= box[0] and w.y <= box[1] and box[2] <= w.x + 150 and box[3] <= w.y + 150 for w in windows)
    ]
    assert set(inside) <= set(found) and len(found) >= 61
    assert not list(tmp_path.rglob("*.tmp"))
