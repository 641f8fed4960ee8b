"""The commands with the detectors besides RetinaNet: train, evaluate, detect, check, resume, and idle options."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_cases import RECIPE, data, one_error, run

from retinanet import FCOS, SSD, FasterRCNN, load_model, save_model

__all__ = ["data"]


def train_arguments(data: Path, output: Path, *more: object) -> list[object]:
    return ["train", "--train", data, "--val", data, "--output", output, *RECIPE, "--epochs", 1, *more]


SMALL_PYRAMID = "--fpn-levels 4,5 --fpn-channels 32 --min-size 0"
#: Options of a short run, by --model.
OPTIONS = {
    "ssdlite320": "--min-negatives 3 --class-weights auto",
    "fcos_mobilenet_v2": f"{SMALL_PYRAMID} --head-depth 1 --class-weights auto",
    "fasterrcnn_mobilenet_v2": f"{SMALL_PYRAMID} --anchor-sizes 16 32 --aspect-ratios 1 --class-weights auto",
}
#: What the configuration then has.
FIELDS = {
    "ssdlite320": {"network": "ssdlite320", "cls_loss": "mining", "min_negatives": 3, "class_weights": (1.0,)},
    "fcos_mobilenet_v2": {"backbone": "mobilenet_v2", "fpn_levels": (4, 5), "head_depth": 1, "class_weights": (1.0,)},
    "fasterrcnn_mobilenet_v2": {"backbone": "mobilenet_v2", "anchor_sizes": ((16,), (32,)), "class_weights": (1.0,)},
}
CLASSES = {"ssdlite320": SSD, "fcos_mobilenet_v2": FCOS, "fasterrcnn_mobilenet_v2": FasterRCNN}
#: What `retinanet check` says of the anchors.
CHECKED = {
    "ssdlite320": "with images resized to 320 x 320 pixels: the best IoU is below 0.5 for",
    "fcos_mobilenet_v2": None,
    "fasterrcnn_mobilenet_v2": "with images as they are: the best IoU is below 0.3 for",
}


@pytest.fixture(scope="module")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that trains a model at its first call, and returns the folder of the run."""

    @functools.cache
    def trained(name: str) -> Path:
        output = tmp_path_factory.mktemp("run") / "run"
        options = ["--model", name, *OPTIONS[name].split(), "--max-detections", 20]
        assert run(*train_arguments(data, output, *options)) == 0
        return output

    return trained


@pytest.fixture(scope="module")
def trained(runs: Callable[[str], Path]) -> Path:
    return runs("ssdlite320")


