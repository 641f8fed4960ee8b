"""Data sets: what is read, what is refused with which words, and that nothing is lost."""

import json
import math
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from retinanet.common.errors import DataError
from retinanet.data import DetectionDataset, open_dataset, tile_dataset
from retinanet.data.images import check_image, image_size, read_image

PHOTO = Path(__file__).parents[1] / "fixtures" / "OSBS_029.png"


def write_image(path: Path, width: int = 60, height: int = 40, seed: int = 0) -> None:
    pixels = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    Image.frombytes("RGB", (width, height), bytes(pixels.flatten().tolist())).save(path)


def coco(**changes: object) -> dict:
    """Two images of 60 x 40, the second without boxes; categories 7 and 3."""
    content = {
        "images": [
            {"id": 10, "file_name": "a.png", "width": 60, "height": 40},
            {"id": 4, "file_name": "b.png"},
        ],
        "annotations": [
            {"id": 0, "image_id": 10, "category_id": 7, "bbox": [5, 6, 20, 10], "area": 150, "iscrowd": 0},
            {"id": 5, "image_id": 10, "category_id": 3, "bbox": [1.5, 2.5, 3.25, 4]},
            {"id": 9, "image_id": 10, "category_id": 3, "bbox": [30, 0, 30, 40], "iscrowd": 1},
        ],
        "categories": [{"id": 7, "name": "tree"}, {"id": 3, "name": "bush"}],
    }
    return content | changes


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_image(tmp_path / "a.png")
    write_image(tmp_path / "b.png", seed=1)
    return tmp_path


