"""Reading other projects' checkpoints: only tensors, numbers and text are read, and no code from a file is run."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from retinanet.checkpoints.convert.safe_pickle import ArrayUnpickler, PickledArray, array_globals_of_torch
from retinanet.common.errors import DataError
from retinanet.common.torch_files import unwrapped

#: Entries under which a file may hold its state dict.
_STATE_DICTS = ("state_dict", "model", "model_state_dict")
# The first bytes of files that torch.save wrote before version 1.6.
_OLD_TORCH = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."

# Hyper-parameters often hold paths. They are read as plain ones, of which those of another system can be made, too.
_PATHS = [
    (pure, f"{module}.{name}")
    for pure, names in (
        (PurePosixPath, ("PosixPath", "PurePosixPath")),
        (PureWindowsPath, ("WindowsPath", "PureWindowsPath")),
    )
    for module in ("pathlib", "pathlib._local")
    for name in names
]


class Content(NamedTuple):
    """The content of a checkpoint.

    Attributes:
        state: The state dict, on the CPU; floating-point tensors are float32.
        extras: Entries beside the state dict.
    """

    state: dict[str, Tensor]
    extras: dict[str, Any]


def read_checkpoint(path: Path) -> Content:
    """Read a file that `torch.save` wrote, a pickle of NumPy arrays (detectron2's `*.pkl`) or a `*.safetensors`.

    Raises:
        DataError: The file is missing or damaged, contains objects other than data, or has no state dict of finite
            tensors.
    """
    if not path.is_file():
        raise DataError(f"{path}: {'expected a file, got a folder' if path.is_dir() else 'no such file'}")
    try:
        content = _load(path)
    except DataError:
        raise
    except Exception as error:  # Damaged files make unpicklers raise errors of any type.
        text = " ".join(str(error).split()).rpartition("WeightsUnpickler error: ")[2]
        if forbidden := re.search(r"[Uu]nsupported (?:global: )?GLOBAL ([\w.]+)", text):
            # mmengine's objects are the training log of mmdet 3; 'meta' holds the classes and the style.
            of_mmengine = forbidden[1].startswith("mmengine.")
            what = "the checkpoint's 'meta' and 'state_dict'" if of_mmengine else "model.state_dict()"
            raise DataError(
                f"{path}: expected only tensors, numbers and text, got a {forbidden[1]}, which is not read because "
                f"reading it could run code; in an environment that can load this file, save {what} to a new file and "
                "convert the new file"
            ) from error
        raise DataError(f"{path}: not a checkpoint, or cut short: {text[:200] or type(error).__name__}") from error
    if not isinstance(content, Mapping):
        raise DataError(f"{path}: expected a state dict, got {type(content).__name__}")
    key = next((k for k in _STATE_DICTS if isinstance(content.get(k), Mapping)), None)
    state = content if key is None else content[key]
    extras = {} if key is None else {str(k): v for k, v in content.items() if k != key}
    return Content(unwrapped({str(k): _tensor(path, str(k), v) for k, v in state.items()}, path), extras)


def _load(path: Path) -> Any:
    with path.open("rb") as file:
        head = file.read(32)
        if head.startswith(b"PK") or _OLD_TORCH in head:
            # Training scripts often save their arguments and NumPy numbers, too. Unpickling these types runs no code.
            with torch.serialization.safe_globals([argparse.Namespace, *_PATHS, *array_globals_of_torch()]):
                return torch.load(path, map_location="cpu", weights_only=True)
        # A file of safetensors starts with the length of its header, whose lowest byte may be that of a pickle.
        is_safetensors = head[8:9] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size
        if head[:1] == b"\x80" and not is_safetensors:
            file.seek(0)
            return ArrayUnpickler(file, encoding="latin1").load()
    with safe_open(path, framework="pt") as tensors:
        if "retinanet" in (tensors.metadata() or {}):
            raise DataError(
                f"{path}: expected a checkpoint of another project, got a model file of this project, which needs no "
                "conversion"
            )
        return {name: tensors.get_tensor(name) for name in tensors.keys()}


def _tensor(path: Path, key: str, value: Any) -> Tensor:
    if isinstance(value, Mapping):
        raise DataError(
            f"{path}: {key}: expected a tensor, got a dict; if it is the state dict, save it alone to a new file"
        )
    if isinstance(value, PickledArray):
        if value.value is None:
            raise DataError(f"{path}: {key}: expected an array of numbers, got one of {value.kind}")
        value = value.value
    try:
        tensor = value.detach() if isinstance(value, Tensor) else torch.from_numpy(np.array(value))
    except (TypeError, ValueError) as error:
        raise DataError(f"{path}: {key}: expected a tensor, got {type(value).__name__}") from error
    if tensor.is_complex() or tensor.is_quantized or tensor.layout != torch.strided:
        kind = f"{tensor.layout}, {tensor.dtype}".replace("torch.", "")
        raise DataError(f"{path}: {key}: expected a dense tensor of real numbers, got one of {kind}")
    if tensor.is_floating_point():
        tensor = tensor.float()
        if not tensor.isfinite().all():
            raise DataError(f"{path}: {key}: expected finite numbers, got NaN or infinity")
    return tensor


def network_of(path: Path, state: dict[str, Tensor], signature: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Find the network in a state dict that may hold more, as that of a Lightning module does.

    Args:
        path: The file, for messages.
        state: The state dict.
        signature: A name that the network's own state dict has.

    Returns:
        The network's tensors by its own names, and the other tensors. If no name ends with the signature, the network
        is the whole state dict.

    Raises:
        DataError: There are several networks.
    """
    prefixes = [key[: -len(signature)] for key in state if key == signature or key.endswith(f".{signature}")]
    if len(prefixes) > 1:
        raise DataError(
            f"{path}: expected one network, got {len(prefixes)}, with the prefixes {', '.join(map(repr, prefixes))}; "
            "save the state dict of one of them to a new file"
        )
    prefix = prefixes[0] if prefixes else ""
    inside = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    return inside, {key: value for key, value in state.items() if not key.startswith(prefix)}
