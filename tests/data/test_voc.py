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
        (voc_xml(voc_object("", 1, 1, 5, 5)), "object 1: expected a class, got nothing"),
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
    (tmp_path / "Annotations").mkdir()
    with pytest.raises(
        DataError, match=r"Annotations: expected Pascal VOC annotations, got a folder without xml files$"
    ):
        open_dataset(tmp_path)


def write_devkit(root: Path) -> Path:
    """Write a VOC devkit with three images, of which a list names two, and return its root."""
    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / name).mkdir(parents=True)
    for name in "abc":
        write_image(root / "JPEGImages" / f"{name}.jpg")
        (root / "Annotations" / f"{name}.xml").write_text(voc_xml(voc_object("tree", 1, 1, 5, 5), f"{name}.jpg"))
    (root / "ImageSets" / "Main" / "train.txt").write_text("a\nc\n\n")
    (root / "ImageSets" / "Main" / "tree_val.txt").write_text("b  1\na -1\n")
    return root


def test_a_devkit_and_its_lists(tmp_path: Path) -> None:
    root = write_devkit(tmp_path / "VOC2012")
    images = root / "JPEGImages"
    assert open_dataset(root).paths == [images / "a.jpg", images / "b.jpg", images / "c.jpg"]
    assert open_dataset(root / "ImageSets" / "Main" / "train.txt").paths == [images / "a.jpg", images / "c.jpg"]
    assert open_dataset(root / "ImageSets" / "Main" / "tree_val.txt").paths == [images / "b.jpg", images / "a.jpg"]
    assert open_dataset(root / "Annotations" / "b.xml").paths == [images / "b.jpg"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a\nx\n", ": line 2: {root}/Annotations/x.xml: no such file"),
        ("", ": expected the name of an image in each line, got an empty file"),
        ("aa\0", ": line 1: {root}/Annotations/aa\\x00.xml: no such file"),
    ],
)
def test_a_wrong_list(tmp_path: Path, text: str, reason: str) -> None:
    root = write_devkit(tmp_path / "VOC2012")
    path = root / "ImageSets" / "Main" / "wrong.txt"
    path.write_text(text)
    with pytest.raises(DataError) as caught:
        open_dataset(path)
    assert str(caught.value) == str(path) + reason.format(root=root)
    (tmp_path / "list.txt").write_text("a")
    with pytest.raises(DataError, match="expected a list of a Pascal VOC folder, .* for YOLO, give the data.yaml$"):
        open_dataset(tmp_path / "list.txt")


def test_sub_folders_of_xml_files(folder: Path) -> None:
    """Each xml file goes with the image in the sub-folder of the same name, or else with the one in the top folder."""
    for name, seed in (("day", 2), ("night", 3)):
        (folder / "xml" / name).mkdir(parents=True)
        (folder / "photos" / name).mkdir(parents=True)
        write_image(folder / "photos" / name / "a.png", seed=seed)
        (folder / "xml" / name / "a.xml").write_text(voc_xml(voc_object("tree", 1, 1, 5, 5)))
    write_image(folder / "photos" / "b.png")
    (folder / "xml" / "night" / "b.xml").write_text(voc_xml("", "b.png"))
    dataset = open_dataset(folder / "xml", folder / "photos", strict=True)
    names = [path.relative_to(folder / "photos").as_posix() for path in dataset.paths]
    assert names == ["day/a.png", "night/a.png", "b.png"]


@pytest.mark.parametrize(
    ("filename", "files", "found", "mended"),
    [
        # The stated image is taken, although one of the same name lies beside it.
        ("cam/a.png", ["cam/a.png", "a.png"], "cam/a.png", None),
        ("cam\\a.png", ["cam/a.png", "a.png"], "cam/a.png", "1 file name with backslashes read with slashes"),
        ("A.PNG", ["a.png"], "a.png", "1 file name in another case matched"),
        ("/data/a.png", ["a.png"], "a.png", "1 image stated in another folder found by name"),
        ("a", ["a.png"], "a.png", "1 image of another name or suffix than stated found"),
        ("x.png", ["a.JPG"], "a.JPG", "1 image of another name or suffix than stated found"),
        ("x.png", ["x.gif", "a.png"], "x.gif", "1 image of another name or suffix than stated found"),
        ("", ["a.jfif"], "a.jfif", None),
    ],
)
def test_the_image_of_an_xml_file(tmp_path: Path, filename: str, files: list, found: str, mended: str | None) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_image(tmp_path / name)
    (tmp_path / "a.xml").write_text(voc_xml(voc_object("tree", 1, 1, 5, 5), filename))
    dataset = open_dataset(tmp_path)
    assert dataset.paths == [tmp_path / found]
    assert dataset.summary().partition("; mended: ")[2] == (mended or "")
    if mended:
        with pytest.raises(DataError, match=r"a\.xml: no file .*; .* fits$"):
            open_dataset(tmp_path, strict=True)


