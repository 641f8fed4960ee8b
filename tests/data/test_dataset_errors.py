"""Data sets with errors: which error is raised, and what its message says."""

import math
from pathlib import Path

import pytest
from dataset_cases import coco, folder, opened, refusal, with_annotation, write_image  # noqa: F401  fixture

from retinanet.common.errors import DataError
from retinanet.data import open_dataset

IN_IMAGE = "its image of 60 x 40 pixels"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"bbox": [5, 5, 5, -1]},
            "bbox [5, 5, 5, -1] has a negative width or height, expected [x, y, width, height]",
        ),
        ({"bbox": [5, 5, math.nan, 5]}, "bbox [5, 5, nan, 5] has a coordinate that is not finite"),
        ({"bbox": [-math.inf, 5, 5, 5]}, "bbox [-inf, 5, 5, 5] has a coordinate that is not finite"),
        ({"bbox": [5, 5, 5]}, "bbox must be four numbers [x, y, width, height], got [5, 5, 5]"),
        ({"bbox": [5, 5, 5, "5"]}, "bbox must be four numbers [x, y, width, height], got [5, 5, 5, '5']"),
        ({"bbox": ...}, "bbox must be four numbers [x, y, width, height], got None"),
        ({"category_id": 8}, "category_id 8 is not the id of any category"),
        ({"category_id": ...}, "category_id None is not the id of any category"),
        ({"image_id": 99}, "image_id 99 is not the id of any image"),
        ({"iscrowd": 2}, "iscrowd must be 0 or 1, got 2"),
        ({"id": "7"}, "annotation id must be an integer, got '7'"),
    ],
)
def test_wrong_annotation(folder: Path, changes: dict, reason: str) -> None:
    name = changes.get("id", 1)
    assert refusal(folder, with_annotation(**changes)) == f"{folder}/ann.json: annotation {name}: {reason}"


@pytest.mark.parametrize(
    ("bbox", "reason", "summary", "left"),
    [
        ([70, 5, 5, 5], f"lies outside {IN_IMAGE}", "1 box outside its image left out", None),
        ([-9, 5, 9, 5], f"lies outside {IN_IMAGE}", "1 box outside its image left out", None),
        ([-0.5, 5, 0.5, 5], f"lies outside {IN_IMAGE}", "1 box outside its image left out", None),
        ([59.5, 5, 9, 5], f"has less than 1 pixel in {IN_IMAGE}", "1 box outside its image left out", None),
        (
            [50, 5, 12, 5],
            f"reaches 2 pixels out of {IN_IMAGE}",
            "1 box that overhangs its image clipped",
            [50, 5, 10, 5],
        ),
        (
            [5, -1.5, 5, 5],
            f"reaches 1.5 pixels out of {IN_IMAGE}",
            "1 box that overhangs its image clipped",
            [5, 0, 5, 3.5],
        ),
        ([59.5, 5, 1, 5], f"has less than 1 pixel in {IN_IMAGE}", "1 box outside its image left out", None),
        ([50, 5, 1e-7, 5], "has width or height 0 in single precision", "1 box without area left out", None),
        ([5, 5, 0, 5], "has width or height 0", "1 box without area left out", None),
        ([5, 5, 5, 0], "has width or height 0", "1 box without area left out", None),
    ],
)
def test_a_box_with_one_right_reading(folder: Path, bbox: list, reason: str, summary: str, left: list | None) -> None:
    """It is mended and counted; a strict reading refuses it."""
    dataset = opened(folder, with_annotation(bbox=bbox))
    assert [entry["bbox"] for entry in dataset.coco["annotations"]] == ([] if left is None else [left])
    assert dataset.summary().endswith(f"; mended: {summary}")
    text = ", ".join(f"{value:g}" for value in bbox)
    message = refusal(folder, with_annotation(bbox=bbox), strict=True)
    assert message == f"{folder}/ann.json: annotation 1: bbox [{text}] {reason}"


