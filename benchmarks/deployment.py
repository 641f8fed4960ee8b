"""One network in the engines that run exported files, on one thread of a CPU.

A ResNet-18 RetinaNet with 80 classes detects in images of 320 x 320 pixels. All rows have the same weights and inputs.
The row "ours" is the program in eager PyTorch. The others also take turns with it.
"""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import one_thread
from torch import Tensor

from retinanet import RetinaNet, RetinaNetConfig
from retinanet.export import export_model
from retinanet.export.families import exportable
from retinanet.export.program import DetectionProgram
from retinanet.export.runners import load_runners
from retinanet.export.verify import FLOAT32, Verification, compare_detections
from retinanet.model.targets import split_detections
from retinanet_ops import Detections

SIZE = (320, 320)
ENGINES = {"torch.export": "pt2", "AOTInductor": "aoti", "onnxruntime": "onnx", "OpenVINO": "onnx"}
ROWS = ("eager", "torch.compile", *ENGINES)


@functools.cache
def network() -> RetinaNet:
    """Return a network with random weights that detects some hundred boxes."""
    torch.manual_seed(0)
    names = tuple(f"class {number}" for number in range(80))
    model = RetinaNet(RetinaNetConfig(class_names=names, backbone="resnet18", min_size=(320,), max_size=320)).eval()
    with torch.no_grad():
        outputs = model.heads(model.transform.normalize(inputs(1)[0]))
        for layer, levels, spread in (
            (model.head.classification_head.cls_logits, outputs.cls_logits, 1.0),
            (model.head.regression_head.bbox_reg, outputs.box_deltas, 0.3),
        ):
            layer.weight *= spread / torch.cat([level.flatten() for level in levels]).std()
    return model


def inputs(count: int) -> tuple[Tensor, Tensor]:
    """Return images [N, 3, H, W] in 0..1 and their sizes [N, 2]."""
    generator = torch.Generator().manual_seed(count)
    return torch.rand(count, 3, *SIZE, generator=generator), torch.tensor([SIZE] * count)


@functools.cache
def program(row: str, count: int) -> Callable[[Tensor, Tensor], Any]:
    """Return the function of a row, for a fixed size and number of images."""
    eager = DetectionProgram(exportable(network()))
    if row == "eager":
        return eager
    if row == "torch.compile":
        return torch.compile(eager, fullgraph=True)
    with tempfile.TemporaryDirectory() as folder:
        kind = ENGINES[row]
        path = Path(folder) / ("model.onnx" if kind == "onnx" else "model.pt2")
        export_model(network(), path, format=kind, size=SIZE, batch=count)
        return next(runner.run for runner in load_runners(path, kind) if runner.engine == row)


def check_detections(found: Any, expected: Any) -> None:
    """Assert that both find the same; rounding may order nearly equal scores in another way."""
    result = Verification("", dataclasses.replace(FLOAT32, boxes=1e-2))
    threshold = network().config.score_threshold
    sides = [split_detections(Detections(*side, side[2], side[3] < 0)) for side in (expected, found)]
    for own, other in zip(*sides, strict=True):
        compare_detections(own, other, result, threshold, expected[0].shape[1])
    assert result.agrees, result


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("count", (1, pytest.param(4, marks=pytest.mark.full)))
def test_detections(compare, device, count, row):
    if device.type != "cpu":
        pytest.skip("the engines run on the CPU here")
    images = inputs(count)
    with one_thread(), torch.no_grad():
        function, eager = program(row, count), program("eager", count)
        compare(
            "ours" if row == "eager" else row,
            lambda: function(*images),
            eager(*images),
            check=check_detections,
            group=f"{count} images of {SIZE[0]} x {SIZE[1]}",
            rival=None if row == "eager" else lambda: eager(*images),
        )
