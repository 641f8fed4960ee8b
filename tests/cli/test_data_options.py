"""How the commands read data: `--strict`, and data that is refused before training or evaluation starts."""

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
