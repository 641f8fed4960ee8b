"""Reading YOLO data sets."""

from pathlib import Path

import pytest
from dataset_cases import write_image

from retinanet.common.errors import DataError
from retinanet.data import DetectionDataset, open_dataset

#: On an image of 60 x 40 pixels: x 5 to 25, y 6 to 16.
ROW = "1 0.25 0.275 0.3333333333 0.25"


@pytest.fixture
def yolo(tmp_path: Path) -> Path:
    """Return a YOLO data set whose training part is two images, the second without boxes."""
    for part, names in (("train", "ab"), ("val", "c")):
        for kind in ("images", "labels"):
            (tmp_path / kind / part).mkdir(parents=True)
        for name in names:
            write_image(tmp_path / "images" / part / f"{name}.png")
    (tmp_path / "labels" / "train" / "a.txt").write_text(f"{ROW}\n\n0.0 0.5 0.5 1 1\n")
    (tmp_path / "labels" / "val" / "c.txt").write_text(f"{ROW}\n")
    write_data(tmp_path)
    return tmp_path


def write_data(folder: Path, **changes: str | None) -> None:
    entries = {"path": ".", "train": "images/train", "val": "images/val", "names": "[bush, tree]"} | changes
    (folder / "data.yaml").write_text("".join(f"{key}: {value}\n" for key, value in entries.items() if value))


def opened(folder: Path, split: str | None = "train", **options: object) -> DetectionDataset:
    return open_dataset(folder / "data.yaml", split=split, **options)


def refusal(folder: Path, split: str | None = "train", **options: object) -> str:
    with pytest.raises(DataError) as caught:
        opened(folder, split, **options)
    return str(caught.value)


def test_yolo_is_read(yolo: Path) -> None:
    for path in (yolo, yolo / "data.yaml"):
        dataset = open_dataset(path, split="train", strict=True)
        assert dataset.paths == [yolo / "images" / "train" / "a.png", yolo / "images" / "train" / "b.png"]
        assert (dataset.class_names, dataset.category_ids) == (("bush", "tree"), (0, 1))
        assert [record.label for record in dataset.boxes] == [1, 0]
        assert dataset.boxes[0].box == pytest.approx((5, 6, 25, 16)) and dataset.boxes[1].box == (0, 0, 60, 40)
    assert len(opened(yolo, "val")) == 1


@pytest.mark.parametrize(
    ("changes", "mended"),
    [
        ({"names": "{0: bush, 1: tree}"}, None),
        ({"path": None}, None),
        ({"train": "[images/train]"}, None),
        ({"train": "train.txt"}, None),
        ({"train": "images\\train"}, None),
        ({"train": "../images/train"}, "1 wrong path in the data file found beside it"),
        ({"path": "/content/datasets/mine"}, "1 wrong path in the data file found beside it"),
    ],
)
def test_forms_of_the_data_file(yolo: Path, changes: dict, mended: str | None) -> None:
    (yolo / "train.txt").write_text("./images/train/a.png\n\nimages/train/b.png\n")
    write_data(yolo, **changes)
    dataset = opened(yolo)
    assert len(dataset) == 2 and len(dataset.boxes) == 2 and dataset.class_names == ("bush", "tree")
    assert dataset.summary().partition("; mended: ")[2] == (mended or "")


@pytest.mark.parametrize(
    ("row", "box"),
    [
        ("0 0.1 0.1 0.5 0.2 0.3 0.6", (6, 4, 30, 24)),
        ("0 0.1 0.1 0.5 0.1 0.5 0.6 0.1 0.6", (6, 4, 30, 24)),
        ("0 0.5 0.5 1.02 1", (0, 0, 60, 40)),
    ],
)
def test_polygons_and_rounding(yolo: Path, row: str, box: tuple) -> None:
    (yolo / "labels" / "train" / "a.txt").write_text(row)
    dataset = opened(yolo, strict=True)
    assert dataset.boxes[0].box == pytest.approx(box)


