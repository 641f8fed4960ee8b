"""Create a new op that builds and passes its tests, as a starting point for a real one.

    python -m tools.new_op NAME        (or: make op NAME=...)

The program writes the op's seven files from tools/new_op/templates, in which the op is called null_op. It adds the op's
schema to csrc/library.cpp, and its name to retinanet_ops/__init__.py and retinanet_ops/reference/__init__.py. Then
replace the formula and the parts that are marked TODO, add a line to CHANGELOG.md, and run `make pages`, which adds the
op to docs/generated/ops.md.
"""

from __future__ import annotations

import argparse
import keyword
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TEMPLATES = Path(__file__).resolve().parent / "templates"
PLACEHOLDER = "null_op"
#: File that each template becomes.
FILES = {
    "op.h": "csrc/{name}.h",
    "op_cpu.cpp": "csrc/{name}_cpu.cpp",
    "op_cuda.cu": "csrc/{name}_cuda.cu",
    "op.py": "retinanet_ops/{name}.py",
    "reference.py": "retinanet_ops/reference/{name}.py",
    "test_op.py": "tests/ops/test_{name}.py",
    "benchmark.py": "benchmarks/{name}.py",
}
SCHEMA = '  // {name}\n  m.def("{name}(Tensor x, float scale) -> Tensor");\n'


class NewOpError(Exception):
    """The op cannot be created. The message states the reason."""


def check_name(name: str, root: Path) -> None:
    """Raise `NewOpError` unless the name is a new Python identifier in lower case."""
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise NewOpError(f"NAME must be a Python identifier in lower case, got {name!r}")
    if taken := [path for path in targets(name).values() if (root / path).exists()]:
        raise NewOpError(f"NAME must be new, but {', '.join(taken)} exists; choose another name or delete the files")


def targets(name: str) -> dict[str, str]:
    """Return the file that each template becomes, relative to the root."""
    return {template: path.format(name=name) for template, path in FILES.items()}


def with_schema(text: str, name: str) -> str:
    """Return the text of library.cpp with the op's schema as the last one."""
    end = text.rindex("}\n")
    return text[:end] + SCHEMA.format(name=name) + text[end:]


def with_export(text: str, name: str) -> str:
    """Return the text of an `__init__.py` with the op imported from its module and listed in `__all__`."""
    line = f"from .{name} import {name}\n"
    imports = list(re.finditer(r"^from \.\w+ import (?:\([^)]*\)|[^\n]*)\n", text, re.MULTILINE))
    place = next((match.start() for match in imports if match[0] > line), imports[-1].end())
    text = text[:place] + line + text[place:]
    entries = list(re.finditer(r'^    "(\w+)",\n', text[text.index("__all__ = [") :], re.MULTILINE))
    start = text.index("__all__ = [")
    place = start + next((match.start() for match in entries if match[1] > name), entries[-1].end())
    return text[:place] + f'    "{name}",\n' + text[place:]


def lay_down(name: str, root: Path) -> list[str]:
    """Write the files of a new op, add it to the central files, and return all of them relative to the root.

    Raises:
        NewOpError: The name is not an identifier in lower case, or one of the op's files exists.
    """
    check_name(name, root)
    for template, path in targets(name).items():
        (root / path).write_text((TEMPLATES / template).read_text().replace(PLACEHOLDER, name))
    touched = list(targets(name).values())
    for path, change in (
        ("csrc/library.cpp", with_schema),
        ("retinanet_ops/__init__.py", with_export),
        ("retinanet_ops/reference/__init__.py", with_export),
    ):
        (root / path).write_text(change((root / path).read_text(), name))
        touched.append(path)
    return touched


def format_files(paths: list[str], root: Path) -> None:
    """Format the files with ruff and clang-format, if these programs are installed beside Python or on PATH."""
    folders = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    python = [path for path in paths if path.endswith(".py")]
    cpp = [path for path in paths if not path.endswith(".py")]
    for tool, arguments in (
        ("ruff", ["format", "--quiet", *python]),
        ("ruff", ["check", "--quiet", "--fix", *python]),  # prints what is left for the author to mend
        ("clang-format", ["-i", *cpp]),
    ):
        if program := shutil.which(tool, path=folders):
            subprocess.run([program, *arguments], cwd=root, stdout=sys.stderr, check=False)


def main() -> int:
    """Create the op named on the command line and print what is left to do."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="name of the op, its files and its functions")
    name = parser.parse_args().name
    try:
        touched = lay_down(name, ROOT)
        format_files(touched, ROOT)
    except NewOpError as error:
        print(f"new_op: {error}", file=sys.stderr)
        return 1
    print(*touched, sep="\n")
    print(
        f"""
Build and test it:
    python -m pip install --no-build-isolation -e .
    python -m pytest tests/ops/test_{name}.py
    python -m pytest --backend emulated tests/ops/test_{name}.py
    python -m tools.emulator.run races -- tests/ops/test_{name}.py
    python -m pytest benchmarks/{name}.py
Then replace the formula and every TODO, add a line to CHANGELOG.md, and rewrite the table of ops with `make pages`."""
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
