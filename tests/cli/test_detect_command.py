"""The command `retinanet detect`: what it reads, what it writes, and what it says."""

import csv
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from cli_cases import data, model_file, one_error, run  # noqa: F401  fixtures
from PIL import Image
from video_cases import make_video

from retinanet import RetinaNet, load_model, save_model
from retinanet.model.thresholds import ScoreThresholds


def test_detect_skips_a_picture_that_is_too_elongated(data: Path, model_file: Path, tmp_path: Path, capsys) -> None:
    trained = load_model(model_file)
    resizing = RetinaNet(replace(trained.config, min_size=(48,), max_size=96))
    resizing.load_state_dict(trained.state_dict())
    save_model(tmp_path / "resizing.safetensors", resizing)
    Image.new("RGB", (97, 1)).save(tmp_path / "thin.png")
    output = tmp_path / "detections"
    arguments = ("--model", tmp_path / "resizing.safetensors", "--output", output, "--device", "cpu")
    assert run("detect", tmp_path / "thin.png", data.parent / "1.png", *arguments) == 3
    assert (
        f"{tmp_path}/thin.png: size: 97 x 1 pixels are too elongated: resizing to the model's max_size 96 leaves"
        in capsys.readouterr().err
    )
    assert (output / "1_detections.png").exists()
    # A tile is checked like a picture. Tiles of 60 x 1 pixels are resized to 96 x 2.
    assert run("detect", tmp_path / "thin.png", *arguments, "--tile", 97) == 3
    assert run("detect", tmp_path / "thin.png", *arguments, "--tile", 60) == 0


