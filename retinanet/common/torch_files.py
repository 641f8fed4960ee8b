"""Reading files that `torch.save` wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from retinanet.common.errors import DataError, one_line


def torch_load(path: Path, expected: str, error_type: type[DataError] = DataError) -> Any:
    """Return the content of a file of `torch.save`, with tensors on the CPU; no code in the file is run.

    Args:
        path: The file.
        expected: What the file should hold, for messages, such as "a training state".
        error_type: The type of the errors.

    Raises:
        DataError: The file is missing, damaged, or holds more than tensors, numbers, text and containers of these.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise error_type(f"{path}: no such file; expected {expected}") from error
    except Exception as error:  # Damaged files make the unpickler raise errors of any type.
        raise error_type(f"{path}: not {expected}, or cut short: {one_line(error)}") from error
