"""Model files, which hold weights and configuration in one `*.safetensors`, and training states.

A model file holds the state dict under torchvision's names and, in its metadata, the architecture, the configuration
and the score thresholds as JSON, so that loading needs no other information. Loading a file runs no code from it. An
interrupted save leaves the old file as it was.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from retinanet.common.errors import DataError, first_mismatch, listed, one_line
from retinanet.common.files import replacing
from retinanet.common.torch_files import COMPILED, plain_name, torch_load, unwrapped
from retinanet.model.architectures import build_model
from retinanet.model.config import RetinaNetConfig
from retinanet.model.detector import Detector
from retinanet.model.detector_config import DetectorConfig, config_from_dict
from retinanet.model.thresholds import ScoreThresholds

# A single key holds everything, because the order of several keys in the file, and so its bytes, would be arbitrary.
_KEY = "retinanet"
_VERSION = 1


class CheckpointError(DataError):
    """A checkpoint cannot be used. The message is one line that names the file and the reason."""


class ModelFile(NamedTuple):
    """The content of a model file.

    Attributes:
        path: The file.
        config: The configuration.
        tensors: The state dict, on the CPU.
        score_thresholds: The score thresholds, or None if the model had none.
    """

    path: Path
    config: DetectorConfig
    tensors: dict[str, Tensor]
    score_thresholds: ScoreThresholds | None = None


def save_model(path: str | os.PathLike[str], model: Detector) -> None:
    """Write weights, configuration and score thresholds to one file; an interrupted call leaves the old file.

    Args:
        path: The file, by convention `*.safetensors`.
        model: The model, on any device. It, or modules of it, may be compiled with torch.compile.
    """
    state = model.state_dict().items()
    tensors = {plain_name(name, COMPILED): tensor.detach().cpu().contiguous() for name, tensor in state}
    content = {"version": _VERSION, "architecture": model.config.architecture, "config": model.config.to_dict()}
    if model.score_thresholds is not None:
        content["score_thresholds"] = model.score_thresholds.to_dict()
    description = json.dumps(content)
    with replacing(Path(path)) as temporary:
        # safetensors' save_file leaves a temporary file of its own behind when it is interrupted.
        temporary.write_bytes(save(tensors, metadata={_KEY: description}))


def load_model(
    path: str | os.PathLike[str],
    device: str | torch.device = "cpu",
    *,
    class_names: Sequence[str] | None = None,
    backbone: nn.Module | None = None,
) -> Detector:
    """Return the model, in evaluation mode, that `save_model` wrote to a file.

    Args:
        path: The file.
        device: The model's device.
        class_names: Classes that the caller needs, in the order of their labels. None accepts any.
        backbone: The module for a model whose backbone is `custom`. Its weights are replaced by the file's.

    Returns:
        The model with the configuration and the score thresholds from the file.

    Raises:
        CheckpointError: The file is missing, cut short, damaged or not of this project, has other classes, or needs
            another `backbone`.
    """
    path, config, tensors, score_thresholds = read_model(path)
    if class_names is not None and tuple(class_names) != config.class_names:
        raise CheckpointError(
            f"{path}: the checkpoint's classes differ: expected {listed(class_names)}; got {listed(config.class_names)}"
        )
    try:
        model = build_model(config, backbone=backbone)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    try:
        model.load_state_dict(unwrapped(tensors, path, model.state_dict().keys()))
    except RuntimeError as error:
        raise CheckpointError(f"{path}: weights do not fit the configuration: {first_mismatch(error)}") from error
    model.score_thresholds = score_thresholds
    return model.to(device).eval()


def read_model(path: str | os.PathLike[str]) -> ModelFile:
    """Return configuration and state dict from a file that `save_model` wrote.

    Raises:
        CheckpointError: The file is missing, cut short, damaged or not of this project.
    """
    path = Path(path)
    metadata, tensors = _read_safetensors(path)
    if _KEY not in metadata:
        raise CheckpointError(
            f"{path}: not a checkpoint of this project: its metadata has no entry {_KEY!r} with the configuration; "
            "`retinanet convert` converts checkpoints of other projects"
        )
    try:
        description = json.loads(metadata[_KEY])
        if description["version"] != _VERSION:
            raise CheckpointError(
                f"{path}: expected format version {_VERSION}, got {description['version']}; use the version of "
                "retinanet-ops that wrote the file"
            )
        # Files of earlier versions do not name the architecture.
        architecture = description.get("architecture", RetinaNetConfig.architecture)
        config, thresholds = (
            config_from_dict(description["config"], architecture),
            description.get("score_thresholds"),
        )
        if thresholds is not None:
            thresholds = ScoreThresholds.from_dict(thresholds, config.num_classes)
        return ModelFile(path, config, tensors, thresholds)
    except KeyError as error:
        raise CheckpointError(f"{path}: the metadata has no entry {error}") from error
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def save_state(path: str | os.PathLike[str], state: dict[str, Any]) -> None:
    """Write a training state (tensors, numbers, strings, lists and dicts); an interrupted call leaves the old file.

    Raises:
        OSError: The file cannot be written. `filename` names it.
    """
    with replacing(Path(path)) as temporary:
        try:
            with temporary.open("wb") as file:
                torch.save(state, file)
        except RuntimeError as error:
            # torch's writer replaces the error of the file, such as a full disk, by one of its own.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def load_state(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the training state that `save_state` wrote, with tensors on the CPU; no code from the file runs.

    Raises:
        CheckpointError: The file is missing, cut short or not a training state.
    """
    path = Path(path)
    state = torch_load(path, "a training state", CheckpointError)
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: not a training state: expected a dict, got {type(state).__name__}")
    return state


def _read_safetensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    if not path.is_file():
        raise CheckpointError(f"{path}: {'expected a file, got a folder' if path.is_dir() else 'no such file'}")
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not a safetensors file, or cut short: {one_line(error)}") from error
