"""Tiling: every pixel and every box is in a tile, and a written tiling reads back."""

import shutil
from pathlib import Path

import pytest
import torch
from dataset_cases import PHOTO, coco, folder, opened  # noqa: F401  fixture

from retinanet.data import open_dataset, tile_dataset, tile_windows
from retinanet.data.tiling import Window, assign_boxes, clip_to_window


@pytest.mark.parametrize(("height", "width"), [(1, 1), (99, 100), (100, 101), (250, 733), (400, 400)])
@pytest.mark.parametrize(("tile", "overlap"), [(100, 0), (100, 30), (64, 63)])
def test_windows_cover_every_pixel(height: int, width: int, tile: int, overlap: int) -> None:
    covered = torch.zeros(height, width, dtype=torch.int64)
    windows = tile_windows(height, width, tile, overlap)
    for y, x, h, w in windows:
        assert 0 <= y and 0 <= x and y + h <= height and x + w <= width
        assert h == min(tile, height) and w == min(tile, width)
        covered[y : y + h, x : x + w] += 1
    assert covered.min() >= 1 and len(set(windows)) == len(windows)


def test_tiles_do_not_overlap_if_partial_edges_are_dropped() -> None:
    assert tile_windows(120, 250, 100, partial_edge="drop") == [
        Window(0, 0, 100, 100),
        Window(0, 100, 100, 100),
    ]
    assert tile_windows(50, 250, 100, partial_edge="drop") == [Window(0, 0, 50, 100), Window(0, 100, 50, 100)]


@pytest.mark.parametrize(("tile", "overlap", "name"), [(0, 0, "tile"), (10, 10, "overlap"), (10, -1, "overlap")])
def test_wrong_tiles(tile: int, overlap: int, name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        tile_windows(100, 100, tile, overlap)


def test_tiles_keep_the_description_of_the_data(folder: Path) -> None:  # noqa: F811
    dataset = opened(folder, coco(info={"description": "composed images"}))
    tile_dataset(dataset, folder / "tiles.json", folder / "tiles", tile=30)
    assert open_dataset(folder / "tiles.json").description == "composed images"


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


def test_a_box_where_four_tiles_meet_goes_to_the_tile_that_shows_most() -> None:
    windows = tile_windows(200, 200, 100)
    members = assign_boxes(torch.tensor([[80.0, 79, 119, 119]]), windows, 0.4)
    assert [len(indices) for indices in members] == [1, 0, 0, 0]


def test_tiled_photograph_reads_back(tmp_path: Path) -> None:
    dataset = open_dataset(PHOTO.with_suffix(".xml"), voc_one_based=False)
    tile_dataset(dataset, tmp_path / "tiles.json", tmp_path / "images", tile=150, overlap=20, min_visible=0.4)
    tiles = open_dataset(tmp_path / "tiles.json")
    photo, target = dataset.load(0)
    windows = tile_windows(400, 400, 150, 20)
    assert len(tiles) == len(windows) == 9 and tiles.class_names == ("Tree",)
    tile_boxes = []
    for index, window in enumerate(windows):
        image, part = tiles.load(index)
        assert torch.equal(image, photo[:, window.y : window.y + 150, window.x : window.x + 150])
        tile_boxes += [tuple(box) for box in (part["boxes"] + torch.tensor([window.x, window.y] * 2)).tolist()]
    whole = {tuple(box) for box in target["boxes"].tolist()}
    inside = [
        box
        for box in whole
        if any(w.x <= box[0] and w.y <= box[1] and box[2] <= w.x + 150 and box[3] <= w.y + 150 for w in windows)
    ]
    assert set(inside) <= set(tile_boxes) and len(tile_boxes) >= 61
    assert not list(tmp_path.rglob("*.tmp"))


def test_tiles_keep_crowds_and_names_apart(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    shutil.copy(folder / "a.png", tmp_path / "sub" / "a.png")
    images = [{"id": 10, "file_name": "a.png"}, {"id": 4, "file_name": "sub/a.png"}]
    dataset = opened(folder, coco(images=images))
    tile_dataset(dataset, tmp_path / "out.json", tmp_path / "tiles", tile=20)
    tiles = open_dataset(tmp_path / "out.json")
    assert len(tiles) == 12 and len(set(tiles.paths)) == 12
    crowds = [entry for entry in tiles.coco["annotations"] if entry["iscrowd"]]
    assert sum(entry["bbox"][2] * entry["bbox"][3] for entry in crowds) == 30 * 40
    assert {entry["category_id"] for entry in crowds} == {3}
