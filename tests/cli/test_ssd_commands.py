"""The commands with an SSD: train, evaluate, detect, check and resume, and the errors of options that do not apply."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_cases import RECIPE, data, one_error, run

from retinanet import SSD, load_model

__all__ = ["data"]


def train_arguments(data: Path, output: Path, *more: object) -> list[object]:
    return ["train", "--train", data, "--val", data, "--output", output, *RECIPE, "--epochs", 1, *more]


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("ssd") / "run"
    options = ["--model", "ssdlite320", "--min-negatives", 3, "--class-weights", "auto", "--max-detections", 20]
    assert run(*train_arguments(data, output, *options)) == 0
    return output


def test_train_evaluate_detect_and_check(
    data: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = trained / "best.safetensors"
    config = load_model(model).config
    assert (config.network, config.cls_loss, config.min_negatives, config.class_weights) == (
        "ssdlite320",
        "mining",
        3,
        (1.0,),
    )
    numbers = tmp_path / "numbers.json"
    assert run("evaluate", model, data, "--report", tmp_path / "report", "--output", numbers, "--device", "cpu") == 0
    assert (tmp_path / "report" / "report.html").is_file()
    assert 0 < json.loads(numbers.read_text())["detections"] <= 6 * 20
    picture = data.parent / "1.png"
    options = ["--score", 0.01, "--tile", 40, "--views", 2, "--device", "cpu"]
    assert run("detect", picture, "--model", model, "--output", tmp_path / "found", *options) == 0
    found = json.loads((tmp_path / "found" / "detections.json").read_text())
    assert found["annotations"] if isinstance(found, dict) else found
    capsys.readouterr()
    assert run("check", data, "--model", model) == 0
    assert "with images resized to 320 x 320 pixels: the best IoU is below 0.5 for" in capsys.readouterr().out


def test_resume_and_start_from_weights(data: Path, trained: Path, tmp_path: Path) -> None:
    assert run("train", "--resume", trained, "--model", "ssdlite320", "--device", "cpu", "--threads", 1) == 0
    again = train_arguments(data, tmp_path / "again", "--weights", trained / "last.safetensors", "--negative-ratio", 2)
    assert run(*again) == 0
    model = load_model(tmp_path / "again" / "best.safetensors")
    assert isinstance(model, SSD)
    assert (model.config.network, model.config.negative_ratio, model.config.min_negatives) == ("ssdlite320", 2.0, 3)


def test_a_configuration_file_names_the_network(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.json"
    config.write_text('{"network": "ssdlite320", "topk": 0}')
    assert run(*train_arguments(data, tmp_path / "run", "--config", config)) == 2
    assert one_error(capsys) == f"{config}: topk: expected an integer of at least 1, got 0"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            "--model ssd300_vgg16 --fpn-levels 3 4 --min-size 300",
            "--fpn-levels, --min-size: do not apply to --model ssd300_vgg16",
        ),
        ("--model ssdlite320 --backbone resnet18", "--backbone: does not apply to --model ssdlite320"),
        ("--cls-loss focal", "--cls-loss: does not apply to --model retinanet"),
        ("--model ssdlite320 --cls-loss hinge", "--cls-loss: expected one of mining, focal, got 'hinge'"),
        (
            "--model ssdlite320 --cls-loss focal --min-negatives 3",
            "--min-negatives: does not apply to cls_loss focal, which takes all default boxes; got 3",
        ),
        ("--weights {run}/best.safetensors --model retinanet", "--model retinanet: expected ssdlite320"),
        (
            "--weights {run}/best.safetensors --anchor-sizes 16 32",
            "--anchor-sizes: does not apply to --model ssdlite320",
        ),
    ],
)
def test_options_that_do_not_apply(
    data: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: str, message: str
) -> None:
    assert run(*train_arguments(data, tmp_path / "run", *options.format(run=trained).split())) == 2
    assert one_error(capsys).startswith(message)


def test_a_run_keeps_its_model(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train", "--resume", trained, "--model", "ssd300_vgg16") == 2
    assert one_error(capsys) == (
        "--model ssd300_vgg16: expected ssdlite320, which is the model of config.json of the run to continue"
    )
