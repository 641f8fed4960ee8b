"""yhenon's pytorch-retinanet: converted models give the detections of its computation, stated in plain PyTorch."""

from __future__ import annotations

from pathlib import Path

import convert_cases as cases
import pytest
import torch
from convert_cases import CHANNELS, Heads, Original, State, random_state
from torch import Tensor

from retinanet.checkpoints.convert import convert_checkpoint

CLASSES = 3
SLOTS = list(range(9))
NAMES = cases.torchvision_names("")
LATERAL, SMOOTH = ([f"fpn.P{level}_{i}" for level in (3, 4, 5)] for i in (1, 2))
P6, P7 = "fpn.P6", "fpn.P7_2"
HEADS = {"classificationModel": CLASSES, "regressionModel": 4}


def shapes(depth: int) -> dict[str, list[int]]:
    layers = cases.pyramid_shapes(depth, LATERAL, SMOOTH, P6, P7)
    for head, columns in HEADS.items():
        layers |= {f"{head}.conv{i}": (CHANNELS, CHANNELS, 3) for i in (1, 2, 3, 4)}
        layers |= {f"{head}.output": (9 * columns, CHANNELS, 3)}
    return cases.resnet_shapes(NAMES, depth, counters=True) | cases.conv_shapes(layers)


def heads(state: State, depth: int, batch: Tensor) -> Heads:
    levels = cases.pyramid(state, cases.resnet(state, NAMES, depth, batch), LATERAL, SMOOTH, P6, P7)
    hidden = {head: [f"{head}.conv{i}" for i in (1, 2, 3, 4)] for head in HEADS}
    return Heads(*(cases.tower(state, levels, hidden[head], f"{head}.output") for head in HEADS))


def base_anchors() -> list[Tensor]:
    """Return three scales of each of three ratios, computed in float64."""
    levels = []
    for size in (32, 64, 128, 256, 512):
        sides = []
        for ratio in (0.5, 1.0, 2.0):
            for octave in (0, 1 / 3, 2 / 3):
                width = ((size * 2**octave) ** 2 / ratio) ** 0.5
                sides.append((width, width * ratio))
        levels.append(sides)
    return cases.base_anchors(levels, torch.float64)


def original(state: State, depth: int, image: Tensor) -> Original:
    """Return the results of the project; boxes are clipped before NMS, and their number is unlimited.

    The project bounds only x1 and y1 from below and x2 and y2 from above. A box outside the image would have x2 < x1.
    """
    outputs = heads(cases.doubled(state), depth, cases.normalised(image, 32))
    anchors = cases.grid(base_anchors(), outputs.logits, 0.5)
    deltas = cases.rows(outputs.deltas, 4) * torch.tensor([0.1, 0.1, 0.2, 0.2], dtype=torch.float64)
    boxes = cases.decode(anchors, deltas)
    height, width = image.shape[-2:]
    clipped = torch.cat((boxes[:, :2].clamp(min=0), boxes[:, 2:].minimum(torch.tensor([width, height]))), 1)
    assert (clipped[:, :2] < clipped[:, 2:]).all()
    detections = cases.suppressed(cases.candidates(clipped, outputs.logits, CLASSES, None), None)
    return Original(outputs, boxes.clamp(min=0), (10**6, 10**6), detections)


@pytest.mark.parametrize("depth", [18, 50])
def test_converted_models_give_the_same_detections(tmp_path: Path, depth: int) -> None:
    torch.manual_seed(depth)
    # The original clips boxes to the padded batch. An image of this size is not padded.
    image = torch.rand(3, 128, 128, dtype=torch.float64)
    state = random_state(shapes(depth))
    outputs = heads(state, depth, cases.normalised(image, 32).float())
    cases.spread(state, "classificationModel.output", "regressionModel.output", outputs, deltas=1.5)
    # Log ratios of 6 exceed the bound that other projects have.
    state["regressionModel.output.bias"][[2, 7]] = 30.0
    torch.save({f"module.{name}": value for name, value in state.items()}, tmp_path / "model.pt")
    model, report = convert_checkpoint(tmp_path / "model.pt", "yhenon", fields={"min_size": None})
    assert set(report.mapped) == set(state) and not report.unused
    assert report.config.backbone == f"resnet{depth}" and report.config.head_depth == 4

    cases.assert_converted(model, image, original(state, depth, image), SLOTS, least=200)


def test_configuration(tmp_path: Path) -> None:
    state = random_state(shapes(34))
    state = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    torch.save({"state_dict": state | {"fc.weight": torch.zeros(1000, 512)}, "epoch": 3}, tmp_path / "model.pt")
    model, report = convert_checkpoint(tmp_path / "model.pt", "yhenon")
    config = report.config
    assert config.backbone == "resnet34" and config.backbone_norm == "eval"
    assert (config.min_size, config.max_size) == ((608,), 1024)
    assert report.unused == {"fc.weight": "the classifier of the backbone, which a detector does not use"}
    # State dicts of early PyTorch versions have no counters of batches.
    assert model.state_dict()["backbone.body.bn1.num_batches_tracked"] == 0
