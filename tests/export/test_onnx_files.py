"""ONNX files, run by onnxruntime and OpenVINO."""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path

import onnx
import pytest
import torch
from cli_cases import ROOT
from export_cases import assert_same, expected, make_inputs, make_model
from PIL import Image

import retinanet_ops
from retinanet.common.errors import UsageError
from retinanet.export import ExportError, export_model
from retinanet.export.formats import require
from retinanet.export.runners import load_runners, omitted_engines
from retinanet.export.verify import verify_export
from retinanet.model.detector import Detector

PAGE = ROOT / "docs" / "deploy.md"
LIBRARY = Path(retinanet_ops.__file__).parent / "_C.so"


def test_both_runtimes_find_the_same(model: Detector, deployed: Path) -> None:
    onnx_file = deployed / "model.onnx"
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


def test_half_and_raw_files(model: Detector, deployed: Path) -> None:
    pictures = [deployed / f"{number}.png" for number in range(3)]
    for number, picture in enumerate(pictures):
        pixels = (make_inputs(1, 70 + 10 * number, 90)[0][0] * 255).to(torch.uint8)
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(picture)
    for name in ("half", "raw"):
        path = deployed / f"{name}.onnx"
        types = {value.data_type for value in onnx.load(path).graph.initializer}
        assert (onnx.TensorProto.FLOAT16 in types) == (name == "half")
        for found in verify_export(model, path, pictures):
            assert found.agrees and (found.detections > 0 or len(found.outputs) == 4), found
            assert name == "raw" or 0 < found.scores < 0.01


@pytest.mark.parametrize("kind", ["fcos", "ssd300_mobilenet_v2"])
def test_other_detectors(kind: str, tmp_path: Path) -> None:
    model = make_model(kind)
    size = model.config.fixed_size or (96, 128)
    export_model(model, tmp_path / "model.onnx", size=size, batch=2)
    images, sizes = make_inputs(2, *size)
    own = expected(model, images, sizes)
    assert own[3].min() > 0
    for runner in load_runners(tmp_path / "model.onnx", "onnx"):
        assert_same(runner.run(images, sizes), own)


def test_openvino_is_left_out_for_an_ssd_on_which_it_crashes(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    metadata = export_model(make_model("retinanet"), path, size=(64, 64))
    assert omitted_engines("onnx", metadata) == {}
    ssd = dataclasses.replace(metadata, architecture="ssd")
    assert "--batch N" in omitted_engines("onnx", ssd)["OpenVINO"]
    assert omitted_engines("onnx", dataclasses.replace(ssd, batch=2)) == {}
    assert [runner.engine for runner in load_runners(path, "onnx")] == ["onnxruntime", "OpenVINO"]
    file = onnx.load(path)
    next(entry for entry in file.metadata_props if entry.key == "architecture").value = "ssd"
    onnx.save(file, path)
    assert [runner.engine for runner in load_runners(path, "onnx")] == ["onnxruntime"]


def test_examples_of_the_page(deployed: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(deployed)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    (deployed / "_C.so").unlink(missing_ok=True)
    (deployed / "_C.so").symlink_to(LIBRARY)
    results = []
    for block in blocks:
        results.append({})
        exec(block, results[-1])
    assert len(results) == 3
    first, second, third = results
    # The model has a score threshold of 0.2, and the file one of 0.1.
    shown = int((first["scores"] > 0.2).sum())
    assert 0 < shown < first["count"] and len(capsys.readouterr().out.splitlines()) == shown
    assert second["boxes"].shape == (2, 20, 4) and second["count"].shape == (2,)
    torch.testing.assert_close(third["boxes"], third["boxes_compiled"], rtol=0, atol=1e-3)


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
