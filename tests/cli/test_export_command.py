"""`retinanet export`: the file, the comparison with the model, and wrong use."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from pathlib import Path

import pytest
from cli_cases import data, make_data, model_file, one_error, run  # noqa: F401  fixtures

from retinanet import FasterRCNN, FasterRCNNConfig, load_model, save_model
from retinanet.export.verify import FLOAT32, HALF, Verification, verify_export


def test_export_and_verify(data: Path, model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "model.pt2"
    assert run("export", model_file, output, "--verify", data) == 0
    out = capsys.readouterr().out
    assert f"{output}: written; takes any number of images of any size, returns boxes, scores, labels, count" in out
    assert re.search(r"^torch\.export: 6 images, [1-9]\d* detections by the model$", out, re.MULTILINE)
    average = re.search(r"^  AP: (\d\.\d{4}) by the model, (\d\.\d{4}) by the file$", out, re.MULTILINE)
    assert average and average[1] == average[2]
    assert "the file and the model agree" in out
    assert list(tmp_path.iterdir()) == [output]

    # Another model has other detections.
    other = load_model(model_file)
    for parameter in other.head.regression_head.parameters():
        parameter.data += 0.01
    pictures = sorted(data.parent.glob("*.png"))[:3]
    (found,) = verify_export(other, output, pictures)
    assert not found.agrees and found.images == 3 and found.excess > 1 and found.ap is None
    (found,) = verify_export(load_model(model_file), output, pictures)
    assert found.agrees and found.detections > 0


def test_a_disagreement_is_an_error(
    data: Path, model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    strict = dataclasses.replace(HALF, outputs=0.0)
    monkeypatch.setattr("retinanet.export.verify.HALF", strict)
    output = tmp_path / "model.pt2"
    options = ("--size", 64, 64, "--batch", 4, "--postprocess", "raw", "--half")
    assert run("export", model_file, output, *options, "--verify", data.parent) == 3
    captured = capsys.readouterr()
    assert "takes 4 images of 64 x 64 pixels, returns cls_logits_0, cls_logits_1, box_deltas_0, box" in captured.out
    assert "THE FILE AND THE MODEL DISAGREE" in captured.out
    differences = [float(value) for value in re.findall("largest difference ([^ ]+) of", captured.out)]
    assert len(differences) == 4 and 0 < max(differences) < HALF.outputs
    assert captured.err == (
        f"retinanet: error: {output}: torch.export and the model disagree by more than the tolerance\n"
    )


def test_nothing_to_compare_is_an_error(
    data: Path, model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("trace", "write"):
        monkeypatch.setattr(f"retinanet.export.exporting.{name}", lambda *_: None)
    monkeypatch.setattr(
        "retinanet.export.verify.verify_export", lambda *_, **__: [Verification("onnxruntime", FLOAT32, images=6)]
    )
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *rest: None if name == "openvino" else find_spec(name, *rest)
    )
    output = tmp_path / "model.onnx"
    assert run("export", model_file, output, "--verify", data) == 3
    captured = capsys.readouterr()
    assert captured.out.splitlines()[1:] == [
        "onnxruntime: 6 images, 0 detections by the model",
        "  NOT VERIFIED, because there is nothing to compare",
        "OpenVINO: not compared, because it is not installed",
    ]
    assert captured.err.startswith(f"retinanet: error: {output}: not verified, because the model detects nothing in ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("model.pt2", "--format", "coreml"), "--format: invalid choice: 'coreml'"),
        (("model.pt2", "--format", "onnx"), "--format onnx: expected a file name that ends in .onnx, got "),
        (("model.bin",), "--format: expected one of pt2, onnx, aoti, or a file name in .onnx or .pt2"),
        (("none/model.pt2",), "cannot be written: the folder .*none does not exist"),
        (("model.pt2", "--batch", "0"), "--batch: expected an integer of at least 1, or dynamic, got '0'"),
        (("model.pt2", "--strict"), "--strict: expected only if --verify names annotations, got no --verify; leave it"),
        (("model.pt2", "--csv-columns", "path,x1,y1,x2,y2,class"), "--csv-columns: expected only if --verify names"),
        (
            ("model.pt2", "--verify", "PICTURE", "--images", "."),
            "--images: expected only if .*, got pictures; leave it",
        ),
        (("model.pt2", "--size", "100"), "--size: expected a height and a width, or dynamic, got 100"),
        (("model.pt2", "--size", "100", "96"), "--size: expected multiples of 32, to which the model pads its batches"),
    ],
)
def test_wrong_use(
    data: Path, model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple, message: str
) -> None:
    options = [data.parent / "1.png" if value == "PICTURE" else value for value in arguments[1:]]
    assert run("export", model_file, tmp_path / arguments[0], *options) == 2
    assert re.search(message, one_error(capsys))
    assert not list(tmp_path.iterdir())


def test_wrong_data(data: Path, model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "model.pt2"
    assert run("export", model_file, output, "--verify", tmp_path / "none.png") == 3
    assert one_error(capsys) == f"{tmp_path / 'none.png'}: no such file or folder"
    others = make_data(tmp_path / "data", 1, ("circle",))
    more = others.with_name("more.json")
    more.write_text(others.read_text())
    assert run("export", model_file, output, "--verify", others.parent) == 3
    assert "expected one file of annotations, got ann.json, more.json; name one" in one_error(capsys)
    more.unlink()
    assert run("export", model_file, output, "--verify", others) == 3
    assert "class 'circle' is not one that the model was trained for" in one_error(capsys)

    config = FasterRCNNConfig(class_names=("square",), backbone="resnet18", fpn_channels=8)
    save_model(tmp_path / "model.safetensors", FasterRCNN(config))
    assert run("export", tmp_path / "model.safetensors", output) == 3
    assert one_error(capsys).startswith("FasterRCNN: cannot be exported, because its number of proposals depends")
    assert not output.exists()