@pytest.mark.parametrize(
    ("filename", "files"), [("A.png", ["a.png", "a.PNG"]), ("", ["a.png", "a.jpg"]), ("x.png", ["a.png", "a.bmp"])]
)
def test_several_images_fit_an_xml_file(tmp_path: Path, filename: str, files: list) -> None:
    for name in files:
        write_image(tmp_path / name)
    (tmp_path / "a.xml").write_text(voc_xml(voc_object("tree", 1, 1, 5, 5), filename))
    with pytest.raises(DataError) as caught:
        open_dataset(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}/a.xml: the name fits several files (a.")


@pytest.mark.parametrize(
    ("xml", "images", "searched"),
    [
        # An image of this name in another folder than that of the xml file may be another one.
        ("a.xml", ["day/a.png", "night/a.png"], ["photos"]),
        ("day/a.xml", ["night/a.png"], ["photos/day", "photos"]),
    ],
)
def test_an_image_in_folders_that_are_not_searched(tmp_path: Path, xml: str, images: list, searched: list) -> None:
    for file in (f"xml/{xml}", *(f"photos/{name}" for name in images)):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    for name in images:
        write_image(tmp_path / "photos" / name)
    (tmp_path / "xml" / xml).write_text(voc_xml(voc_object("tree", 1, 1, 5, 5)))
    with pytest.raises(DataError) as caught:
        open_dataset(tmp_path / "xml", tmp_path / "photos")
    looked = " and ".join(f"{tmp_path}/{folder}" for folder in searched)
    reason = f"no such file; looked in {looked}, name another folder of images with --images"
    assert str(caught.value) == f"{tmp_path}/xml/{xml}: {tmp_path}/photos/a.png: {reason}"


def test_the_image_in_the_folder_of_the_xml_file_comes_first(folder: Path) -> None:
    for name in ("xml/day", "day"):
        (folder / name).mkdir(parents=True)
    write_image(folder / "day" / "a.png", seed=2)
    (folder / "xml" / "day" / "a.xml").write_text(voc_xml(voc_object("tree", 1, 1, 5, 5)))
    assert open_dataset(folder / "xml", folder, strict=True).paths == [folder / "day" / "a.png"]


def test_two_xml_files_of_one_image(folder: Path) -> None:
    for name in ("a.xml", "c.xml"):
        (folder / name).write_text(voc_xml(voc_object("tree", 1, 1, 5, 5)))
    with pytest.raises(DataError) as caught:
        open_dataset(folder)
    reason = f"the file {folder}/a.png is also that of {folder}/a.xml; merge the two entries"
    assert str(caught.value) == f"{folder}/c.xml: {reason}"


def test_hidden_files_are_left_out(folder: Path) -> None:
    (folder / "a.xml").write_text(voc_xml(voc_object("tree", 1, 1, 5, 5)))
    (folder / "._a.xml").write_bytes(b"\0\5\x16\7Mac OS X")
    assert open_dataset(folder).summary().endswith("; mended: 1 hidden file left out")
    with pytest.raises(DataError, match=r"\._a\.xml: hidden, so probably no part of the data$"):
        open_dataset(folder, strict=True)


@pytest.mark.parametrize(
    ("declared", "written", "name", "mended"),
    [
        ("gbk", "gbk", "树木", False),
        ("Shift_JIS", "shift_jis", "木", False),
        ("big5", "big5", "樹", False),
        ("ISO-8859-1", "latin-1", "bäume", False),
        ("utf-16", "utf-16", "树", False),
        ("unicode", "utf-8", "树", True),
        ("utf-16", "utf-8", "树", True),
        ("hex", "utf-8", "tree", True),
    ],
)
def test_encodings_of_xml(folder: Path, declared: str, written: str, name: str, mended: bool) -> None:
    text = f'<?xml version="1.0" encoding="{declared}"?>\n' + voc_xml(voc_object(name, 1, 1, 5, 5))
    (folder / "a.xml").write_bytes(text.encode(written))
    dataset = open_dataset(folder)
    assert dataset.class_names == (name,)
    assert ("1 file of an unknown encoding read as UTF-8" in dataset.summary()) == mended


@pytest.mark.parametrize("declared", ["gbk", "klingon", "utf-8"])
def test_bytes_that_do_not_fit_the_declared_encoding(folder: Path, declared: str) -> None:
    text = f'<?xml version="1.0" encoding="{declared}"?>' + voc_xml(voc_object("tree", 1, 1, 5, 5))
    (folder / "a.xml").write_bytes(text.encode().replace(b"tree", b"tr\xff\xff"))
    with pytest.raises(DataError, match=r"a\.xml: (line 1: )?not (readable as|well-formed) xml"):
        open_dataset(folder)
