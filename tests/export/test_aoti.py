"""Packages of AOTInductor and files of torch.export, run by processes that have the kernels but not this package."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from cli_cases import ROOT, SUBPROCESS
from export_cases import assert_same, expected, make_inputs

import retinanet_ops
from retinanet.export import InputRule
from retinanet.export.runners import load_runners
from retinanet.model.detector import Detector

PAGE = ROOT / "docs" / "deploy.md"
LIBRARY = Path(retinanet_ops.__file__).parent / "_C.so"
#: Finds `cmake` and `python` beside the running Python first, as in an activated environment.
PATH = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))

#: Loads the kernels and nothing else of this package, runs both files on inputs and stores what they return.
LOADER = """
import sys, torch
library, pt2, aoti, inputs, outputs = sys.argv[1:]
torch.ops.load_library(library)
programs = torch.export.load(pt2).module(), torch._inductor.aoti_load_package(aoti)
with torch.no_grad():
    torch.save([[tuple(program(*pair)) for pair in torch.load(inputs)] for program in programs], outputs)
assert not {"retinanet", "retinanet_ops"} & sys.modules.keys()
"""


def test_a_process_with_the_kernels_alone_runs_the_files(model: Detector, deployed: Path, tmp_path: Path) -> None:
    inputs = [make_inputs(1, 64, 96), make_inputs(2, 128, 96), make_inputs(3, 96, 160)]
    torch.save(inputs, tmp_path / "inputs.pt")
    paths = LIBRARY, deployed / "model.pt2", deployed / "compiled.pt2", tmp_path / "inputs.pt", tmp_path / "outputs.pt"
    environment = {**SUBPROCESS, "PYTHONPATH": ""}
    subprocess.run([sys.executable, "-c", LOADER, *map(str, paths)], env=environment, cwd=tmp_path, check=True)
    for outputs in torch.load(tmp_path / "outputs.pt"):
        for got, pair in zip(outputs, inputs, strict=True):
            own = expected(model, *pair)
            assert own[3].min() > 0
            assert_same(got, own)


def test_the_package_has_the_metadata(deployed: Path) -> None:
    (runner,) = load_runners(deployed / "compiled.pt2", "aoti")
    assert runner.metadata.class_names == ("a", "b", "c") and runner.metadata.rule.multiple == 32


@pytest.mark.skipif(shutil.which("cmake", path=PATH) is None, reason="no cmake: run pip install cmake")
def test_the_cpp_example_finds_the_same_detections(model: Detector, deployed: Path, tmp_path: Path) -> None:
    for name, target in (("_C.so", LIBRARY), ("examples", ROOT / "examples")):
        (deployed / name).unlink(missing_ok=True)
        (deployed / name).symlink_to(target)
    pixels = (make_inputs(1, 90, 120)[0][0] * 255).to(torch.uint8)  # [3, 90, 120]
    picture = b"P6\n120 90\n255\n" + pixels.permute(1, 2, 0).contiguous().numpy().tobytes()
    (deployed / "photo.ppm").write_bytes(picture)
    *builds, detect = re.findall(r"^    ((?:cmake|build/detect) .*)$", PAGE.read_text(), flags=re.MULTILINE)
    for command in builds:
        subprocess.run(
            command, shell=True, cwd=deployed, env={**os.environ, "PATH": PATH}, check=True, capture_output=True
        )
    result = subprocess.run(detect.split(), cwd=deployed, capture_output=True, text=True, check=True)
    rows = [[float(n) for n in re.sub("class|score|box", "", line).split()] for line in result.stdout.splitlines()]

    image = torch.zeros(1, 3, 96, 128)
    image[0, :, :90, :120] = pixels.float() / 255
    boxes, scores, labels, count = (values[0] for values in expected(model, image, torch.tensor([[90, 120]])))
    assert len(rows) == count > 0
    own = torch.cat((labels[:, None], scores[:, None], boxes), dim=1)[: len(rows)]
    torch.testing.assert_close(torch.tensor(rows), own, rtol=0, atol=1e-3)

    def error_of(**texts: str) -> str:
        """Return what the program says of a package with other metadata."""
        with zipfile.ZipFile(deployed / "compiled.pt2") as old, zipfile.ZipFile(tmp_path / "other.pt2", "w") as new:
            for entry in old.infolist():
                content = old.read(entry)
                if entry.filename.endswith("metadata.json"):
                    content = json.dumps({**json.loads(content), **texts}).encode()
                new.writestr(entry, content)
        command = [*detect.split()[:2], str(tmp_path / "other.pt2"), "photo.ppm"]
        result = subprocess.run(command, cwd=deployed, capture_output=True, text=True)
        assert result.returncode == 1 and not result.stdout
        return result.stderr.strip()

    assert error_of(postprocess="raw") == "detect: error: package: expected --postprocess nms, got raw"
    assert error_of(batch="4") == "detect: error: package: expected --batch 1 or dynamic, got 4"
    larger = "detect: error: picture: expected at most 96 x 96 pixels, got 90 x 120; resize it"
    assert error_of(size="[96, 96]") == larger
    rule = InputRule(min_size=None, max_size=1, stretched=(90, 100), padded=(96, 128))
    stretched = "detect: error: picture: expected 90 x 100 pixels, got 90 x 120; resize it"
    assert error_of(size="[96, 128]", preprocessing=json.dumps(rule.to_dict())) == stretched

    (deployed / "photo.ppm").write_bytes(b"P5\n")
    result = subprocess.run(detect.split(), cwd=deployed, capture_output=True, text=True)
    assert result.returncode == 1 and result.stderr == "detect: error: photo.ppm: expected a binary PPM\n"