def test_the_points_of_a_pose_follow_its_box(yolo: Path) -> None:
    write_data(yolo, kpt_shape="[2, 2]")
    (yolo / "labels" / "train" / "a.txt").write_text(f"{ROW} 0.9 0.9 0.1 0.1")
    assert opened(yolo).boxes[0].box == pytest.approx((5, 6, 25, 16))


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("2 0.5 0.5 0.1 0.1", "expected the number of a class, one of 0 to 1, got '2'"),
        ("tree 0.5 0.5 0.1 0.1", "expected the number of a class, one of 0 to 1, got 'tree'"),
        ("-1 0.5 0.5 0.1 0.1", "expected the number of a class, one of 0 to 1, got '-1'"),
        ("0", "expected `class cx cy width height` or `class x y x y x y ...`, got '' after the class"),
        (
            "0 0.5 0.5 0.1 0.1 0.9",
            "expected `class cx cy width height` or `class x y x y x y ...`, got '0.5 0.5 0.1 0.1 0.9' after the class",
        ),
        (
            "0 0.5 0.5 0.1 x",
            "expected `class cx cy width height` or `class x y x y x y ...`, got '0.5 0.5 0.1 x' after the class",
        ),
        ("0 0.5 0.5 0.1 nan", "box (cx cy width height) 0.5 0.5 0.1 nan has a coordinate that is not finite"),
        ("0 0.5 0.5 -0.1 0.1", "box (cx cy width height) 0.5 0.5 -0.1 0.1 has a negative width or height"),
        (
            "0 30 20 10 10",
            "box (cx cy width height) 30 20 10 10: expected shares of the image, from 0 to 1; divide pixels by its "
            "width and height",
        ),
    ],
)
def test_a_wrong_line(yolo: Path, row: str, reason: str) -> None:
    (yolo / "labels" / "train" / "a.txt").write_text(f"{ROW}\n{row}\n")
    assert refusal(yolo) == f"{yolo}/labels/train/a.txt: line 2: {reason}"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"names": None}, "names: expected the names of the classes as a list, got None"),
        ({"names": "[no, yes]"}, "names: 0: expected a name, got False; write it in quotes"),
        ({"names": "{a: b}"}, "names: expected numbers before the names, got 'a'"),
        ({"train": None}, "has no `train`; it has val"),
        ({"train": "none"}, "train: {yolo}/none: no such folder or list of images; correct `path` or `train`"),
        ({"train": "5"}, "train: expected a folder of images or a list of folders, got 5"),
        ({"train": "labels"}, "train: expected images, got none"),
        (
            {"train": "empty/images"},
            "train: none of the 1 images has a text file of boxes, such as {yolo}/empty/labels/d.txt",
        ),
        ({"names": "[bush, tree"}, "not valid YAML: while parsing a flow sequence"),
        ({"when": "2020-13-45"}, "not valid YAML: month must be in 1..12"),
    ],
)
def test_a_wrong_data_file(yolo: Path, changes: dict, reason: str) -> None:
    (yolo / "empty" / "images").mkdir(parents=True)
    write_image(yolo / "empty" / "images" / "d.png")
    write_data(yolo, **changes)
    assert refusal(yolo).startswith(f"{yolo}/data.yaml: {reason.format(yolo=yolo)}")


def test_a_part_must_be_chosen(yolo: Path) -> None:
    assert refusal(yolo, None) == f"{yolo}/data.yaml: has train, val; choose one with --split"
    write_data(yolo, val=None)
    assert len(opened(yolo, None)) == 2


def test_files_without_a_partner(yolo: Path) -> None:
    (yolo / "labels" / "train" / "x.txt").write_text(ROW)
    (yolo / "labels" / "train" / "classes.txt").write_text("bush\ntree\n")
    reason = f"the image of these boxes is missing from {yolo}/images/train"
    assert refusal(yolo) == f"{yolo}/labels/train/x.txt: {reason}"
    (yolo / "labels" / "train" / "x.txt").unlink()
    for name in ("images/train/._a.png", "labels/train/._a.txt"):
        (yolo / name).write_bytes(b"\0\5\x16\7")
    assert opened(yolo).summary().endswith("mended: 2 hidden files left out")


def test_names_of_a_list(yolo: Path) -> None:
    (yolo / "train.txt").write_text("images/train/A.png\nimages/train/none.png\n")
    write_data(yolo, train="train.txt")
    place = f"{yolo}/images/train"
    assert refusal(yolo) == (
        f"{place}/none.png: no such file; looked in {place}, name another folder of images with --images"
    )
    assert f"{yolo}/train.txt: line 1: no file images/train/A.png" in refusal(yolo, strict=True)


def test_a_linked_folder_is_entered_once(yolo: Path) -> None:
    (yolo / "images" / "train" / "more").symlink_to(yolo / "images" / "val")
    (yolo / "images" / "train" / "again").symlink_to(yolo / "images" / "train")
    assert [path.name for path in opened(yolo).paths] == ["a.png", "b.png", "c.png"]
