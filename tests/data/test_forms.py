"""Which annotations a path leads to."""

from pathlib import Path

import pytest

from retinanet.common.errors import DataError
from retinanet.data.forms import Form, find_annotations


@pytest.mark.parametrize(
    ("files", "found", "form"),
    [
        (["data.yaml", "images/a.png", "labels/a.txt", "notes.json"], "data.yaml", Form.YOLO),
        (["a.xml", "a.png", "notes.txt"], "", Form.VOC),
        (["Annotations/a.xml", "notes.json"], "", Form.VOC),
        (["a.json", "a.tif", "a.tif.aux.xml", ".b.xml", ".idea/misc.xml"], "a.json", Form.COCO),
        (["sub/a.XML"], "", Form.VOC),
        (["Annotations/a.xml", "JPEGImages/a.jpg"], "", Form.VOC),
        (["_annotations.coco.json", "a.jpg", "README.txt", "._x.json"], "_annotations.coco.json", Form.COCO),
        (["boxes.CSV", "a.jpg"], "boxes.CSV", Form.CSV),
    ],
)
def test_annotations_in_a_folder(tmp_path: Path, files: list[str], found: str, form: Form) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert find_annotations(tmp_path) == (tmp_path / found, form)


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        (["a.png"], "expected annotations, got a folder without xml, json or CSV files"),
        (["train.json", "val.json"], "expected one file of annotations, got train.json, val.json; name one"),
        (
            ["sub/a.xml", "b.json"],
            "expected one form of annotations, got xml files and b.json; name the file to use, or move it out of the "
            "folder to use the xml files",
        ),
        (
            ["images/a.png", "labels/a.txt"],
            "expected annotations, got a folder without xml, json or CSV files; YOLO needs a data.yaml with the names "
            "of the classes",
        ),
    ],
)
def test_a_folder_without_annotations(tmp_path: Path, files: list[str], reason: str) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(DataError) as caught:
        find_annotations(tmp_path)
    assert str(caught.value) == f"{tmp_path}: {reason}"


@pytest.mark.parametrize(
    ("name", "form"),
    [("a.json", Form.COCO), ("a", Form.COCO), ("a.XML", Form.VOC), ("a.txt", Form.VOC), ("a.yml", Form.YOLO)],
)
def test_a_file_has_the_form_of_its_suffix(name: str, form: Form) -> None:
    assert find_annotations(name) == (Path(name), form)
