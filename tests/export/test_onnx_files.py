"""ONNX files, run by onnxruntime and OpenVINO."""

from __future__ import annotations

import sys
from pathlib import Path

import onnx
import pytest
import torch
from export_cases import assert_same, expected, make_inputs, make_model, model  # noqa: F401  fixtures
from PIL import Image

from retinanet.common.errors import UsageError
from retinanet.export import ExportError, export_model
from retinanet.export.formats import require
from retinanet.export.runners import load_runners
from retinanet.export.verify import verify_export
from retinanet.model.detector import Detector


@pytest.fixture(scope="module")
def onnx_file(model: Detector, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    export_model(model, path)
    return path


def test_both_runtimes_find_the_same(model: Detector, onnx_file: Path) -> None:
    onnx.checker.check_model(onnx_file, full_check=True)
    content = onnx.load(onnx_file)
    assert [(entry.domain, entry.version) for entry in content.opset_import] == [("", 18)]
    assert [value.name for value in content.graph.input] == ["images", "sizes"]
    assert [value.name for value in content.graph.output] == ["boxes", "scores", "labels", "count"]
    runners = load_runners(onnx_file, "onnx")
    assert [runner.engine for runner in runners] == ["onnxruntime", "OpenVINO"]
    for number, height, width in ((1, 96, 128), (2, 128, 64), (7, 64, 160)):
        images, sizes = make_inputs(number, height, width)
        images[-1] = 0.5  # an image without contrast
        own = expected(model, images, sizes)
        for runner in runners:
            assert runner.metadata.class_names == ("a", "b", "c") and runner.metadata.size is None
            assert_same(runner.run(images, sizes), own)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("retinanet", {"half": True, "size": (96, 128)}),
        ("fcos", {"batch": 2, "size": (96, 128)}),
        ("retinanet", {"postprocess": "raw", "size": (96, 128), "batch": 1}),
    ],
)
def test_options(kind: str, options: dict, tmp_path: Path) -> None:
    model, path = make_model(kind), tmp_path / "model.onnx"
    export_model(model, path, **options)
    types = {value.data_type for value in onnx.load(path).graph.initializer}
    assert (onnx.TensorProto.FLOAT16 in types) == options.get("half", False)
    pictures = [tmp_path / f"{number}.png" for number in range(3)]
    for number, picture in enumerate(pictures):
        pixels = (make_inputs(1, 70 + 10 * number, 90)[0][0] * 255).to(torch.uint8)
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(picture)
    for found in verify_export(model, path, pictures):
        assert found.agrees and (found.detections > 0 or len(found.outputs) == 4), found
        assert (0 < found.scores < 0.01) if "half" in options else found.scores < 1e-5


def test_failures_leave_no_file(model: Detector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    remedy = "run pip install 'retinanet-ops\\[onnx\\]'"
    with pytest.raises(UsageError, match=f"^format onnx: the Python module onnxscript is not installed: {remedy}"):
        export_model(model, tmp_path / "model.onnx")
    monkeypatch.undo()

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("an op\nhas no translation")

    monkeypatch.setattr(torch.onnx, "export", fail)
    with pytest.raises(ExportError, match=r"model\.onnx: cannot be written as onnx: an op has no translation$"):
        export_model(model, tmp_path / "model.onnx", size=(64, 64), batch=1)
    assert not list(tmp_path.iterdir())
    with pytest.raises(UsageError, match=r"pip install 'retinanet-ops\[none\]'$"):
        require("a_module_that_does_not_exist", "none", "a test")
