"""Reading of files that `torch.save` wrote."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from retinanet.common.errors import DataError, first_mismatch, one_line
from retinanet.common.files import check_readable

Value = TypeVar("Value")


def torch_load(path: Path, expected: str, error_type: type[DataError] = DataError) -> Any:
    """Return the content of a file that `torch.save` wrote, with tensors on the CPU; no code in the file is run.

    Args:
        path: The file.
        expected: What the file should hold, for messages, such as "a training state".
        error_type: The type of the errors.

    Raises:
        DataError: The file is missing, damaged, or holds more than tensors, numbers, text and containers of these.
    """
    try:
        check_readable(Path(path))
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise error_type(f"{path}: no such file; expected {expected}") from error
    except Exception as error:  # Damaged files make the unpickler raise errors of any type.
        raise error_type(f"{path}: not {expected}, or cut short: {one_line(error)}") from error


#: Part that torch.compile inserts into the names of a state dict, wherever a compiled module stands.
COMPILED = "_orig_mod"
#: Part that data parallelism inserts. Unlike `COMPILED`, it may also be the name of a module.
PARALLEL = "module"


def plain_name(name: str, *wrappers: str) -> str:
    """Return the name of a state-dict entry without the parts that wrappers insert, wherever they stand in it."""
    return ".".join(part for part in name.split(".") if part not in wrappers)


def unwrapped(
    state: Mapping[str, Value], path: str | os.PathLike[str], expected: Collection[str] = ()
) -> dict[str, Value]:
    """Return a state dict without the parts of names that torch.compile and data parallelism insert.

    Args:
        state: The state dict.
        path: The file that it comes from, for messages.
        expected: Names of the module that the entries are for. An entry gets the name that is equal to its own but for
            such parts, which a module may have, too.

    Raises:
        DataError: Two entries get the same name.
    """
    by_plain_name = {plain_name(name, COMPILED, PARALLEL): name for name in expected}
    names: dict[str, str] = {}
    for name in state:
        plain = plain_name(name, COMPILED, PARALLEL)
        new = name if name in expected else by_plain_name.get(plain, plain)
        if new in names:
            raise DataError(f"{path}: {name}: expected one entry for {new}, got this one and {names[new]}")
        names[new] = name
    return {new: state[name] for new, name in names.items()}


def load_weights(module: nn.Module, path: Path, name: str, ignored: tuple[str, ...] = ()) -> None:
    """Load a state dict that `torch.save` wrote into a module.

    Args:
        module: The module, changed in place.
        path: The file.
        name: Name of the module, for messages.
        ignored: Prefixes of the names of entries that are not loaded. The module keeps its own values for them.

    Raises:
        DataError: The file cannot be read, or its entries are not those of the module.
    """
    state = torch_load(path, f"a PyTorch state dict of {name}")
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise DataError(f"{path}: expected a state dict of {name}, got {type(state).__name__} with other contents")
    state = unwrapped({str(key): value for key, value in state.items()}, path, module.state_dict().keys())
    kept = {key: value for key, value in state.items() if not key.startswith(ignored)}
    try:
        missing, unexpected = module.load_state_dict(kept, strict=False)
    except RuntimeError as error:
        raise DataError(f"{path}: weights do not fit {name}: {first_mismatch(error)}") from error
    missing = [key for key in missing if not key.startswith(ignored)]
    if missing or unexpected:
        problem = f"lacks {missing[0]}" if missing else f"has {unexpected[0]}, which {name} lacks"
        raise DataError(f"{path}: weights do not fit {name}: the file {problem}")
