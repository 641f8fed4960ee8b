"""`retinanet check` and `retinanet tile`: their reports, outputs and refusals."""

import errno
import json
import os
from pathlib import Path

import pytest
from cli_cases import data, make_data, model_file, one_error, run  # noqa: F401  fixtures
from PIL import Image

from retinanet.cli import check
from retinanet.common.errors import DataError
from retinanet.data import open_dataset

PHOTO = Path(__file__).parents[1] / "fixtures" / "OSBS_029.xml"


def test_check_of_a_photograph(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model.json").write_text('{"min_size": null, "anchor_sizes": [[8], [16], [32], [64], [128]]}')
    (tmp_path / "photo.xml").write_text(PHOTO.read_text().replace("OSBS_029.tif", "OSBS_029.png"))
    arguments = ("--images", PHOTO.parent, "--voc-zero-based", "--config", tmp_path / "model.json", "--strict")
    assert run("check", tmp_path / "photo.xml", *arguments, "--json", tmp_path / "report.json") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:4] == [
        f"{tmp_path}/photo.xml: Pascal VOC xml; 1 images, 61 boxes, 1 classes",
        "no errors",
        "classes:",
        "  Tree       61 boxes  100.0 %  in 1 images",
    ]
    assert (
        lines[4]
        == "images: shorter side 400 / 400 / 400, longer side 400 / 400 / 400 pixels (smallest / median / largest)"
    )
    (report,) = json.loads((tmp_path / "report.json").read_text())
    assert report["statistics"]["classes"] == [{"name": "Tree", "boxes": 61, "images": 1}]
    assert report["errors"] == report["mended"] == report["notes"] == []
    below = report["anchors"]["fg_iou_threshold"]
    assert below["threshold"] == 0.5 and 0 < below["share_below"] < 1
    share = f"{100 * below['share_below']:.1f} %"
    assert lines[-2].startswith("anchors, with images as they are: the best IoU is below 0.4 for ")
    assert lines[-2].endswith(f" % of the boxes, below 0.5 for {share}")


def test_check_of_a_mended_set_succeeds_unless_it_is_strict(tmp_path: Path, capsys) -> None:
    path = make_data(tmp_path)
    content = json.loads(path.read_text())
    content["annotations"][0]["bbox"][2] = 0
    path.write_text(json.dumps(content))
    assert run("check", path) == 0
    text = capsys.readouterr().out
    assert "\nno errors\nmended when it is read, refused with --strict: 1\n  1 box without area left out:\n    " in text
    assert run("check", path, "--strict") == 3
    assert "\nerrors: 1\n  1 box without area:\n    " in capsys.readouterr().out


def test_check_of_a_set_without_objects(tmp_path: Path, capsys) -> None:
    path = make_data(tmp_path)
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "annotations": []}))
    assert run("check", path) == 3
    assert f"    {path}: none of the 6 images has a box\n" in capsys.readouterr().out


def test_anchors_are_matched_on_a_part_of_many_images(tmp_path: Path, monkeypatch, capsys) -> None:
    path = make_data(tmp_path)
    for most, note in ((6, ""), (4, "; matched on 4 of the 6 images")):
        monkeypatch.setattr(check, "MATCHED_IMAGES", most)
        assert run("check", path) == 0
        (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("anchors, "))
        assert line.endswith(f" %{note}")