def opened(folder: Path, content: object, **options: object) -> DetectionDataset:
    (folder / "ann.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return open_dataset(folder / "ann.json", **options)


def refusal(folder: Path, content: object, **options: object) -> str:
    with pytest.raises(DataError) as caught:
        opened(folder, content, **options)
    return str(caught.value)


def with_annotation(**changes: object) -> dict:
    entry = {"id": 1, "image_id": 10, "category_id": 7, "bbox": [5, 6, 20, 10]} | changes
    return coco(annotations=[{key: value for key, value in entry.items() if value is not ...}])


# What is read ------------------------------------------------------------------------------------------------------


def test_coco_is_read(folder: Path) -> None:
    dataset = opened(folder, coco())
    assert (dataset.class_names, dataset.category_ids) == (("bush", "tree"), (3, 7))
    assert (dataset.image_ids, dataset.sizes, len(dataset)) == ([10, 4], [(40, 60), (40, 60)], 2)
    image, target = dataset.load(0)
    assert image.dtype == torch.uint8 and image.shape == (3, 40, 60)
    assert torch.equal(image, read_image(folder / "a.png"))
    assert target["boxes"].tolist() == [[5, 6, 25, 16], [1.5, 2.5, 4.75, 6.5]]
    assert target["boxes"].dtype == torch.float32 and target["labels"].dtype == torch.int64
    assert target["labels"].tolist() == [1, 0]
    assert target["crowd_boxes"].tolist() == [[30, 0, 60, 40]]
    assert target["image_id"] == 10


def test_images_without_boxes_are_kept(folder: Path) -> None:
    _, target = opened(folder, coco()).load(1)
    assert target["boxes"].shape == (0, 4) and target["labels"].shape == (0,) and target["crowd_boxes"].shape == (0, 4)
    assert target["image_id"] == 4


def test_content_for_pycocotools_has_source_ids_and_no_annotation_zero(folder: Path) -> None:
    content = opened(folder, coco()).coco
    assert [entry["id"] for entry in content["annotations"]] == [1, 2, 3]
    assert [entry["category_id"] for entry in content["annotations"]] == [7, 3, 3]
    assert [entry["area"] for entry in content["annotations"]] == [150, 13, 1200]
    assert [entry["iscrowd"] for entry in content["annotations"]] == [0, 0, 1]
    assert content["images"][1] == {"id": 4, "file_name": "b.png", "height": 40, "width": 60}


def test_a_returned_target_can_be_changed_without_harm(folder: Path) -> None:
    dataset = opened(folder, coco())
    dataset.load(0)[1]["boxes"].zero_()
    assert dataset.load(0)[1]["boxes"].abs().sum() > 0


@pytest.mark.parametrize("cache_bytes", [0, 2**20])
def test_cached_or_not_the_data_is_the_same_in_worker_processes(folder: Path, cache_bytes: int) -> None:
    dataset = opened(folder, coco(), cache_bytes=cache_bytes)
    again = pickle.loads(pickle.dumps(dataset))
    loaded = list(DataLoader(again, batch_size=None, num_workers=1))
    for index, (image, target) in enumerate(loaded):
        assert torch.equal(image, dataset.load(index)[0])
        assert torch.equal(target["boxes"], dataset.load(index)[1]["boxes"])


def test_images_are_decoded_lazily_without_cache(folder: Path) -> None:
    dataset = opened(folder, coco(), cache_bytes=0)
    (folder / "a.png").unlink()
    with pytest.raises(DataError, match=r"a\.png: no such file$"):
        dataset.load(0)
    assert dataset.load(1)[0].shape == (3, 40, 60)


def test_images_dir(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "ann.json").write_text(json.dumps(coco()))
    assert len(open_dataset(tmp_path / "elsewhere" / "ann.json", folder)) == 2


@pytest.mark.parametrize("overhang", [0.25, 1.0])
def test_a_box_that_overhangs_by_up_to_a_pixel_is_clipped(folder: Path, overhang: float) -> None:
    dataset = opened(folder, with_annotation(bbox=[-overhang, 10, 60 + 2 * overhang, 30 + overhang]))
    assert dataset.load(0)[1]["boxes"].tolist() == [[0, 10, 60, 40]]
    assert dataset.coco["annotations"][0]["bbox"] == [0, 10, 60, 30]


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    picture = Image.open(PHOTO).crop((0, 0, 60, 40))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: shown 40 wide, 60 high
    picture.save(tmp_path / "turned.png", exif=exif)
    assert image_size(tmp_path / "turned.png") == (60, 40)
    picture.save(tmp_path / "plain.png")
    assert torch.equal(read_image(tmp_path / "turned.png"), torch.rot90(read_image(tmp_path / "plain.png"), -1, (1, 2)))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK", "LA"])
def test_every_eight_bit_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    Image.open(PHOTO).crop((0, 0, 30, 20)).convert(mode).save(path)
    assert read_image(path).shape == (3, 20, 30)


def test_the_vendored_photograph() -> None:
    dataset = open_dataset(PHOTO.parent, voc_one_based=False)
    image, target = dataset.load(0)
    assert image.shape == (3, 400, 400) and dataset.class_names == ("Tree",)
    assert len(target["boxes"]) == 61 and target["boxes"][0].tolist() == [203, 67, 227, 90]


# VOC ---------------------------------------------------------------------------------------------------------------


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
    """The corners of VOC are 1-based and inclusive: x = xmin - 1, width = xmax - xmin + 1."""
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
    assert str(caught.value) == f"{folder}/a.xml: object 1: class 'tree' is none of the known classes (zebra)"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (voc_xml(voc_object("tree", 9, 1, 5, 5)), "object 1: bndbox (xmin ymin xmax ymax) 9 1 5 5 is inverted"),
        (
            voc_xml(voc_object("tree", 1, 1, 70, 5)),
            "object 1: bndbox (xmin ymin xmax ymax) 1 1 70 5 reaches 10 pixels out of its image of 60 x 40 pixels"
            " (up to 1 is clipped)",
        ),
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


# What is refused ---------------------------------------------------------------------------------------------------

IN_IMAGE = "its image of 60 x 40 pixels"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"bbox": [70, 5, 5, 5]}, f"bbox [70, 5, 5, 5] lies outside {IN_IMAGE}"),
        ({"bbox": [-9, 5, 9, 5]}, f"bbox [-9, 5, 9, 5] lies outside {IN_IMAGE}"),
        ({"bbox": [-0.5, 5, 0.5, 5]}, f"bbox [-0.5, 5, 0.5, 5] lies outside {IN_IMAGE}"),
        (
            {"bbox": [50, 5, 12, 5]},
            f"bbox [50, 5, 12, 5] reaches 2 pixels out of {IN_IMAGE} (up to 1 is clipped)",
        ),
        (
            {"bbox": [5, -1.5, 5, 5]},
            f"bbox [5, -1.5, 5, 5] reaches 1.5 pixels out of {IN_IMAGE} (up to 1 is clipped)",
        ),
        (
            {"bbox": [5, 5, 0, 5]},
            "bbox [5, 5, 0, 5] has width or height <= 0, expected [x, y, width, height]",
        ),
        (
            {"bbox": [5, 5, 5, -1]},
            "bbox [5, 5, 5, -1] has width or height <= 0, expected [x, y, width, height]",
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
    ],
)
def test_wrong_annotation(folder: Path, changes: dict, reason: str) -> None:
    assert refusal(folder, with_annotation(**changes)) == f"{folder}/ann.json: annotation 1: {reason}"


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
        ('{"images": [', "line 1: expected JSON, got an error: Expecting value"),
        (
            coco(categories=[{"id": 7, "name": "a"}, {"id": 7, "name": "b"}], annotations=[]),
            "categories[1]: category id 7 is already used by 'a'",
        ),
        (
            coco(categories=[{"id": 7, "name": "a"}, {"id": 3, "name": "a"}], annotations=[]),
            "categories[1]: category name 'a' is already used by another id than 3",
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


def test_duplicate_annotation_id(folder: Path) -> None:
    entry = {"id": 6, "image_id": 10, "category_id": 7, "bbox": [5, 6, 20, 10]}
    message = refusal(folder, coco(annotations=[entry, entry]))
    assert message == f"{folder}/ann.json: annotation 6: annotation id 6 is used more than once"


def test_missing_image(folder: Path) -> None:
    (folder / "b.png").unlink()
    assert refusal(folder, coco()) == f"{folder}/ann.json: image 4 (b.png): {folder}/b.png: no such file"


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


def test_a_jpeg_that_is_cut_short_is_found_before_training(tmp_path: Path) -> None:
    Image.open(PHOTO).save(tmp_path / "a.jpg", quality=95)
    check_image(tmp_path / "a.jpg")
    whole = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(whole[: len(whole) * 3 // 4])
    with pytest.raises(DataError, match=r"a\.jpg: cannot be decoded as an image"):
        check_image(tmp_path / "a.jpg")


def test_deep_images_are_refused_instead_of_clipped(tmp_path: Path) -> None:
    Image.new("I;16", (8, 8), 40000).save(tmp_path / "deep.png")
    with pytest.raises(DataError, match=r"deep\.png: .*expected 8 bits per channel, got pixel mode I;16"):
        read_image(tmp_path / "deep.png")


def test_size_that_contradicts_the_file(folder: Path) -> None:
    content = coco(images=[{"id": 10, "file_name": "a.png", "width": 40, "height": 60}], annotations=[])
    stated = "the annotations say 40 x 60 pixels"
    found = f"{folder}/a.png is 60 x 40 (width x height, EXIF orientation applied)"
    assert refusal(folder, content) == f"{folder}/ann.json: image 10 (a.png): {stated}, {found}"


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
    assert lines[5:] == [f"{folder}/ann.json: 7 wrong entries in total, of which the first 5 are shown"]


def test_other_classes_than_expected(folder: Path) -> None:
    message = refusal(folder, coco(), class_names=("tree", "bush"))
    assert message == f"{folder}/ann.json: categories: expected the classes tree, bush; got bush, tree"


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
