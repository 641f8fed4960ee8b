"""Exports to ONNX, and runtimes that run the files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import openvino
import torch
from torch import Tensor, nn
from torch.export import Dim

import retinanet_ops.onnx

#: What the runtimes on the same file are named in the ids of tests.
RUNTIMES = ("onnxruntime", "openvino")
DYNAMIC = Dim.DYNAMIC


def export(path: Path, model: nn.Module, arguments: tuple[Any, ...], dynamic_shapes: Any, **options: Any) -> Path:
    """Write a model to a file, and check that any runtime of opset 18 can load it."""
    with torch.no_grad():
        torch.onnx.export(
            model.eval(),
            arguments,
            path,
            dynamo=True,
            opset_version=18,
            dynamic_shapes=dynamic_shapes,
            external_data=False,
            verbose=False,
            custom_translation_table=retinanet_ops.onnx.translations(),
            **options,
        )
    onnx.checker.check_model(path, full_check=True)
    graph = onnx.load(path)
    assert [(opset.domain, opset.version) for opset in graph.opset_import] == [("", 18)]
    assert not graph.functions
    return path


class Runtime:
    """A file that one of the runtimes has loaded."""

    def __init__(self, name: str, path: Path) -> None:
        self.session = self.compiled = None
        if name == "onnxruntime":
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 3  # errors only
            self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            self.names = [given.name for given in self.session.get_inputs()]
        else:
            # On some processors OpenVINO computes in bfloat16 unless it is told not to.
            self.compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
            self.names = [given.any_name for given in self.compiled.inputs]

    def __call__(self, *arguments: Tensor) -> list[Tensor]:
        given = {name: tensor.numpy() for name, tensor in zip(self.names, arguments, strict=True)}
        if self.session is not None:
            results = self.session.run(None, given)
        else:
            results = list(self.compiled(given).values())
        return [torch.from_numpy(result.copy()) for result in results]


def assert_equal(results: Sequence[Tensor], expected: Sequence[Tensor], names: Sequence[str]) -> None:
    """Compare what a file returns: integers and bools exactly, boxes within 1e-3 pixels and scores within 1e-6."""
    for name, result, wanted in zip(names, results, expected, strict=True):
        tolerance = dict(rtol=0, atol=1e-3) if "boxes" in name else dict(rtol=1e-6, atol=1e-6)
        assert result.dtype == wanted.dtype and result.shape == wanted.shape, name
        if wanted.is_floating_point():
            torch.testing.assert_close(result, wanted, **tolerance, equal_nan=True, msg=f"{name}: {{}}".format)
        else:
            assert torch.equal(result, wanted), name