def test_check_of_all_parts_of_a_yolo_set(tmp_path: Path, capsys) -> None:
    for part, row in (("train", "0 0.5 0.5 0.2 0.2"), ("val", "0 0.5 0.5 0.2 0.2\n7 0.5 0.5 0.2 0.2")):
        (tmp_path / "images" / part).mkdir(parents=True)
        (tmp_path / "labels" / part).mkdir(parents=True)
        Image.new("RGB", (64, 48)).save(tmp_path / "images" / part / "a.png")
        (tmp_path / "labels" / part / "a.txt").write_text(row)
        Image.new("RGB", (64, 48), (9, 9, 9)).save(tmp_path / "images" / part / "b.png")
        (tmp_path / "labels" / part / "b.txt").write_text("0 0.5 0.5 0.2 0.2")
    (tmp_path / "data.yaml").write_text("train: images/train\nval: images/val\nnames: [square]\n")
    assert run("check", tmp_path / "data.yaml", "--split", "train") == 0
    assert run("check", tmp_path, "--fix", tmp_path / "clean") == 3
    text = capsys.readouterr().out
    assert text.count(": YOLO, train; 2 images, 2 boxes") == 2 and text.count(": YOLO, val; 2 images, 2 boxes") == 1
    assert f"    {tmp_path}/labels/val/a.txt: line 2: expected the number of a class, one of 0 to 0, got '7'\n" in text
    for part, names in (("train", ["a.png", "b.png"]), ("val", ["b.png"])):
        dataset = open_dataset(tmp_path / "clean" / f"{part}.json", strict=True)
        assert dataset.paths == [tmp_path / "clean" / "images" / part / name for name in names]
        assert len(dataset.boxes) == len(names)


def test_a_part_that_cannot_be_read_leaves_the_reports_of_the_others(tmp_path: Path, capsys) -> None:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (64, 48)).save(tmp_path / "images" / "a.png")
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "a.txt").write_text("0 0.5 0.5 0.2 0.2")
    data = tmp_path / "data.yaml"
    data.write_text("train: none\nval: images\nnames: [square]\n")
    assert run("check", data, "--json", tmp_path / "report.json", "--fix", tmp_path / "clean") == 3
    text = capsys.readouterr().out
    unread = f"errors: 1\n  1 unreadable annotation:\n    {data}: train: {tmp_path}/none: no such folder"
    assert f"{data}: train cannot be read\n{unread}" in text
    assert ": YOLO, val; 1 images, 1 boxes" in text
    unread, read = json.loads((tmp_path / "report.json").read_text())
    assert unread.keys() == read.keys() and unread["part"] == "train"
    assert [file.name for file in (tmp_path / "clean").glob("*.json")] == ["val.json"]


def same_names(folder: Path) -> Path:
    """Write three pictures whose names are alike but for the number that a copy would add."""
    path = make_data(folder, 3)
    content = json.loads(path.read_text())
    for entry, name in zip(content["images"], ("x/a.png", "A_2.png", "y/a.png"), strict=True):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / f"{entry['id']}.png").rename(folder / name)
        entry["file_name"] = name
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("linked", [True, False])
def test_a_clean_copy_leaves_the_originals_alone(tmp_path: Path, monkeypatch, linked: bool) -> None:
    path = same_names(tmp_path)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*.png")}

    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    if not linked:
        monkeypatch.setattr(os, "link", refuse)
    assert run("check", path, "--fix", tmp_path / "clean") == 0
    assert {file: file.read_bytes() for file in before} == before
    copies = open_dataset(tmp_path / "clean" / "annotations.json").paths
    assert [copy.name for copy in copies] == ["a.png", "A_2.png", "a_3.png"]
    assert [copy.read_bytes() for copy in copies] == [file.read_bytes() for file in open_dataset(path).paths]
    assert {copy.stat().st_nlink for copy in copies} == {1 + linked}


def test_tiles_of_images_with_one_name_are_kept_apart(tmp_path: Path) -> None:
    path = same_names(tmp_path)
    assert run("tile", path, tmp_path / "tiles", "--tile", 64) == 0
    names = [file.name for file in open_dataset(tmp_path / "tiles" / "annotations.json").paths]
    assert names == [f"{stem}_00000_00000.png" for stem in ("a", "A_2", "a_3")]


