"""The comparison of the detections of a file with those of its model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from retinanet.export.runners import load_runners
from retinanet.export.verify import FLOAT32, HALF, Tolerance, Verification, compare_detections, verify_export
from retinanet.model.detector import Detector
from retinanet.model.targets import ImageDetections

THRESHOLD, SLOTS = 0.5, 3
Row = tuple[float, float, int]  # x1, score, label


def detections(*rows: Row) -> ImageDetections:
    """Return boxes of 10 x 10 pixels."""
    x, scores, labels = (torch.tensor(column) for column in zip(*rows, strict=True))
    boxes = torch.stack((x, x * 0, x + 10, x * 0 + 10), dim=1)
    return ImageDetections(boxes, scores, labels)


OWN = ((0.0, 0.9, 1), (30.0, 0.7, 1))


@pytest.mark.parametrize(
    ("rows", "agrees", "boxes", "scores", "unpaired"),
    [
        (OWN, True, 0, 0, 0),
        ((OWN[1], OWN[0]), True, 0, 0, 0),
        (((0.0005, 0.9, 1), (30.0, 0.69995, 1)), True, 5e-4, 5e-5, 0),
        (((0.01, 0.9, 1), OWN[1]), False, 0.01, 0, 0),
        (((0.0, 0.901, 1), OWN[1]), False, 0, 1e-3, 0),
        (((0.0, 0.9, 2), OWN[1]), False, 0, 0, 2),
        (((20.0, 0.9, 1), OWN[1]), False, 0, 0, 2),
        (OWN[:1], False, 0, 0, 1),
        ((*OWN, (60.0, 0.6, 1)), False, 0, 0, 1),
        ((*OWN, (60.0, 0.50005, 1)), True, 0, 0, 0),
    ],
)
def test_differences(rows: tuple[Row, ...], agrees: bool, boxes: float, scores: float, unpaired: int) -> None:
    for own, other in ((OWN, rows), (rows, OWN)):
        found = Verification("engine", FLOAT32)
        compare_detections(detections(*own), detections(*other), found, THRESHOLD, SLOTS)
        assert found.agrees == agrees
        assert found.boxes == pytest.approx(boxes, abs=1e-5) and found.scores == pytest.approx(scores, abs=1e-6)
        assert found.unpaired == unpaired and found.counts == (len(own) != len(other))


def test_rounding_decides_the_last_slot() -> None:
    full, other = (*OWN, (60.0, 0.60000, 1)), (*OWN, (90.0, 0.60005, 1))
    found = Verification("engine", FLOAT32)
    compare_detections(detections(*full), detections(*other), found, THRESHOLD, SLOTS)
    assert found.agrees and found.unpaired == 0
    compare_detections(detections(*full), detections(*OWN, (90.0, 0.61, 1)), found, THRESHOLD, SLOTS)
    assert not found.agrees and found.unpaired == 1


def test_half_precision_allows_more() -> None:
    found = Verification("engine", HALF)
    compare_detections(detections(*OWN), detections((1.1, 0.89, 1), OWN[1]), found, THRESHOLD, SLOTS)
    assert found.agrees and found.excess == pytest.approx(1.1 / 1.2, rel=1e-4)
    compare_detections(detections(*OWN), detections((1.3, 0.9, 1), OWN[1]), found, THRESHOLD, SLOTS)
    assert not found.agrees


@pytest.mark.parametrize("row", [(float("nan"), 0.7, 1), (30.0, float("nan"), 1), (30.0, float("inf"), 1)])
@pytest.mark.parametrize("tolerance", [FLOAT32, HALF])
def test_values_that_are_not_finite_disagree(row: Row, tolerance: Tolerance) -> None:
    # One of 41 detections is less than the share that half precision may miss.
    rows = [(12.0 * i, 0.9, 1) for i in range(40)]
    found = Verification("engine", tolerance)
    compare_detections(detections(*rows, (500.0, 0.7, 1)), detections(*rows, row), found, THRESHOLD, 100)
    assert found.compared and found.excess == float("inf") and not found.agrees


def test_nothing_to_compare_is_no_agreement() -> None:
    found = Verification("engine", FLOAT32)
    none = detections(OWN[0])
    none = type(none)(*(values[:0] for values in none))
    compare_detections(none, none, found, THRESHOLD, SLOTS)
    assert not found.compared and not found.agrees


def test_nan_in_an_output_of_the_heads_disagrees(
    model: Detector, deployed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = deployed / "raw.onnx"
    runner = load_runners(path, "onnx")[0]

    def run(images: Tensor, sizes: Tensor) -> tuple[Tensor, ...]:
        outputs = tuple(output.clone() for output in runner.run(images, sizes))
        outputs[1][0, 0, 0, 0] = torch.nan
        return outputs

    pictures = sorted((deployed / "photos").glob("*.png"))
    for replaced, agrees in ((runner, True), (runner._replace(run=run), False)):
        monkeypatch.setattr("retinanet.export.verify.load_runners", lambda *_, r=replaced: [r])
        (found,) = verify_export(model, path, pictures)
        assert found.agrees == agrees and len(found.outputs) == 4
    wrong = [name for name, share in found.outputs.items() if share == float("inf")]
    assert wrong == ["cls_logits_1"]