def test_detect_writes_pictures_json_and_csv(data: Path, model_file: Path, tmp_path: Path) -> None:
    shutil.copytree(data.parent, tmp_path / "more")
    output = tmp_path / "detections"
    arguments = (data.parent / "1.png", tmp_path / "more", "--model", model_file, "--output", output)
    assert run("detect", *arguments, "--score", 0.2, "--views", 2, "--device", "cpu") == 0
    results = json.loads((output / "detections.json").read_text())
    with (output / "detections.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(results) == len(rows) > 0
    for entry, row in zip(results, rows, strict=True):
        assert entry["category_name"] == row["class_name"] == "square" and entry["category_id"] == 2
        assert row["label"] == "0" and row["file_name"] == entry["file_name"]
        x, y, width, height = entry["bbox"]
        assert [float(row[k]) for k in ("x1", "y1", "x2", "y2")] == pytest.approx(
            [x, y, x + width, y + height], abs=0.011
        )
        assert 0 <= x and 0 <= y and x + width <= 64.001 and y + height <= 48.001 and entry["score"] > 0.2
    assert {entry["image_id"] for entry in results} == set(range(1, 8))
    names = {"1_detections.png", "1_detections_2.png", *(f"{n}_detections.png" for n in range(2, 7))}
    assert {path.name for path in output.iterdir()} == names | {"detections.json", "detections.csv"}
    assert Image.open(output / "2_detections.png").size == (64, 48), "expected a copy of the picture's size"


def test_one_bad_picture_among_many_is_reported_and_the_rest_is_kept(
    data: Path, model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.png").write_bytes(b"nothing")
    images = (data.parent / "1.png", tmp_path / "bad.png", tmp_path / "absent.png", data.parent / "2.png")
    assert run("detect", *images, "--model", model_file, "--output", tmp_path / "out", "--device", "cpu") == 3
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("retinanet: error: ")]
    assert errors == [
        f"retinanet: error: {tmp_path}/absent.png: no such file or folder",
        f"retinanet: error: {tmp_path}/bad.png: not an image in a format that Pillow reads",
    ]
    names = {"1_detections.png", "2_detections.png", "detections.json", "detections.csv"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    files = {entry["file_name"] for entry in json.loads((tmp_path / "out" / "detections.json").read_text())}
    assert files == {str(data.parent / "1.png"), str(data.parent / "2.png")}


def test_without_a_picture_that_can_be_read_there_is_no_output_folder(model_file: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"nothing")
    output = ("--output", tmp_path / "new" / "out")
    inputs = (tmp_path / "absent.png", tmp_path / "bad.png")
    assert run("detect", *inputs, "--model", model_file, *output, "--device", "cpu") == 3
    assert [path.name for path in tmp_path.iterdir()] == ["bad.png"]


def test_formats_and_no_pictures(data: Path, model_file: Path, tmp_path: Path) -> None:
    shutil.copy(data.parent / "1.png", tmp_path / "map.png")
    (tmp_path / "map.pgw").write_text("0.4\n0.3\n0.3\n-0.4\n1000\n2000\n")
    arguments = ("--model", model_file, "--device", "cpu", "--no-pictures", "--output")
    # Tables alone may lie beside the inputs.
    assert run("detect", tmp_path / "map.png", *arguments, tmp_path, "--format", "geojson,CSV", "coco") == 0
    names = {"map.png", "map.pgw", "detections.csv", "detections.json", "detections.geojson"}
    assert {path.name for path in tmp_path.iterdir()} == names
    with (tmp_path / "detections.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    features = json.loads((tmp_path / "detections.geojson").read_text())["features"]
    assert len(rows) == len(features) > 0
    for row, feature in zip(rows, features, strict=True):
        x, y = (float(row["x1"]) + float(row["x2"])) / 2 - 0.5, (float(row["y1"]) + float(row["y2"])) / 2 - 0.5
        (ring,) = feature["geometry"]["coordinates"]
        east, north = (sum(axis) / 4 for axis in zip(*ring[:4], strict=True))
        assert (east, north) == pytest.approx((1000 + 0.4 * x + 0.3 * y, 2000 + 0.3 * x - 0.4 * y), abs=0.01)
    assert run("detect", tmp_path / "map.png", *arguments, tmp_path, "--format", "xml") == 2


def test_an_output_among_the_inputs_is_refused(data: Path, model_file: Path, tmp_path: Path, capsys) -> None:
    shutil.copy(data.parent / "1.png", tmp_path / "1.png")
    (tmp_path / "link").symlink_to(tmp_path)
    for source, output in (
        (tmp_path, tmp_path),
        (tmp_path / "1.png", tmp_path / "link"),
        (tmp_path / "link", tmp_path),
    ):
        assert run("detect", source, "--model", model_file, "--output", output, "--device", "cpu") == 2
        assert one_error(capsys).startswith(f"--output {output}: expected another folder than that of the inputs")
    assert {path.name for path in tmp_path.iterdir()} == {"1.png", "link"}


def test_sub_folders_and_what_is_not_read(data: Path, model_file: Path, tmp_path: Path, capsys) -> None:
    for name in ("top/a.PNG", "top/sub/b.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(data.parent / "1.png", tmp_path / name)
    (tmp_path / "top" / "notes.txt").touch()
    # The output may lie inside the input, because it is not entered.
    arguments = (
        "detect",
        tmp_path / "top",
        "--model",
        model_file,
        "--output",
        tmp_path / "top" / "out",
        "--device",
        "cpu",
    )
    assert run(*arguments) == 0
    error = capsys.readouterr().err
    assert (
        f"note: {tmp_path}/top: 1 file not read, because the suffix is none of a picture or a video: notes.txt" in error
    )
    assert f"note: {tmp_path}/top: 1 sub-folder not entered (--recursive enters sub-folders): sub" in error
    assert run(*arguments, "--recursive") == 0
    assert "1 sub-folder not entered: out" in capsys.readouterr().err
    names = {"a_detections.PNG", "b_detections.png", "detections.csv", "detections.json"}
    assert {path.name for path in (tmp_path / "top" / "out").iterdir()} == names


def test_copies_with_names_as_long_as_the_file_system_takes(data: Path, model_file: Path, tmp_path: Path) -> None:
    longest = os.pathconf(tmp_path, "PC_NAME_MAX")
    (tmp_path / "in").mkdir()
    for last in "ab":
        shutil.copy(data.parent / "1.png", tmp_path / "in" / ("ä" * ((longest - 5) // 2) + f"{last}.png"))
    shutil.copy(data.parent / "1.png", tmp_path / "in" / os.fsdecode(b"caf\xe9.png"))
    output = ("--output", tmp_path / "out")
    assert run("detect", tmp_path / "in", "--model", model_file, *output, "--device", "cpu") == 0
    copies = [os.fsencode(path.name) for path in (tmp_path / "out").glob("*.png")]
    assert len(copies) == 3 and b"caf\xe9_detections.png" in copies and max(map(len, copies)) <= longest


def test_out_of_memory_costs_one_picture(
    data: Path, model_file: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    from retinanet.detection import files

    read = files.read_image

    def scarce(path: Path, max_pixels: int | None) -> object:
        if path.name == "2.png":
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9e9")
        return read(path, max_pixels)

    monkeypatch.setattr(files, "read_image", scarce)
    pictures = (data.parent / f"{n}.png" for n in (1, 2, 3))
    assert run("detect", *pictures, "--model", model_file, "--output", tmp_path / "out", "--device", "cpu") == 3
    assert one_error(capsys) == f"{data.parent}/2.png: out of memory: choose --tile, or a smaller one"
    assert (tmp_path / "out" / "3_detections.png").exists()


def test_ctrl_c_keeps_what_was_found(
    data: Path, model_file: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    from retinanet.detection import files

    read = files.read_image

    def interrupted(path: Path, max_pixels: int | None) -> object:
        if path.name == "2.png":
            raise KeyboardInterrupt
        return read(path, max_pixels)

    monkeypatch.setattr(files, "read_image", interrupted)
    pictures = (data.parent / f"{n}.png" for n in (1, 2, 3))
    assert run("detect", *pictures, "--model", model_file, "--output", tmp_path / "out", "--device", "cpu") == 130
    results = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert {entry["image_id"] for entry in results} == {1}
    assert sorted(path.name for path in (tmp_path / "out").iterdir())[0] == "1_detections.png"


def test_the_score_threshold_and_where_it_comes_from(data: Path, model_file: Path, tmp_path: Path, capsys) -> None:
    model = load_model(model_file)
    model.score_thresholds = ScoreThresholds(0.625, (0.625,))
    save_model(tmp_path / "chosen.safetensors", model)
    arguments = (data.parent / "1.png", "--output", tmp_path / "out", "--device", "cpu", "--no-pictures", "--model")
    expected = {
        (model_file,): f"score threshold 0.3: the default, because {model_file} holds no threshold",
        (tmp_path / "chosen.safetensors",): "score threshold 0.625: the best F1 on the validation set, from "
        f"{tmp_path}/chosen.safetensors",
        (tmp_path / "chosen.safetensors", "--score", 0.01): "score threshold 0.01: from --score",
    }
    for options, line in expected.items():
        assert run("detect", *arguments, *options) == 0
        assert capsys.readouterr().out.splitlines()[0] == line


def test_names_of_bytes_that_are_no_text(data: Path, model_file: Path, tmp_path: Path, capsys) -> None:
    """Such names are printed with escapes, whatever the encoding of standard output is."""
    output = tmp_path / os.fsdecode(b"out\xff")
    assert run("detect", data.parent / "1.png", "--model", model_file, "--output", output, "--device", "cpu") == 0
    assert r"/out\udcff: 20 detections; " in capsys.readouterr().out
    model = tmp_path / os.fsdecode(b"model\xff.safetensors")
    assert run("detect", data.parent / "1.png", "--model", model, "--output", output, "--device", "cpu") == 3
    assert one_error(capsys) == rf"{tmp_path}/model\udcff.safetensors: no such file"


def test_a_score_below_the_models_own_threshold(data: Path, model_file: Path, tmp_path: Path) -> None:
    """The model of the fixture gives every box a score of nearly 0.5."""
    model = load_model(model_file)
    strict = RetinaNet(replace(model.config, score_threshold=0.9))
    strict.load_state_dict(model.state_dict())
    save_model(tmp_path / "strict.safetensors", strict)
    for score, found in (("0.9", False), ("0.2", True)):
        arguments = ("--model", tmp_path / "strict.safetensors", "--output", tmp_path / score, "--device", "cpu")
        assert run("detect", data.parent / "1.png", *arguments, "--score", score) == 0
        assert bool(json.loads((tmp_path / score / "detections.json").read_text())) is found


def test_a_video(data: Path, model_file: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "in").mkdir()
    make_video(tmp_path / "in" / "clip.mkv")
    whole = (tmp_path / "in" / "clip.mkv").read_bytes()
    (tmp_path / "in" / "cut.MKV").write_bytes(whole[: len(whole) * 3 // 5])
    (tmp_path / "in" / "junk.mp4").write_bytes(b"junk")
    shutil.copy(data.parent / "1.png", tmp_path / "in" / "a.png")
    output = ("--output", tmp_path / "out")
    assert run("detect", tmp_path / "in", "--model", model_file, *output, "--device", "cpu", "--every", 5) == 3
    printed = capsys.readouterr()
    errors = [line for line in printed.err.splitlines() if "retinanet: error: " in line]
    assert len(errors) == 2 and "cut.MKV: cut short: it ends after " in errors[0] and "; kept " in errors[0]
    assert "junk.mp4: cannot be read as a video (" in errors[1]
    assert f"{tmp_path}/in/clip.mkv: 80 detections in 4 frames" in printed.out
    with (tmp_path / "out" / "detections.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["file_name"].endswith("clip.mkv")]
    assert list(dict.fromkeys((row["frame"], row["time"]) for row in rows)) == [
        ("0", "0.000"),
        ("5", "0.500"),
        ("10", "1.000"),
        ("15", "1.500"),
    ]
    results = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert len({entry["image_id"] for entry in results}) == len({(e["file_name"], e.get("frame")) for e in results})
    names = {"a_detections.png", "clip_detections.mp4", "cut_detections.mp4", "detections.csv", "detections.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    assert (
        run(
            "detect",
            tmp_path / "in" / "clip.mkv",
            "--model",
            model_file,
            "--output",
            tmp_path / "tables",
            "--device",
            "cpu",
            "--every",
            10,
            "--no-pictures",
        )
        == 0
    )
    assert {path.name for path in (tmp_path / "tables").iterdir()} == {"detections.csv", "detections.json"}