def test_check_takes_the_classes_of_a_model(model_file: Path, tmp_path: Path, capsys) -> None:
    Image.new("RGB", (64, 48)).save(tmp_path / "a.png")
    (tmp_path / "boxes.csv").write_text("a.png,5,6,25,16,square\na.png,5,6,25,16,tree\n")
    assert run("check", tmp_path / "boxes.csv", "--model", model_file) == 3
    assert "boxes.csv: line 2: expected a class among square, got 'tree'\n" in capsys.readouterr().out

    path = make_data(tmp_path / "coco", 1, ("square", "tree"))
    assert run("check", path, "--model", model_file) == 3
    assert f"{path}: class tree: expected a class of the model (square)\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["none.json"], 3, "none.json: no such file"),
        (["ann.json", "--fix", "full"], 2, "full: expected a new or empty folder"),
        (["ann.json", "--fix", "1.png/clean"], 2, "1.png/clean: expected a folder for the output, got a file or a "),
        (["ann.json", "--json", "ann.json"], 2, "ann.json: output would overwrite an input or another output: ann"),
        (["ann.json", "--split", "val"], 2, "--split val: expected only with a YOLO data set, got ann.json, a COCO "),
        (["ann.json", "--json", "none/report.json"], 2, "none/report.json: cannot be written"),
        (["ann.json", "--config", "wrong.json"], 3, "wrong.json: min_size: expected "),
        (["ann.json", "--csv-columns", "path,x1"], 2, "--csv-columns: expected columns such as path,x1,y1"),
    ],
)
def test_refusals_of_check(tmp_path: Path, monkeypatch, capsys, arguments: list, code: int, message: str) -> None:
    make_data(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    (tmp_path / "wrong.json").write_text('{"min_size": "large"}')
    monkeypatch.chdir(tmp_path)
    assert run("check", *arguments) == code
    assert message in capsys.readouterr().err


def test_nothing_is_left_to_fix(tmp_path: Path, capsys) -> None:
    path = make_data(tmp_path)
    for number in range(1, 7):
        (tmp_path / f"{number}.png").unlink()
    assert run("check", path, "--fix", tmp_path / "clean") == 3
    assert one_error(capsys) == f"{path}: no image is free of errors, so nothing is left for a clean copy"
    assert not (tmp_path / "clean").exists()


def test_tile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "tiles"
    assert run("tile", PHOTO, out, "--voc-zero-based", "--tile", 150, "--overlap", 25) == 0
    tiles = open_dataset(out / "annotations.json", strict=True)
    assert len(tiles) == 9 and set(tiles.sizes) == {(150, 150)}
    assert f"{out}/annotations.json: 9 tiles, {len(tiles.boxes)} boxes\n" in capsys.readouterr().out
    assert run("tile", PHOTO, out) == 2
    assert one_error(capsys) == f"{out}: expected a new or empty folder"
    assert run("tile", PHOTO, tmp_path / "more", "--tile", 100, "--overlap", 100) == 2
    assert one_error(capsys) == "--overlap: expected less than --tile 100, got 100"


def test_tile_cuts_an_image_above_the_limit(tmp_path: Path, monkeypatch, capsys) -> None:
    path = make_data(tmp_path, 1)
    # The limit is lowered, because an image above the real one would take seconds.
    monkeypatch.setitem(open_dataset.__kwdefaults__, "max_pixels", 1000)
    with pytest.raises(DataError, match="64 x 48 pixels are more than 1,000; cut the image with `retinanet tile`"):
        open_dataset(path)
    assert run("tile", path, tmp_path / "tiles", "--tile", 32) == 0
    assert len(list((tmp_path / "tiles" / "images").iterdir())) == 4


def test_an_image_that_cannot_be_cut_leaves_no_folder(tmp_path: Path, capsys) -> None:
    path = make_data(tmp_path, 2)
    Image.effect_noise((64, 48), 90).convert("RGB").save(tmp_path / "2.jpg")
    (tmp_path / "2.png").write_bytes((tmp_path / "2.jpg").read_bytes()[:1500])
    assert run("tile", path, tmp_path / "tiles", "--tile", 32) == 3
    assert one_error(capsys).startswith(f"{tmp_path}/2.png: cannot be decoded as an image")
    assert sorted(tmp_path.glob("*tiles*")) == []
