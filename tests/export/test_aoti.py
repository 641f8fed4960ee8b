"""Packages of AOTInductor and files of torch.export, run by processes that have the kernels but not this package."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cli_cases import ROOT, SUBPROCESS
from export_cases import assert_same, expected, make_inputs, model, pt2_file  # noqa: F401  fixtures

import retinanet_ops
from retinanet.export import export_model
from retinanet.export.runners import load_runners
from retinanet.model.detector import Detector

LIBRARY = Path(retinanet_ops.__file__).parent / "_C.so"

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


@pytest.fixture(scope="module")
def aoti_file(model: Detector, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the network in a package of AOTInductor with default options."""
    path = tmp_path_factory.mktemp("aoti") / "model.pt2"
    export_model(model, path, format="aoti")
    return path


def test_a_process_with_the_kernels_alone_runs_the_files(
    model: Detector, pt2_file: Path, aoti_file: Path, tmp_path: Path
) -> None:
    inputs = [make_inputs(1, 64, 96), make_inputs(2, 128, 96), make_inputs(3, 96, 160)]
    torch.save(inputs, tmp_path / "inputs.pt")
    paths = LIBRARY, pt2_file, aoti_file, tmp_path / "inputs.pt", tmp_path / "outputs.pt"
    environment = {**SUBPROCESS, "PYTHONPATH": ""}
    subprocess.run([sys.executable, "-c", LOADER, *map(str, paths)], env=environment, cwd=tmp_path, check=True)
    for outputs in torch.load(tmp_path / "outputs.pt"):
        for got, pair in zip(outputs, inputs, strict=True):
            own = expected(model, *pair)
            assert own[3].min() > 0
            assert_same(got, own)


def test_the_package_has_the_metadata(aoti_file: Path) -> None:
    (runner,) = load_runners(aoti_file, "aoti")
    assert runner.metadata.class_names == ("a", "b", "c") and runner.metadata.rule.multiple == 32
    assert [file.name for file in aoti_file.parent.iterdir()] == ["model.pt2"]


@pytest.mark.skipif(not (ROOT / "examples").exists(), reason="the examples are only in the source tree")
@pytest.mark.skipif(shutil.which("cmake") is None, reason="no cmake: run pip install cmake")
def test_the_cpp_example_finds_the_same_detections(model: Detector, aoti_file: Path, tmp_path: Path) -> None:
    build = tmp_path / "build"
    options = ["-S", ROOT / "examples" / "cpp", "-B", build, f"-DTORCH={torch.__path__[0]}"]
    for command in (["cmake", *options], ["cmake", "--build", build]):
        subprocess.run(command, check=True, capture_output=True)

    pixels = (make_inputs(1, 90, 120)[0][0] * 255).to(torch.uint8)  # [3, 90, 120]
    picture = tmp_path / "picture.ppm"
    picture.write_bytes(b"P6\n120 90\n255\n" + pixels.permute(1, 2, 0).contiguous().numpy().tobytes())
    result = subprocess.run([build / "detect", LIBRARY, aoti_file, picture], capture_output=True, text=True, check=True)
    rows = [[float(n) for n in re.sub("class|score|box", "", line).split()] for line in result.stdout.splitlines()]

    image = torch.zeros(1, 3, 96, 128)
    image[0, :, :90, :120] = pixels.float() / 255
    boxes, scores, labels, count = (values[0] for values in expected(model, image, torch.tensor([[90, 120]])))
    assert len(rows) == count > 0
    own = torch.cat((labels[:, None], scores[:, None], boxes), dim=1)[: len(rows)]
    torch.testing.assert_close(torch.tensor(rows), own, rtol=0, atol=1e-3)

    picture.write_bytes(b"P5\n")
    result = subprocess.run([build / "detect", LIBRARY, aoti_file, picture], capture_output=True, text=True)
    assert result.returncode == 1 and result.stderr == f"detect: error: {picture}: expected a binary PPM\n"
