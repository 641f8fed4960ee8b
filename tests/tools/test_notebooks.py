"""The notebooks of the docs run from the first cell to the last, on a small data set in place of the sample."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = ("train", "detect", "validate")  # each needs the files of those before it
pytestmark = pytest.mark.skipif(not (ROOT / "docs").exists(), reason="the documents are only in the source tree")

# The sample needs the network, and its recipe checks its files. This cell takes its place.
PREPARE = """
from pathlib import Path
from retinanet.data import tree_sample

tree_sample.fetch_trees = lambda folder: tree_sample.TreeSample(Path(folder), True)
"""


@pytest.fixture
def sample(tmp_path: Path) -> Path:
    """Write a data set and weights where the sample has them, and return the folder around it."""
    torchvision = pytest.importorskip("torchvision")
    from synthetic import rectangles

    for name, count in (("train", 4), ("val", 2), ("cross_site", 1), ("photos/val", 1)):
        annotations = tmp_path / "trees" / f"{name}.json"
        rectangles(annotations.parent / f"images_{annotations.stem}", count, size=128)
        text = (annotations.parent / f"images_{annotations.stem}" / "annotations.json").read_text()
        annotations.write_text(text.replace('"file_name": "', f'"file_name": "images_{annotations.stem}/'))
    (tmp_path / "trees" / "weights").mkdir()
    weights = torchvision.models.mobilenet_v2(weights=None).state_dict()
    torch.save(weights, tmp_path / "trees" / "weights" / "mobilenet_v2-b0353104.pth")
    return tmp_path


def test_notebooks_run(sample: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jupytext = pytest.importorskip("jupytext", reason="needs the extra `docs`")
    nbclient = pytest.importorskip("nbclient", reason="needs the extra `docs`")
    nbformat = pytest.importorskip("nbformat", reason="needs the extra `docs`")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", ""))))
    all_cells = [nbformat.v4.new_code_cell(PREPARE)]
    for name in NOTEBOOKS:
        notebook = jupytext.read(ROOT / "docs" / "notebooks" / f"{name}.md")
        code = [cell for cell in notebook.cells if cell.cell_type == "code"]
        assert len(code) >= 3
        all_cells += code
    for cell in all_cells:
        if "parameters" in cell.metadata.get("tags", []):
            assert cell.source == "EPOCHS = 40"
            cell.source = "EPOCHS = 2"
    # One kernel runs all of them, because a kernel imports torch for seconds.
    whole = nbformat.v4.new_notebook(cells=all_cells)
    resources = {"metadata": {"path": str(sample)}}
    nbclient.NotebookClient(whole, timeout=120, kernel_name="python3", resources=resources).execute()
    outputs = [output for cell in all_cells for output in cell.outputs]
    text = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    assert "4 training tiles, 2 validation tiles" in text and "another forest {'AP'" in text
    # Two pictures and two plots.
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 4
    assert (sample / "runs" / "trees" / "chosen.safetensors").exists()
