"""The documentation's code runs, and the tests that it names exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.skipif(not (ROOT / "docs" / "ops.md").exists(), reason="the documents are only in the source tree")
class TestDocuments:
    def test_the_example_of_the_ops_runs(self):
        blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
        example = next(block for block in blocks if "retinanet_ops" in block)
        names: dict = {}
        exec(example, names)
        assert names["loss"].isfinite() and all(level.grad is not None for level in names["logits"])
        assert (names["detections"].count > 0).all()

    def test_every_deviation_has_its_test(self):
        named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs" / "ops.md").read_text()))
        tests = "\n".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
        assert len(named) > 8
        assert {name for name in named if f"def {name}(" not in tests} == set()
