"""Choice of a device by its name."""

from __future__ import annotations

import torch


def resolve_device(name: str) -> torch.device:
    """Return the device with a name; `auto` is the GPU if there is one, else the CPU.

    Raises:
        ValueError: The name is not a device name, or this machine has no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device: expected auto, cpu, cuda or cuda:N, got {name!r}") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device: expected one of {torch.cuda.device_count()} CUDA devices, got {name!r}")
    return device
