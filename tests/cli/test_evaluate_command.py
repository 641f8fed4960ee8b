"""`retinanet evaluate`: the numbers that it prints and writes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from cli_cases import data, model_file, one_error, run  # noqa: F401  fixtures

from retinanet import load_model, save_model
from retinanet.model.thresholds import ScoreThresholds


@pytest.mark.parametrize(("views", "engine"), [(1, "hotcoco"), (4, "pycocotools")])
def test_evaluate_prints_the_twelve_numbers(
    data: Path, model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], views: int, engine: str
) -> None:
    output = tmp_path / "numbers.json"
    options = ("--output", output, "--device", "cpu", "--views", views, "--engine", engine)
    assert run("evaluate", model_file, data, *options) == 0
    out = capsys.readouterr().out
    record = json.loads(output.read_text())
    names = "AP AP50 AP75 APs APm APl AR1 AR10 AR100 ARs ARm ARl"
    assert list(record["stats"]) == names.split()
    assert (record["images"], record["boxes"], record["views"]) == (6, 6, views) and record["detections"] > 0
    for name, value in record["stats"].items():
        shown = "n/a" if value < 0 else f"{value:.3f}"
        assert re.search(rf"^  {name} +{re.escape(shown)}  ", out, re.MULTILINE), (name, out)
    assert record["stats"]["APl"] == -1, "no object is large"
    assert re.search(r"^  APl +n/a  .*: undefined, the data set has no such objects$", out, re.MULTILINE)
    assert list(tmp_path.iterdir()) == [output]


def test_evaluate_shows_precision_recall_and_f1(data: Path, model_file: Path, tmp_path: Path, capsys) -> None:
    model = load_model(model_file)
    model.score_thresholds = ScoreThresholds(0.25, (None,))
    save_model(tmp_path / "model.safetensors", model)
    output = tmp_path / "numbers.json"
    assert run("evaluate", tmp_path / "model.safetensors", data, "--output", output, "--device", "cpu") == 0
    out = capsys.readouterr().out
    points = json.loads(output.read_text())["operating_points"]
    assert points[0]["class"] == "all classes" and points[0]["threshold"] == 0.25
    assert points[0]["chosen_by"] == "threshold of the model"
    assert re.search(r"^  all classes +0\.250  .*  threshold of the model$", out, re.MULTILINE)
    for point in points:
        right, wrong, missed = (point[f"{name}"] for name in ("true_positives", "false_positives", "false_negatives"))
        assert right + missed == 6 and right + wrong > 0
        assert point["f1"] == pytest.approx(2 * right / (2 * right + wrong + missed))
        assert f"{point['precision']:.3f}" in out and f"{point['recall']:.3f}" in out


def test_evaluate_writes_a_report(data: Path, model_file: Path, tmp_path: Path, capsys) -> None:
    assert run("evaluate", model_file, data, "--report", tmp_path / "new" / "report", "--device", "cpu") == 0
    path = tmp_path / "new" / "report" / "report.html"
    assert f"{path}: written" in capsys.readouterr().out
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert "model.safetensors" in path.read_text()

    assert run("evaluate", model_file, data, "--report", data, "--device", "cpu") == 2
    assert one_error(capsys) == f"{data}: expected a folder for the output, got a file or a path below a file"
    assert run("evaluate", model_file, tmp_path / "none.json", "--report", tmp_path / "other", "--device", "cpu") == 3
    assert not (tmp_path / "other").exists()