@pytest.mark.parametrize(
    ("segmentation", "box"),
    [
        ([[5, 6, 25, 6, 15, 16.5]], [5, 6, 20, 10.5]),
        ([[5, 6, 8, 6, 8, 9], [20, 10, 25, 10, 20, 16]], [5, 6, 20, 10]),
        # Ten columns of 40 pixels: 200 zeros, then 80 ones.
        ({"size": [40, 60], "counts": [200, 80, 2120]}, [5, 0, 2, 40]),
        ({"size": [40, 60], "counts": "X6`2XR2"}, [5, 0, 2, 40]),
    ],
)
def test_an_annotation_without_bbox_gets_the_box_of_its_segmentation(folder: Path, segmentation, box: list) -> None:
    for bbox in (..., None, []):
        content = with_annotation(bbox=bbox, segmentation=segmentation)
        dataset = opened(folder, content)
        assert [entry["bbox"] for entry in dataset.coco["annotations"]] == [box]
        assert dataset.summary().endswith("mended: 1 annotation without box boxed from the segmentation")
        assert "annotation 1: has no bbox, only a segmentation" in refusal(folder, content, strict=True)


@pytest.mark.parametrize(
    "segmentation",
    [
        [[5, 6, 25, 6]],
        [[5, 6, 25, 6, 15]],
        [[5, 6, 25, 6, 15, "16"]],
        [[5, 6, 25, 6, 15, math.nan]],
        [5, 6, 25, 6, 15, 16],
        "polygon",
        {"size": [40, 0], "counts": [1]},
        {"size": [40, 60], "counts": [200, 80]},
        {"size": [40, 60], "counts": [-1, 2401]},
        {"size": [40, 60], "counts": ""},
        {"size": [40, 60], "counts": "\u00ff"},
        {"size": [40, 60], "counts": "0" * 7 + "ooooooo0"},
        {"size": [2**40, 2**40], "counts": "X6"},
        {"counts": [1]},
    ],
)
def test_a_segmentation_that_gives_no_box(folder: Path, segmentation: object) -> None:
    message = refusal(folder, with_annotation(bbox=..., segmentation=segmentation))
    assert message.startswith(f"{folder}/ann.json: annotation 1: has no bbox, and its segmentation is no ")
    assert message.endswith("; add a bbox")


@pytest.mark.parametrize("first", [[0, 0, 1, 1], [0.5, 0.5, 0.505, 0.2]])
def test_shares_are_refused_whichever_box_is_first(folder: Path, first: list) -> None:
    boxes = [first, [0.25, 0.5, 0.5, 0.25]]
    entries = [{"id": k, "image_id": 10, "category_id": 7, "bbox": box} for k, box in enumerate(boxes)]
    reason = "no coordinate is above 1; expected pixels, got shares of width and height"
    assert refusal(folder, coco(annotations=entries)) == f"{folder}/ann.json: {reason}"
    entries.append({"id": 9, "image_id": 10, "category_id": 7, "bbox": [0, 0, 1.5, 1.5]})
    assert len(opened(folder, coco(annotations=entries)).boxes) == 3


def test_an_annotation_without_id_is_fine_and_named_by_its_image(folder: Path) -> None:
    assert len(opened(folder, with_annotation(id=...)).coco["annotations"]) == 1
    message = refusal(folder, with_annotation(id=..., category_id=8))
    assert message.startswith(f"{folder}/ann.json: annotation without id on image 10: category_id 8")


@pytest.mark.parametrize("table", ["images", "annotations", "categories"])
def test_missing_table(folder: Path, table: str) -> None:
    content = coco()
    del content[table]
    expected = f"{folder}/ann.json: has no `{table}`; a COCO json has images, annotations, categories"
    assert refusal(folder, content) == expected


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (coco(images=7), "`images`: expected a list, got 7"),
        (coco(annotations=[[1]]), "annotations[0]: expected an object, got a list"),
        (coco(categories=[], annotations=[]), "categories: expected at least one, got none"),
        (coco(images=[], annotations=[]), "images: expected at least one, got none"),
        ([], "expected a JSON object with images, annotations, categories, got a list"),
        ('{"images": [', "line 1: not valid JSON: Expecting value"),
        (
            coco(categories=[{"id": 7, "name": "a"}, {"id": 7, "name": "b"}], annotations=[]),
            "categories[1]: category id 7 is already used by 'a'",
        ),
        (
            coco(categories=[{"id": 7, "name": "a"}, {"id": 3, "name": "a"}], annotations=[]),
            "categories[1]: category name 'a' of id 3 is already used by another id",
        ),
        (
            coco(categories=[{"id": "7", "name": "a"}], annotations=[]),
            "categories[0]: id must be an integer, got '7'",
        ),
        (coco(categories=[{"id": 7}], annotations=[]), "categories[0]: name must be a string, got None"),
        (
            coco(images=[{"id": 1, "file_name": "a.png"}, {"id": 1, "file_name": "b.png"}], annotations=[]),
            "image 1 (b.png): image id 1 is already used by a.png",
        ),
        (
            coco(images=[{"id": 1.5, "file_name": "a.png"}], annotations=[]),
            "image 1.5 (a.png): image id must be an integer, got 1.5",
        ),
        (coco(images=[{"id": 1}], annotations=[]), "image 1 (None): file_name must be a string, got None"),
    ],
)
def test_wrong_json(folder: Path, content: object, reason: str) -> None:
    assert refusal(folder, content) == f"{folder}/ann.json: {reason}"


