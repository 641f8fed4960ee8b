"""The layout of yhenon's pytorch-retinanet: converted models find what its maths, stated in plain PyTorch, finds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from convert_cases import (
    Found,
    Heads,
    State,
    assert_same_boxes,
    assert_same_detections,
    assert_same_heads,
    best,
    conv,
    conv_shapes,
    decode,
    doubled,
    grid,
    normalised,
    pyramid,
    random_state,
    resnet,
    resnet_shapes,
    rows,
    spread,
    suppressed,
    torchvision_names,
)
from torch import Tensor

from retinanet.checkpoints.convert import convert_checkpoint

CLASSES, CHANNELS = 3, 32
SLOTS = list(range(9))
NAMES = torchvision_names("")
HEADS = {"classificationModel": CLASSES, "regressionModel": 4}


def shapes(depth: int) -> dict[str, list[int]]:
    top = 2048 if depth >= 50 else 512
    layers = {f"fpn.P{3 + i}_1": (CHANNELS, top // 4 * 2**i, 1) for i in range(3)}
    layers |= {f"fpn.P{3 + i}_2": (CHANNELS, CHANNELS, 3) for i in range(3)}
    layers |= {"fpn.P6": (CHANNELS, top, 3), "fpn.P7_2": (CHANNELS, CHANNELS, 3)}
    for head, columns in HEADS.items():
        layers |= {f"{head}.conv{i}": (CHANNELS, CHANNELS, 3) for i in (1, 2, 3, 4)}
        layers |= {f"{head}.output": (9 * columns, CHANNELS, 3)}
    return resnet_shapes(NAMES, depth, counters=True) | conv_shapes(layers)


def heads(state: State, depth: int, batch: Tensor) -> Heads:
    lateral, smooth = ([f"fpn.P{level}_{i}" for level in (3, 4, 5)] for i in (1, 2))
    levels = pyramid(state, resnet(state, NAMES, depth, batch), lateral, smooth, "fpn.P6", "fpn.P7_2")
    outputs = []
    for head in HEADS:
        for x in levels:
            for i in (1, 2, 3, 4):
                x = conv(state, f"{head}.conv{i}", x).relu()
            outputs.append(conv(state, f"{head}.output", x)[0])
    return Heads(outputs[:5], outputs[5:])


def base_anchors() -> list[Tensor]:
    """Three scales of each of three ratios, in float64 and rounded in the end."""
    levels = []
    for size in (32, 64, 128, 256, 512):
        sides = []
        for ratio in (0.5, 1.0, 2.0):
            for octave in (0, 1 / 3, 2 / 3):
                width = ((size * 2**octave) ** 2 / ratio) ** 0.5
                sides.append([width, width * ratio])
        half = torch.tensor(sides, dtype=torch.float64) / 2
        levels.append(torch.cat((-half, half), 1))
    return levels


def detections(outputs: Heads, batch: Tensor) -> tuple[Tensor, Found]:
    """Decoded boxes of all anchors; and what is left of them, clipped, without a limit.

    It bounds only x1 and y1 from below and x2 and y2 from above: boxes outside of the image would have x2 < x1.
    """
    anchors = grid(base_anchors(), outputs.logits, 0.5)
    deltas = rows(outputs.deltas, 4) * torch.tensor([0.1, 0.1, 0.2, 0.2], dtype=torch.float64)
    boxes = decode(anchors, deltas)
    height, width = batch.shape[-2:]
    clipped = torch.cat((boxes[:, :2].clamp(min=0), boxes[:, 2:].minimum(torch.tensor([width, height]))), 1)
    assert (clipped[:, :2] < clipped[:, 2:]).all()
    return boxes, suppressed(best(clipped, outputs.logits, CLASSES, None), None)


@pytest.mark.parametrize("depth", [18, 50])
def test_finds_the_same(tmp_path: Path, depth: int) -> None:
    torch.manual_seed(depth)
    # It clips boxes to the padded batch, which here is the image.
    image = torch.rand(3, 128, 128, dtype=torch.float64)
    state = random_state(shapes(depth))
    outputs = heads(state, depth, normalised(image, 32).float())
    spread(state, "classificationModel.output", "regressionModel.output", outputs, deltas=1.5)
    # A log ratio of 6 is beyond the bound that others have.
    state["regressionModel.output.bias"][[2, 7]] = 30.0
    torch.save({f"module.{name}": value for name, value in state.items()}, tmp_path / "model.pt")
    model, report = convert_checkpoint(tmp_path / "model.pt", "yhenon", fields={"min_size": None})
    assert set(report.mapped) == set(state) and not report.unused
    assert report.config.backbone == f"resnet{depth}" and report.config.head_depth == 4

    model.double()
    batch = model.transform([image])[0].tensors
    outputs = heads(doubled(state), depth, normalised(image, 32))
    assert_same_heads(model, batch, outputs, SLOTS)
    boxes, found = detections(outputs, batch)
    assert_same_boxes(model, batch, (10**6, 10**6), boxes.clamp(min=0), SLOTS)
    assert_same_detections(model, image, found, least=200)


def test_configuration(tmp_path: Path) -> None:
    state = random_state(shapes(34))
    state = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    torch.save({"state_dict": state | {"fc.weight": torch.zeros(1000, 512)}, "epoch": 3}, tmp_path / "model.pt")
    model, report = convert_checkpoint(tmp_path / "model.pt", "yhenon")
    config = report.config
    assert config.backbone == "resnet34" and config.backbone_norm == "eval"
    assert (config.min_size, config.max_size) == ((608,), 1024)
    assert report.unused == {"fc.weight": "the classifier of the backbone, which a detector does not use"}
    # A state dict from before PyTorch counted batches.
    assert model.state_dict()["backbone.body.bn1.num_batches_tracked"] == 0
