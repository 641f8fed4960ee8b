"""Opening folders of Pascal VOC xml files."""

from pathlib import Path

import pytest
import torch
from dataset_cases import folder, opened, write_image  # noqa: F401  fixture

from retinanet.common.errors import DataError
from retinanet.data import open_dataset


def voc_xml(objects: str, filename: str = "a.png", size: tuple[int, int] = (60, 40)) -> str:
    width, height = size
    return (
        f"<annotation><filename>{filename}</filename><size><width>{width}</width><height>{height}</height></size>"
        f"{objects}</annotation>"
    )


def voc_object(name: str, *corners: object, difficult: int = 0) -> str:
    tags = "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True))
    return f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>{tags}</bndbox></object>"


def test_voc_and_coco_give_the_same_data(folder: Path) -> None:
    """VOC's corners are 1-based and inclusive: x = xmin - 1, width = xmax - xmin + 1."""
    voc = folder / "voc"
    voc.mkdir()
    objects = (
        voc_object("tree", 6, 7, 25, 16)
        + voc_object("bush", 1, 1, 60, 40)
        + voc_object("bush", 3, 3, 9, 9, difficult=1)
    )
    (voc / "a.xml").write_text(voc_xml(objects))
    (voc / "b.xml").write_text(voc_xml("", filename="C:\\photos\\b.png", size=(0, 0)))
    content = {
        "images": [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "b.png"}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 2, "bbox": [5, 6, 20, 10]},
            {"id": 2, "image_id": 1, "category_id": 1, "bbox": [0, 0, 60, 40]},
            {"id": 3, "image_id": 1, "category_id": 1, "bbox": [2, 2, 7, 7], "iscrowd": 1},
        ],
        "categories": [{"id": 1, "name": "bush"}, {"id": 2, "name": "tree"}],
    }
    ours, theirs = open_dataset(voc, folder), opened(folder, content)
    assert ours.coco == theirs.coco
    assert (ours.class_names, ours.category_ids) == (theirs.class_names, theirs.category_ids)
    for index in range(2):
        (image, target), (expected_image, expected) = ours.load(index), theirs.load(index)
        assert torch.equal(image, expected_image)
        assert all(torch.equal(target[key], expected[key]) for key in ("boxes", "labels", "crowd_boxes"))


def test_voc_finds_the_jpegimages_beside_annotations(tmp_path: Path) -> None:
    (tmp_path / "JPEGImages").mkdir()
    (tmp_path / "Annotations").mkdir()
    write_image(tmp_path / "JPEGImages" / "a.png")
    (tmp_path / "Annotations" / "a.xml").write_text(voc_xml(voc_object("tree", 1, 1, 5, 5)))
    assert open_dataset(tmp_path / "Annotations").paths == [tmp_path / "JPEGImages" / "a.png"]


def test_voc_takes_the_order_of_labels_from_the_training_set(folder: Path) -> None:
    (folder / "a.xml").write_text(voc_xml(voc_object("tree", 1, 1, 5, 5)))
    dataset = open_dataset(folder, class_names=("zebra", "tree"))
    assert dataset.class_names == ("zebra", "tree") and dataset.load(0)[1]["labels"].tolist() == [1]
    with pytest.raises(DataError) as caught:
        open_dataset(folder, class_names=("zebra",))
    assert str(caught.value) == f"{folder}/a.xml: object 1: expected a class among zebra, got 'tree'"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (voc_xml(voc_object("tree", 9, 1, 5, 5)), "object 1: bndbox (xmin ymin xmax ymax) 9 1 5 5 is inverted"),
        (
            voc_xml(voc_object("tree", 1, "x", 5, 5)),
            "object 1: bndbox must have four numbers xmin, ymin, xmax, ymax, got xmin 1, ymin x, xmax 5, ymax 5",
        ),
        (voc_xml(voc_object("", 1, 1, 5, 5)), "object 1: expected a class in <name>, got nothing"),
        (
            voc_xml(voc_object("tree", 1, 1, "nan", 5)),
            "object 1: bndbox (xmin ymin xmax ymax) 1 1 nan 5 has a coordinate that is not finite",
        ),
        ("<annotation>", "line 1: not well-formed xml (no element found: line 1, column 12)"),
        ("<x/>", "the root element must be <annotation>, got <x>"),
    ],
)
def test_wrong_voc(folder: Path, text: str, reason: str) -> None:
    (folder / "a.xml").write_text(text)
    with pytest.raises(DataError) as caught:
        open_dataset(folder)
    assert str(caught.value) == f"{folder}/a.xml: {reason}"


def test_voc_folder_without_xml(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected Pascal VOC annotations, got a folder without xml files$"):
        open_dataset(tmp_path)
