"""Finds the programs of a CUDA toolkit."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path

#: Default location of a CUDA toolkit, which is often missing from PATH.
DEFAULT_BIN = "/usr/local/cuda/bin"


def toolkit_bin(*programs: str) -> Path | None:
    """Return the first folder that holds all these programs, or None.

    The search order is CUDA_HOME, the toolkits that PyPI's wheels install (newest first), PATH, `DEFAULT_BIN`.
    """
    candidates = [Path(home, "bin") for home in [os.environ.get("CUDA_HOME")] if home]
    if spec := importlib.util.find_spec("nvidia"):
        wheels = [path for folder in spec.submodule_search_locations or () for path in Path(folder).glob("cu*/bin")]
        candidates += sorted(wheels, reverse=True)
    for path in (None, DEFAULT_BIN):
        if program := shutil.which(programs[0], path=path):
            candidates.append(Path(program).parent)
    complete = (folder for folder in candidates if all((folder / program).exists() for program in programs))
    return next(complete, None)
