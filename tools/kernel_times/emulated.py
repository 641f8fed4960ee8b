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


def run(emulator: ModuleType, call: Callable[[], object], profile: bool = False, **sample: int) -> list[Any]:
    """Return the launches of a call. `sample` has the arguments of the emulator's `set_sample`."""
    emulator.set_sample(**sample)
    emulator.set_profile(profile)
    try:
        emulator.take_launches()
        call()
        return emulator.take_launches()
    finally:
        emulator.set_sample()
        emulator.set_profile(False)
