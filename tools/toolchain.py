"""Finds what the scripts need outside of Python's packages: a CUDA toolkit's programs, and modules by their path."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path
from types import ModuleType

#: Where a CUDA toolkit is installed by default, often without being on PATH.
USUAL = "/usr/local/cuda/bin"


def toolkit_bin(*programs: str) -> Path | None:
    """The folder with all these programs: of CUDA_HOME, of PyPI's wheels, the newest first, or on PATH."""
    candidates = [Path(home, "bin") for home in [os.environ.get("CUDA_HOME")] if home]
    if spec := importlib.util.find_spec("nvidia"):
        wheels = [path for folder in spec.submodule_search_locations or () for path in Path(folder).glob("cu*/bin")]
        candidates += sorted(wheels, reverse=True)
    candidates += [Path(found).parent for path in (None, USUAL) if (found := shutil.which(programs[0], path=path))]
    complete = (folder for folder in candidates if all((folder / program).exists() for program in programs))
    return next(complete, None)


def load(path: Path) -> ModuleType:
    """A module by its path."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
