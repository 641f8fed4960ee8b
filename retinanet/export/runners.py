"""Running an exported file by the engines that this machine has."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from retinanet.common.errors import DataError, one_line
from retinanet.export.formats import EXTRA_FILE, require
from retinanet.export.metadata import INPUT_NAMES, Metadata


class Runner(NamedTuple):
    """An exported file that an engine has loaded.

    Attributes:
        engine: Name of the engine.
        metadata: What the file says about itself.
        run: Returns the outputs for images [N, 3, H, W] float32 in 0..1 and sizes [N, 2] int64.
    """

    engine: str
    metadata: Metadata
    run: Callable[[Tensor, Tensor], tuple[Tensor, ...]]


def load_runners(path: Path, export_format: str) -> list[Runner]:
    """Return an exported file as each engine for its format has loaded it.

    Raises:
        UsageError: The package of the engine is not installed.
        DataError: The file is missing, damaged or not of this package.
    """
    if export_format == "onnx":
        require("onnxruntime", "onnx", "onnxruntime")
    try:
        runners = [{"pt2": _pt2, "aoti": _aoti, "onnx": _onnxruntime}[export_format](path)]
        if export_format == "onnx" and not omitted_engines(export_format, runners[0].metadata):
            runners.append(_openvino(path))
        return runners
    except Exception as error:  # The engines raise errors of many classes.
        raise DataError(f"{path}: cannot be loaded as {export_format}: {one_line(error)}") from error


def omitted_engines(export_format: str, metadata: Metadata) -> dict[str, str]:
    """Return the engines for a file that `load_runners` leaves out, each with the reason."""
    if export_format != "onnx":
        return {}
    if importlib.util.find_spec("openvino") is None:
        return {"OpenVINO": "it is not installed"}
    if metadata.architecture == "ssd" and metadata.batch is None:
        # A crash would end the process that verifies the file.
        return {"OpenVINO": "OpenVINO 2026.4 crashes on an SSD for any number of images; export with --batch N"}
    return {}


def _pt2(path: Path) -> Runner:
    files = {EXTRA_FILE: ""}
    with path.open("rb") as file:
        module = torch.export.load(file, extra_files=files).module()
    return Runner("torch.export", Metadata.from_texts(json.loads(files[EXTRA_FILE])), _without_gradient(module))


def _aoti(path: Path) -> Runner:
    package = torch._inductor.aoti_load_package(str(path))
    return Runner("AOTInductor", Metadata.from_texts(package.get_metadata()), _without_gradient(package))


def _onnxruntime(path: Path) -> Runner:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(images: Tensor, sizes: Tensor) -> tuple[Tensor, ...]:
        return tuple(map(torch.from_numpy, session.run(None, _arrays(images, sizes))))

    return Runner("onnxruntime", Metadata.from_texts(session.get_modelmeta().custom_metadata_map), run)


def _openvino(path: Path) -> Runner:
    import openvino

    # Other precisions than that of the file would be the engine's own choice on some processors.
    options = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
    core = openvino.Core()
    model = core.compile_model(core.read_model(str(path)), "CPU", options)
    metadata = _onnxruntime(path).metadata

    def run(images: Tensor, sizes: Tensor) -> tuple[Tensor, ...]:
        found = model(_arrays(images, sizes))
        return tuple(torch.from_numpy(found[name].copy()) for name in metadata.outputs)

    return Runner("OpenVINO", metadata, run)


def _arrays(images: Tensor, sizes: Tensor) -> dict[str, Any]:
    return {name: value.cpu().numpy() for name, value in zip(INPUT_NAMES, (images, sizes), strict=True)}


def _without_gradient(program: Callable[..., Any]) -> Callable[[Tensor, Tensor], tuple[Tensor, ...]]:
    def run(images: Tensor, sizes: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return tuple(program(images, sizes))

    return run
