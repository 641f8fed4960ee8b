"""The commands and the code of docs/evaluation.md run, from photographs with Pascal VOC xml files to a report."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from cli_cases import make_data, run

from retinanet.cli.main import main

PAGE = Path(__file__).parents[2] / "docs" / "evaluation.md"
pytestmark = pytest.mark.skipif(not PAGE.exists(), reason="the documents are only in the source tree")
# What makes the training of the page short and its model small.
SHORT = "--epochs 1 --crop 64 --fpn-channels 32 --head-depth 1 --device cpu --threads 1".split()


def write_photographs(folder: Path, count: int) -> None:
    """Write pictures with xml files of 0-based corners beside them."""
    content = json.loads(make_data(folder, count).read_text())
    (folder / "ann.json").unlink()
    for entry in content["annotations"]:
        x, y, width, height = entry["bbox"]
        corners = {"xmin": x, "ymin": y, "xmax": x + width, "ymax": y + height}
        box = "".join(f"<{name}>{value}</{name}>" for name, value in corners.items())
        (folder / f"{entry['image_id']}.xml").write_text(
            f"<annotation><filename>{entry['image_id']}.png</filename><object><name>Tree</name><bndbox>{box}</bndbox>"
            "</object></annotation>"
        )


def test_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    write_photographs(tmp_path / "photos" / "train", 3)
    write_photographs(tmp_path / "photos" / "val", 2)
    text = PAGE.read_text()
    commands = re.findall(r"^    retinanet (.*)$", text, flags=re.MULTILINE)
    assert [command.split()[0] for command in commands] == ["tile", "tile", "train", "evaluate", "evaluate"]
    threads = torch.get_num_threads()
    for command in commands:
        arguments = shlex.split(command.replace(" --backbone-weights imagenet", ""))  # needs a network
        assert main([*arguments, *(SHORT if arguments[0] == "train" else [])]) == 0, command
    torch.set_num_threads(threads)
    assert "2 images, 2 boxes" in capsys.readouterr().out
    assert "best.safetensors" in (tmp_path / "report" / "report.html").read_text()
    assert len(json.loads((tmp_path / "numbers.json").read_text())["stats"]) == 12

    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        exec(block, names)
    result, dataset = names["result"], names["open_dataset"]("tiles/val")
    # Rank 1 of two processes gathers its own table, and that of rank 0.
    other = names["detect_dataset"](names["model"], dataset, indices=[0])
    merged = names["evaluate_in_processes"](names["model"], dataset, 1, 2, lambda mine: [other, mine])
    assert merged.stats == result.stats and list(merged.detections) == list(result.detections)
    assert run("evaluate", "runs/trees/last.safetensors", "tiles/val", "--engine", "hotcoco") == 0
