"""The ops on the emulator's variant `cost`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from tools.emulator.build import build


def load(module: str = "retinanet_ops._C") -> ModuleType:
    """Build the variant `cost` and import one of its modules. `retinanet_ops` is then the emulated package."""
    (folder,) = build("cost")
    sys.path.insert(0, str(folder))
    return importlib.import_module(module)


def run(emulator: ModuleType, call: Callable[[], object], sampled_blocks: int = 0, profile: bool = False) -> list[Any]:
    """Return the launches of a call. With sampled blocks, its results are incomplete."""
    emulator.set_sampled_blocks(sampled_blocks)
    emulator.set_profile(profile)
    try:
        emulator.take_launches()
        call()
        return emulator.take_launches()
    finally:
        emulator.set_sampled_blocks(0)
        emulator.set_profile(False)
