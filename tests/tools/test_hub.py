"""The package as a kernel of Hugging Face's library `kernels`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from retinanet_ops import _library
from tools.wheels.hub import ROOT, HubError, write_kernels

pytest.importorskip("kernels", reason="needs kernels, which the extra dev installs")
tomllib = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")


def test_kernels_loads_the_cpu_build_and_calls_an_op(tmp_path: Path):
    (tmp_path / "README.md").write_text("---\nlibrary_name: kernels\n---\nan older card\n")
    variants = write_kernels(Path(_library.FOLDER), tmp_path)
    assert (tmp_path / "README.md").read_bytes() == (ROOT / "CARD.md").read_bytes()
    assert "_C.so" in {path.name for path in variants[0].iterdir()}
    program = """
import sys
import torch
from pathlib import Path
from kernels import get_local_kernel

sys.modules["retinanet_ops"] = None  # the kernel must not import the installed package
kernel = get_local_kernel(Path(sys.argv[1]), backend="cpu")
boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [1.0, 1.0, 10.0, 10.0], [20.0, 20.0, 30.0, 30.0]])
print(kernel.nms(boxes, torch.tensor([0.5, 0.9, 0.1]), 0.5).tolist())
print(Path(kernel.__file__).parent, kernel.build_info()["cuda_loaded"])
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    command = [sys.executable, "-W", "ignore", "-c", program, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["[1, 2]", f"{variants[0]} False"]


def test_each_cuda_library_is_a_variant(tmp_path: Path):
    builds = _library.build_info()["cuda_builds"]
    if not builds:
        pytest.skip("needs CUDA kernels")
    _, *variants = write_kernels(Path(_library.FOLDER), tmp_path)
    names = [f"-cu{cuda['version'].replace('.', '')}-" for cuda in builds.values()]
    assert [name in variant.name for name, variant in zip(names, variants, strict=True)] == [True] * len(builds)
    libraries = [{path.name for path in variant.glob("*.so")} for variant in variants]
    assert libraries == [{"_C.so", f"_cuda{major}.so"} for major in builds]


def test_an_unbuilt_package_is_refused(tmp_path: Path):
    with pytest.raises(HubError, match="holds no built kernels; build them first"):
        write_kernels(tmp_path, tmp_path / "hub")
    assert not (tmp_path / "hub").exists()


def test_readme_of_another_repository_is_not_overwritten(tmp_path: Path):
    readme = tmp_path / "README.md"
    readme.write_bytes((ROOT / "README.md").read_bytes())
    with pytest.raises(
        HubError, match="not the card of a kernel and would be overwritten; choose another --output-dir"
    ):
        write_kernels(Path(_library.FOLDER), tmp_path)
    assert os.listdir(tmp_path) == ["README.md"]
    assert readme.read_bytes() == (ROOT / "README.md").read_bytes()


def test_build_file_is_valid_and_lists_every_source():
    from kernels._rust import Build

    assert {str(backend) for backend in Build.open(ROOT).general.backends} == {"cpu", "cuda"}
    build = tomllib.loads((ROOT / "build.toml").read_text())
    sections = [build["torch"], *build["kernel"].values()]
    listed = [path for section in sections for path in section["src"]]
    sources = {str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*") if path.suffix in (".cpp", ".cu", ".h")}
    assert sorted(listed) == sorted(sources)
