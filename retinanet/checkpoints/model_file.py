"""Model files: weights and configuration in one `*.safetensors`; and the training state beside them.

A model file holds the state dict under torchvision's names and, in its metadata, the configuration as JSON,
so that nothing has to be said twice. Loading it runs no code from the file. Files are written whole or not at
all.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from retinanet.common.errors import DataError, first_mismatch, listed, one_line
from retinanet.common.files import replacing
from retinanet.model.config import RetinaNetConfig
from retinanet.model.network import RetinaNet

# One key holds everything: with several their order in the file, and so its bytes, would be arbitrary.
_KEY = "retinanet"
_VERSION = 1


class CheckpointError(DataError):
    """A checkpoint cannot be used; the message is one line that names the file and the reason."""


def save_model(path: str | os.PathLike[str], model: RetinaNet) -> None:
    """Writes weights and configuration to one file, replacing it whole or not at all.

    Args:
        path: The file, by custom `*.safetensors`.
        model: On any device.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    description = json.dumps({"version": _VERSION, "config": model.config.to_dict()})
    with replacing(Path(path)) as temporary:
        # Not save_file: it leaves a temporary file of its own behind when it is interrupted.
        temporary.write_bytes(save(tensors, metadata={_KEY: description}))


def load_model(
    path: str | os.PathLike[str],
    device: str | torch.device = "cpu",
    *,
    class_names: Sequence[str] | None = None,
    backbone: nn.Module | None = None,
) -> RetinaNet:
    """Reads a model that `save_model` wrote; it is in evaluation mode.

    Args:
        path: The file.
        device: Where the model shall be.
        class_names: Classes that the caller needs, in order of their labels; None accepts any.
        backbone: The module, of a model whose backbone is `custom`; its weights are replaced by the file's.

    Returns:
        The model with its own configuration.

    Raises:
        CheckpointError: The file is missing, cut short, not of this project, damaged, or has other classes.
    """
    path = Path(path)
    config, tensors = read_model(path)
    if class_names is not None and tuple(class_names) != config.class_names:
        raise CheckpointError(
            f"{path}: the checkpoint's classes differ: expected {listed(class_names)}; got {listed(config.class_names)}"
        )
    try:
        model = RetinaNet(config, backbone=backbone)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise CheckpointError(f"{path}: weights do not fit the configuration: {first_mismatch(error)}") from error
    return model.to(device).eval()


def read_model(path: Path) -> tuple[RetinaNetConfig, dict[str, torch.Tensor]]:
    """Configuration and state dict in a file that `save_model` wrote.

    Raises:
        CheckpointError: The file is missing, cut short, not of this project or damaged.
    """
    metadata, tensors = _read_safetensors(path)
    if _KEY not in metadata:
        raise CheckpointError(f"{path}: not a checkpoint of this project: its metadata holds no configuration")
    try:
        description = json.loads(metadata[_KEY])
        if description["version"] != _VERSION:
            raise CheckpointError(f"{path}: expected format version {_VERSION}, got {description['version']}")
        return RetinaNetConfig.from_dict(description["config"]), tensors
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def save_state(path: str | os.PathLike[str], state: dict[str, Any]) -> None:
    """Writes a training state (tensors, numbers, strings, lists and dicts), whole or not at all."""
    with replacing(Path(path)) as temporary:
        torch.save(state, temporary)


def load_state(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a training state that `save_state` wrote, onto the CPU; no code from the file runs.

    Raises:
        CheckpointError: The file is missing, cut short or not a training state.
    """
    path = Path(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file") from error
    except Exception as error:  # the unpickler raises whatever damaged bytes provoke
        raise CheckpointError(f"{path}: not a training state, or cut short: {one_line(error)}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: not a training state: it holds {type(state).__name__}")
    return state


def _read_safetensors(path: Path) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    if not path.is_file():
        raise CheckpointError(f"{path}: {'is a folder, expected a file' if path.is_dir() else 'no such file'}")
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not a safetensors file, or cut short: {one_line(error)}") from error
