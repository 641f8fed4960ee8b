"""The documentation's code runs, and the tests that it names exist."""

import re
from functools import partial
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(not (ROOT / "docs" / "ops.md").exists(), reason="the documents are only in the source tree")
class TestDocuments:
    def test_the_example_of_the_ops_runs(self):
        blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
        example = next(block for block in blocks if "import retinanet_ops as ops" in block)
        names: dict = {}
        exec(example, names)
        assert names["loss"].isfinite() and all(level.grad is not None for level in names["logits"])
        assert (names["detections"].count > 0).all()

    def test_the_example_of_torchvisions_model_runs(self, tmp_path, monkeypatch):
        detection = pytest.importorskip("torchvision.models.detection")
        small = partial(detection.retinanet_resnet50_fpn_v2, min_size=64, max_size=64)
        monkeypatch.setattr(detection, "retinanet_resnet50_fpn_v2", small)
        blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
        example = next(block for block in blocks if "accelerate(" in block)
        target = {"boxes": torch.tensor([[8.0, 8, 40, 40]]), "labels": torch.tensor([1])}
        names = {"images": [torch.rand(3, 64, 64)], "targets": [target], "path": tmp_path / "model.pt", "torch": torch}
        exec(example, names)
        assert names["losses"]["classification"].requires_grad and len(names["detections"]) == 1
        assert type(torch.load(names["path"], weights_only=False)) is detection.RetinaNet

    def test_every_deviation_has_its_test(self):
        named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs" / "ops.md").read_text()))
        tests = "\n".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
        assert len(named) > 8
        assert {name for name in named if f"def {name}(" not in tests} == set()
