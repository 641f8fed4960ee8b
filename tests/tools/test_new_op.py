"""A new op from the templates builds and passes its tests, and touches few files."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tools.new_op import __main__ as new_op

ROOT = Path(__file__).resolve().parents[2]
NAME = "scaling_of_feature_maps"  # long names lengthen the lines of the templates
#: Files and folders that the copy of the project needs to build and test one op.
COPIED = (
    "LICENSE",
    "README.md",
    "benchmarks/conftest.py",
    "benchmarks/harness.py",
    "csrc/common",
    "csrc/library.cpp",
    "pyproject.toml",
    "retinanet_ops",
    "setup.py",
    "tests/conftest.py",
    "tests/ops/cases.py",
    "tests/ops/launches.py",
    "tools",
)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a copy of the project without kernels of other ops, so that little is compiled."""
    root = tmp_path_factory.mktemp("project")
    for name in COPIED:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("*.so", "_build_info.json", "__pycache__")
            shutil.copytree(ROOT / name, root / name, ignore=ignored)
        else:
            shutil.copy2(ROOT / name, root / name)
    return root


def run(root: Path, *arguments: str) -> str:
    """Run Python in the project and return its output. The command must succeed."""
    environment = {**os.environ, "PYTHONPATH": str(root), "RETINANET_OPS_CUDA": "0", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, *arguments], cwd=root, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, f"{arguments}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def test_a_new_op_builds_and_passes_its_tests_on_every_backend(project: Path) -> None:
    listed = run(project, "-m", "tools.new_op", NAME).split("\n\n")[0].splitlines()
    # The author also edits CHANGELOG.md. The op is documented by its docstring, from which docs/generated/ops.md is
    # made.
    assert len(listed) + 1 <= 11 and all((project / path).exists() for path in listed)
    run(project, "setup.py", "-q", "build_ext", "--inplace")
    tests = f"tests/ops/test_{NAME}.py"
    assert re.search(r"^\d\d passed", run(project, "-m", "pytest", "-q", tests), re.MULTILINE)
    for variant in ("plain", "races"):
        output = run(project, "-m", "tools.emulator.run", variant, "fifo", "--", tests)
        assert re.search(r"^\d\d passed", output, re.MULTILINE)
    run(project, "-m", "pytest", "-q", f"benchmarks/{NAME}.py", "-k", "not compile", "--device", "cpu")
    program = """
import torch
from tools.gpu_check.cases import cases_of_tests
print([(case.name, list(case.run(torch.device("cpu"), None).exact)) for case in cases_of_tests(True)])
"""
    assert f"('{NAME} torch.float64', ['y', 'gradient'])" in run(project, "-c", program)


def test_creating_an_op_needs_a_new_name(tmp_path: Path) -> None:
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "taken.h").write_text("")
    for name, message in (
        ("taken", "NAME must be new, but csrc/taken.h exists; choose another name or delete the files"),
        ("Upper", "NAME must be a Python identifier in lower case, got 'Upper'"),
        ("class", "NAME must be a Python identifier in lower case, got 'class'"),
    ):
        with pytest.raises(new_op.NewOpError, match=re.escape(message)):
            new_op.lay_down(name, tmp_path)


def test_names_are_added_in_order() -> None:
    imports = "from . import reference\nfrom .box import box\nfrom .nms import (\n    nms,\n)\n"
    text = imports + '\n__all__ = [\n    "box",\n    "nms",\n]\n'
    for name, order in (("a", "a box nms"), ("dice", "box dice nms"), ("zoom", "box nms zoom")):
        result = new_op.with_export(text, name)
        assert re.findall(r"^from \.(\w+)", result, re.MULTILINE) == order.split()
        assert re.findall(r'^    "(\w+)",', result, re.MULTILINE) == order.split()
    schema = new_op.with_schema('X(y, m) {\n  m.def("nms() -> ()");\n}\n', "zoom")
    assert schema.endswith('m.def("zoom(Tensor x, float scale) -> Tensor");\n}\n')