def test_annotations_with_the_same_id_are_numbered_anew(folder: Path) -> None:
    entry = {"id": 6, "image_id": 10, "category_id": 7, "bbox": [5, 6, 20, 10]}
    dataset = opened(folder, coco(annotations=[entry, entry | {"bbox": [1, 1, 5, 5]}]))
    assert len(dataset.boxes) == 2
    assert dataset.summary().endswith("mended: 1 annotation with a used id numbered anew")
    message = refusal(folder, coco(annotations=[entry, entry]), strict=True)
    assert message == f"{folder}/ann.json: annotation 6: annotation id 6 is used more than once"


def test_missing_image(folder: Path) -> None:
    (folder / "b.png").unlink()
    assert refusal(folder, coco()) == (
        f"{folder}/ann.json: image 4 (b.png): {folder}/b.png: no such file; looked in {folder}, name another folder of "
        "images with --images"
    )


def test_unreadable_images(folder: Path) -> None:
    (folder / "a.png").write_bytes(b"not a picture")
    whole = (folder / "b.png").read_bytes()
    (folder / "b.png").write_bytes(whole[: len(whole) // 2])
    first = refusal(folder, coco()).splitlines()[0]
    assert first == f"{folder}/ann.json: image 10 (a.png): {folder}/a.png: not an image in a format that Pillow reads"
    write_image(folder / "a.png")
    for cache_bytes in (0, 2**20):
        second = refusal(folder, coco(), cache_bytes=cache_bytes)
        assert second.startswith(f"{folder}/ann.json: image 4 (b.png): {folder}/b.png: cannot be decoded as an image (")
        assert "\n" not in second


def test_size_that_contradicts_the_file(folder: Path) -> None:
    content = coco(images=[{"id": 10, "file_name": "a.png", "width": 40, "height": 60}], annotations=[])
    stated = "the annotations say 40 x 60 pixels"
    actual = f"{folder}/a.png is 60 x 40 (width x height, EXIF orientation applied)"
    assert refusal(folder, content) == f"{folder}/ann.json: image 10 (a.png): {stated}, {actual}"


def test_missing_file_and_folder(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(DataError) as caught:
        open_dataset(tmp_path / "none.json")
    assert str(caught.value) == f"{tmp_path}/none.json: no such file"
    assert (
        refusal(folder, coco(), images_dir=tmp_path / "none")
        == f"{tmp_path}/none: expected a folder of images, got no folder of this name"
    )


def test_every_wrong_entry_has_a_line_and_the_rest_are_counted(folder: Path) -> None:
    entries = [{"id": n, "image_id": 10, "category_id": 8, "bbox": [1, 1, 2, 2]} for n in range(1, 8)]
    lines = refusal(folder, coco(annotations=entries)).splitlines()
    assert lines[:5] == [
        f"{folder}/ann.json: annotation {n}: category_id 8 is not the id of any category" for n in range(1, 6)
    ]
    rest = "7 wrong entries in total, of which the first 5 are shown; `retinanet check` lists all of them"
    assert lines[5:] == [f"{folder}/ann.json: {rest}"]


def test_other_classes_than_expected(folder: Path) -> None:
    message = refusal(folder, coco(), class_names=("tree", "bush"))
    assert message == f"{folder}/ann.json: categories: expected the classes tree, bush; got bush, tree"
