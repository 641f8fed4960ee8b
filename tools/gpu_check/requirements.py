"""Checks whether the machine has what the stages of gpu_check need."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import os
import re
import subprocess
from pathlib import Path

from tools.gpu_check.runner import ROOT, Missing
from tools.toolchain import toolkit_bin

#: The oldest setuptools that reads the license fields of pyproject.toml.
SETUPTOOLS = 77


def need(*modules: str) -> None:
    """Raise `Missing` unless Python finds the modules."""
    if missing := [name for name in modules if importlib.util.find_spec(name) is None]:
        raise Missing(f"no {', '.join(missing)}")


def need_setuptools() -> None:
    """Raise `Missing` unless setuptools can build the project."""
    need("setuptools")
    version = importlib.metadata.version("setuptools")
    if int(version.split(".")[0]) < SETUPTOOLS:
        raise Missing(f"setuptools {version} is older than {SETUPTOOLS}")


def missing_imports(path: Path) -> list[str]:
    """Return the packages that a test file needs, directly or through modules of this project, but that are missing."""
    seen, to_read, missing = {path}, [path], set()
    while to_read:
        body = ast.parse(to_read.pop().read_text()).body
        imports = [name.name for node in body if isinstance(node, ast.Import) for name in node.names]
        for node in body:
            if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                imports += [node.module, *(f"{node.module}.{name.name}" for name in node.names)]
        for name in imports:
            # `import a.b` imports `a` first.
            parts = name.split(".")
            prefixes = ["/".join(parts[:n]) for n in range(1, len(parts) + 1)]
            places = [
                base / (prefix + end)
                for base in (ROOT, path.parent)
                for prefix in prefixes
                for end in (".py", "/__init__.py")
            ]
            ours = {place for place in places if place.is_file()}
            to_read += ours - seen
            seen |= ours
            if not ours and importlib.util.find_spec(parts[0]) is None:
                missing.add(parts[0])
    return sorted(missing)


def op_tests() -> tuple[list[str], list[str]]:
    """Return the test files of tests/ops that can run here, and the others with the reason why they cannot."""
    files, left_out = [], []
    for path in sorted((ROOT / "tests" / "ops").glob("test_*.py")):
        if missing := missing_imports(path):
            left_out.append(f"{path.name} (no {', '.join(missing)})")
        else:
            files.append(str(path.relative_to(ROOT)))
    return files, left_out


def find_toolkit() -> str | None:
    """Return the CUDA_HOME to build with: the user's, or the toolkit of the first nvcc that `toolkit_bin` finds."""
    if home := os.environ.get("CUDA_HOME"):
        return home
    folder = toolkit_bin("nvcc")
    if folder is None:
        return None
    # nvcc may be a link or a script outside its toolkit, so ask nvcc itself for the toolkit's folder.
    command = [str(folder / "nvcc"), "--dryrun", "-x", "cu", os.devnull]
    dry_run = subprocess.run(command, capture_output=True, text=True, check=False)
    top = re.search(r"^#\$ TOP=(.*)$", dry_run.stderr, re.MULTILINE)
    return str(Path(top[1]).resolve()) if top else str((folder / "nvcc").resolve().parent.parent)
