"""How the commands read data: `--strict`, `--split`, and data that is refused before any work starts."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_cases import data, make_data, model_file, one_error, run, train_arguments  # noqa: F401  fixtures
from PIL import Image


def changed(source: Path, folder: Path, change: Callable[[dict], object]) -> Path:
    """Write a changed copy of a COCO json that still reads the images of the original."""
    content = json.loads(source.read_text())
    for image in content["images"]:
        image["file_name"] = str(source.parent / image["file_name"])
    change(content)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ann.json").write_text(json.dumps(content))
    return folder / "ann.json"


def all_crowd(content: dict) -> None:
    for annotation in content["annotations"]:
        annotation["iscrowd"] = 1


def test_nothing_to_learn_from_is_said_before_training(data: Path, tmp_path: Path, capsys) -> None:
    crowd = changed(data, tmp_path, all_crowd)
    assert run(*train_arguments(crowd, tmp_path / "run")) == 3
    assert one_error(capsys).startswith(f"{crowd}: nothing to learn from: all 6 boxes are marked iscrowd or difficult")
    assert run(*train_arguments(data, tmp_path / "run", "--val", crowd)) == 3
    assert one_error(capsys).startswith(f"{crowd}: AP is undefined on this validation set: all 6 boxes are marked")
    assert not (tmp_path / "run").exists()


def test_an_image_that_resizing_makes_vanish_is_refused(data: Path, model_file: Path, tmp_path: Path, capsys) -> None:
    Image.new("RGB", (3000, 2)).save(tmp_path / "line.png")

    def with_a_line(content: dict) -> None:
        content["images"].append({"id": 99, "file_name": str(tmp_path / "line.png")})

    elongated = changed(data, tmp_path, with_a_line)
    expected = f"{elongated}: {tmp_path / 'line.png'}: 3000 x 2 pixels are too elongated"
    assert run(*train_arguments(elongated, tmp_path / "run", "--min-size", 64, "--max-size", 128)) == 3
    assert one_error(capsys).startswith(expected)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("strict", [False, True])
def test_strict(data: Path, model_file: Path, tmp_path: Path, capsys, strict: bool) -> None:
    def flatten(content: dict) -> None:
        content["annotations"][0]["bbox"][3] = 0

    flat = changed(data, tmp_path, flatten)
    code = run("evaluate", model_file, flat, "--device", "cpu", *(["--strict"] if strict else []))
    assert code == (3 if strict else 0)
    if strict:
        assert one_error(capsys).startswith(f"{flat}: annotation 1: bbox [")
    else:
        assert "6 images, 5 boxes, 1 classes, 1 images without boxes; mended: 1 box without area left out" in (
            capsys.readouterr().out
        )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda content: content["annotations"].clear(), "none of the 6 images has a box"),
        (all_crowd, "all 6 boxes are marked iscrowd or difficult"),
    ],
)
def test_anchors_for_no_objects(data: Path, tmp_path: Path, capsys, change: Callable, reason: str) -> None:
    empty = changed(data, tmp_path, change)
    assert run("anchors", "fit", empty, "--output", tmp_path / "anchors.json") == 3
    assert one_error(capsys).startswith(f"{empty}: nothing to learn from: {reason}")
    assert not (tmp_path / "anchors.json").exists()


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("boxes/ann.json", "COCO json"),
        ("xml", "Pascal VOC xml"),
        ("xml/1.xml", "Pascal VOC xml"),
        ("boxes.csv", "CSV table"),
    ],
)
def test_data_without_parts(tmp_path: Path, capsys, name: str, form: str) -> None:
    for file in ("boxes/ann.json", "xml/1.xml", "boxes.csv"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    assert run("check", tmp_path / name, "--split", "val") == 2
    reason = f"expected only with a YOLO data set, got {tmp_path / name}, a {form}; leave it out"
    assert one_error(capsys) == f"--split val: {reason}"


def write_yolo(folder: Path) -> Path:
    """Write a YOLO data set that has a training part and no other, and return its data file."""
    for name in ("images", "labels"):
        (folder / name).mkdir()
    Image.new("RGB", (64, 48)).save(folder / "images" / "a.png")
    (folder / "labels" / "a.txt").write_text("0 0.5 0.5 0.2 0.2")
    (folder / "data.yaml").write_text("train: images\nnames: [square]\n")
    return folder / "data.yaml"


@pytest.mark.parametrize("command", ["anchors", "check", "evaluate", "tile"])
def test_commands_refuse_a_part_that_is_not_there(
    data: Path, model_file: Path, tmp_path: Path, capsys, command: str
) -> None:
    yolo, output = write_yolo(tmp_path), tmp_path / "output"
    before, after = {
        "anchors": (["anchors", "fit"], ["--output", output]),
        "check": (["check"], []),
        "evaluate": (["evaluate", model_file], ["--device", "cpu"]),
        "tile": (["tile"], [output]),
    }[command]
    assert run(*before, yolo, *after, "--split", "test") == 3
    assert one_error(capsys) == f"{yolo}: has no `test`; it has train"
    assert run(*before, data, *after, "--split", "test") == 2
    assert one_error(capsys).startswith(f"--split test: expected only with a YOLO data set, got {data}, a COCO json")
    assert run(*before, yolo, *after, "--split", "fly") == 2
    assert one_error(capsys).startswith("--split: invalid choice: 'fly' (choose from ")
    assert not output.exists()


def test_the_part_that_a_command_reads_by_default(model_file: Path, tmp_path: Path, capsys) -> None:
    yolo = write_yolo(tmp_path)
    assert run("evaluate", model_file, yolo, "--device", "cpu") == 3
    assert one_error(capsys) == f"{yolo}: has no `val`; it has train"
    assert run("tile", yolo, tmp_path / "tiles") == 0