@pytest.mark.parametrize("name", OPTIONS)
def test_train_evaluate_detect_and_check(
    data: Path, runs: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    model = runs(name) / "best.safetensors"
    loaded = load_model(model)
    assert isinstance(loaded, CLASSES[name])
    assert {field: getattr(loaded.config, field) for field in FIELDS[name]} == FIELDS[name]
    numbers = tmp_path / "numbers.json"
    low = change_config(model, tmp_path / "low.safetensors", score_threshold=0.0)
    assert run("evaluate", low, data, "--report", tmp_path / "report", "--output", numbers, "--device", "cpu") == 0
    assert (tmp_path / "report" / "report.html").is_file()
    assert 0 < json.loads(numbers.read_text())["detections"] <= 6 * 20
    picture = data.parent / "1.png"
    options = ["--score", 0.01, "--tile", 40, "--views", 2, "--device", "cpu"]
    assert run("detect", picture, "--model", low, "--output", tmp_path / "found", *options) == 0
    found = json.loads((tmp_path / "found" / "detections.json").read_text())
    assert found["annotations"] if isinstance(found, dict) else found
    capsys.readouterr()
    report = tmp_path / "report.json"
    assert run("check", data, "--model", model, "--json", report) == 0
    line = CHECKED[name]
    text = capsys.readouterr().out
    assert ("the best IoU" not in text) if line is None else (line in text)
    assert (json.loads(report.read_text())[0]["anchors"] is None) == (line is None)


def change_config(source: Path, target: Path, **fields: object) -> Path:
    """Copy a model file with other values in its configuration."""
    model = load_model(source)
    model.config = dataclasses.replace(model.config, **fields)
    save_model(target, model)
    return target


@pytest.mark.parametrize("name", OPTIONS)
def test_resume_and_start_from_weights(data: Path, runs: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    folder = runs(name)
    assert run("train", "--resume", folder, "--model", name, "--device", "cpu", "--threads", 1) == 0
    again = train_arguments(data, tmp_path / "again", "--weights", folder / "last.safetensors", "--max-detections", 7)
    assert run(*again) == 0
    model = load_model(tmp_path / "again" / "best.safetensors")
    assert isinstance(model, CLASSES[name])
    fields = {field: value for field, value in FIELDS[name].items() if field != "class_weights"}
    assert {field: getattr(model.config, field) for field in fields} == fields
    assert model.config.max_detections == 7


def test_a_configuration_file_names_the_network(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.json"
    config.write_text('{"network": "ssdlite320", "topk": 0}')
    assert run(*train_arguments(data, tmp_path / "run", "--config", config)) == 2
    assert one_error(capsys) == f"{config}: topk: expected an integer of at least 1, got 0"


@pytest.mark.parametrize(
    ("command", "code", "message"),
    [
        (
            "train --train {data} --val {data} --output {folder}/run --config {file}",
            2,
            "{file}: rpn_topk: no such field in the configuration; it is a field of FasterRCNNConfig: give the --model "
            "that the file is for",
        ),
        (
            "anchors fit {data} --output {folder}/anchors.json --config {file}",
            2,
            "{file}: rpn_topk: no such field in the configuration; it is a field of FasterRCNNConfig: expected fields "
            "of RetinaNetConfig, or another --model of retinanet, fasterrcnn",
        ),
        (
            "check {data} --config {file}",
            3,
            "{file}: rpn_topk: no such field in the configuration; it is a field of FasterRCNNConfig: expected fields "
            "of RetinaNetConfig, or of SSDConfig with its network; give --model with a model file for other models",
        ),
    ],
)
def test_a_file_of_another_model(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, code: int, message: str
) -> None:
    names = {"data": data, "folder": tmp_path, "file": tmp_path / "rcnn.json"}
    names["file"].write_text(json.dumps({"rpn_topk": 500}))
    assert run(*command.format(**names).split()) == code
    assert one_error(capsys) == message.format(**names)


def test_check_takes_the_configuration_of_an_ssd(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "ssd.json").write_text(json.dumps({"network": "ssdlite320"}))
    assert run("check", data, "--config", tmp_path / "ssd.json") == 0
    assert CHECKED["ssdlite320"] in capsys.readouterr().out


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
        ("--weights {run}/best.safetensors --model fcos_resnet18", "--model fcos_resnet18: expected ssdlite320"),
        (
            "--model fcos --anchor-sizes 16 32 --box-loss giou --head-norm group --aspect-ratios 1",
            "--anchor-sizes, --aspect-ratios, --box-loss, --head-norm: do not apply to --model fcos",
        ),
        (
            "--model fasterrcnn --head-depth 2 --head-norm group --box-loss giou --cls-loss focal",
            "--box-loss, --head-depth, --head-norm: do not apply to --model fasterrcnn",
        ),
        (
            "--model fasterrcnn --fpn-levels 3,4,5 --anchor-sizes 16 32",
            "--anchor-sizes: expected 3 entries, one per level of fpn_levels, got 2",
        ),
        ("--model fcos --cls-loss focal", "--cls-loss: does not apply to --model fcos"),
        ("--model fcos --fpn-channels 48", "--fpn-channels: expected a multiple of 32"),
        ("--model fcos_vgg16", "--model fcos_vgg16: expected fcos_ followed by one of resnet18, resnet34"),
        ("--model fcos_resnet18 --anchor-sizes 16", "--anchor-sizes: does not apply to --model fcos_resnet18"),
        (
            "--model retinanet_resnet50 --backbone resnet18",
            "--backbone resnet18: expected resnet50, which --model retinanet_resnet50 names; give --model retinanet",
        ),
        ("--model yolo_resnet50", "--model: expected one of retinanet, fcos, "),
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
