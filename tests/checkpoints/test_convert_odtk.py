"""The layout of NVIDIA's ODTK: converted models find what its maths, stated in plain PyTorch, finds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from convert_cases import (
    CHANNELS,
    Found,
    Heads,
    State,
    assert_same_boxes,
    assert_same_detections,
    assert_same_heads,
    best,
    conv,
    conv_shapes,
    doubled,
    grid,
    normalised,
    pyramid,
    random_state,
    resnet,
    resnet_shapes,
    rows,
    spread,
    torchvision_names,
)
from torch import Tensor

import retinanet_ops as ops
from retinanet.checkpoints.convert import convert_checkpoint
from retinanet.common.errors import DataError

CLASSES = 3
# Of each of ours the slot of theirs, for their default ratios 1, 2, 0.5, and for others.
SLOTS = {(1.0, 2.0, 0.5): [2, 5, 8, 0, 3, 6, 1, 4, 7], (3.0, 1.0): [1, 3, 0, 2]}
SCALES = {(1.0, 2.0, 0.5): [4 * 2 ** (i / 3) for i in range(3)], (3.0, 1.0): [3.0, 5.0]}


def features(depth: int) -> str:
    return f"backbones.ResNet{depth}FPN."


def shapes(depth: int, anchors: int = 9) -> dict[str, list[int]]:
    top, fpn = 2048 if depth >= 50 else 512, features(depth)
    layers = {f"{fpn}lateral{3 + i}": (CHANNELS, top // 4 * 2**i, 1) for i in range(3)}
    layers |= {f"{fpn}smooth{3 + i}": (CHANNELS, CHANNELS, 3) for i in range(3)}
    layers |= {f"{fpn}pyramid6": (CHANNELS, top, 3), f"{fpn}pyramid7": (CHANNELS, CHANNELS, 3)}
    for head, columns in (("cls_head", CLASSES), ("box_head", 4)):
        layers |= {f"{head}.{2 * i}": (CHANNELS, CHANNELS, 3) for i in range(4)}
        layers |= {f"{head}.8": (anchors * columns, CHANNELS, 3)}
    backbone = resnet_shapes(torchvision_names(f"{fpn}features."), depth, counters=True)
    classifier = {f"{fpn}features.fc.weight": [10, top], f"{fpn}features.fc.bias": [10]}
    return backbone | classifier | conv_shapes(layers)


def heads(state: State, depth: int, batch: Tensor) -> Heads:
    fpn = features(depth)
    lateral, smooth = ([f"{fpn}{kind}{level}" for level in (3, 4, 5)] for kind in ("lateral", "smooth"))
    maps = resnet(state, torchvision_names(f"{fpn}features."), depth, batch)
    levels = pyramid(state, maps, lateral, smooth, f"{fpn}pyramid6", f"{fpn}pyramid7")
    outputs = []
    for head in ("cls_head", "box_head"):
        for x in levels:
            for i in range(4):
                x = conv(state, f"{head}.{2 * i}", x).relu()
            outputs.append(conv(state, f"{head}.8", x)[0])
    return Heads(outputs[:5], outputs[5:])


def base_anchors(ratios: tuple[float, ...]) -> list[Tensor]:
    """Around the middle of a cell; all ratios of each scale."""
    levels = []
    for stride in (8, 16, 32, 64, 128):
        sides = [[scale * stride / r**0.5, scale * stride * r**0.5] for scale in SCALES[ratios] for r in ratios]
        half = torch.tensor(sides) / 2
        levels.append(torch.cat((-half, half), 1) + stride / 2)
    return levels


def decode(anchors: Tensor, deltas: Tensor) -> Tensor:
    """A box from x1 to x2 is x2 - x1 + 1 wide."""
    size = anchors[:, 2:] - anchors[:, :2] + 1
    centre = anchors[:, :2] + 0.5 * size + deltas[:, :2] * size
    size = deltas[:, 2:].exp() * size
    return torch.cat((centre - 0.5 * size, centre + 0.5 * size - 1), 1)


def suppressed(found: Found, limit: int) -> Found:
    """NMS with sides x2 - x1 + 1."""
    order = found.scores.sort(descending=True, stable=True).indices
    found = Found(*(part[order] for part in found))
    area = (found.boxes[:, 2:] - found.boxes[:, :2] + 1).prod(1)
    kept: list[int] = []
    for i, box in enumerate(found.boxes):
        others = found.boxes[kept]
        inter = (torch.minimum(box[2:], others[:, 2:]) - torch.maximum(box[:2], others[:, :2]) + 1).clamp(min=0).prod(1)
        same = found.labels[kept] == found.labels[i]
        if not (same & (inter / (area[i] + area[kept] - inter) > 0.5)).any():
            kept.append(i)
    return Found(*(part[kept[:limit]] for part in found))


def detections(outputs: Heads, ratios: tuple[float, ...], batch: Tensor) -> tuple[Tensor, Found]:
    """Decoded boxes of all anchors, the last pixel that they cover as corner; and what is left of them, clipped."""
    boxes = decode(grid(base_anchors(ratios), outputs.logits, 0.0), rows(outputs.deltas, 4))
    height, width = batch.shape[-2:]
    last = torch.tensor([width - 1, height - 1] * 2)
    clipped = boxes.clamp(min=0).minimum(last)
    assert (clipped[:, 2:] > clipped[:, :2]).all()
    return boxes, suppressed(best(clipped, outputs.logits, CLASSES, 1000), 100)


def written(boxes: Tensor) -> Tensor:
    """A result file has x1, y1, x2 - x1 + 1, y2 - y1 + 1: boxes of these sides end there."""
    return boxes + torch.tensor([0, 0, 1, 1])


@pytest.mark.parametrize(("depth", "ratios"), [(18, (1.0, 2.0, 0.5)), (50, (3.0, 1.0))])
def test_finds_the_same(tmp_path: Path, depth: int, ratios: tuple[float, ...]) -> None:
    torch.manual_seed(depth)
    image = torch.rand(3, 128, 128, dtype=torch.float64)
    slots = SLOTS[ratios]
    state = random_state(shapes(depth, len(slots)))
    spread(state, "cls_head.8", "box_head.8", heads(state, depth, normalised(image, 128).float()), deltas=0.15)
    state["box_head.8.bias"][2] += 5  # a log ratio beyond the bound that others have
    content = {"backbone": [f"ResNet{depth}FPN"], "classes": CLASSES, "state_dict": state}
    torch.save(content | {"ratios": list(ratios), "scales": SCALES[ratios], "iteration": 9}, tmp_path / "model.pth")
    model, report = convert_checkpoint(tmp_path / "model.pth", "odtk", fields={"min_size": None})
    assert set(report.mapped) | set(report.unused) == set(state)
    assert {name.split(".")[-1] for name in report.unused} == {"weight", "bias", "num_batches_tracked"}
    assert report.config.aspect_ratios == tuple(sorted(ratios)) and report.config.size_divisible == 128

    model.double()
    batch = model.transform([image])[0].tensors
    outputs = heads(doubled(state), depth, normalised(image, 128))
    assert_same_heads(model, batch, outputs, slots)
    boxes, found = detections(outputs, ratios, batch)
    assert_same_boxes(model, batch, (10**6, 10**6), written(boxes).clamp(min=0), slots)
    assert_same_detections(model, image, found._replace(boxes=written(found.boxes)), least=60)


def test_boxes_that_end_a_pixel_further_are_coded_as_theirs() -> None:
    """Their numbers for the anchor 0, 0, 32, 32 and the box 8, 4, 40, 52."""
    anchor, box = (torch.tensor([v], dtype=torch.float32) for v in ([0, 0, 33, 33], [8, 4, 41, 53]))
    assert ops.box_iou(anchor, box).item() == pytest.approx(0.36597678, abs=1e-7)
    expected = torch.tensor([[0.24242424, 0.36363636, 0, 0.39531274]])
    torch.testing.assert_close(ops.encode_boxes(box, anchor), expected, rtol=0, atol=1e-6)


def test_defaults_without_ratios_and_scales(tmp_path: Path) -> None:
    state = random_state(shapes(18))
    torch.save({"state_dict": state}, tmp_path / "model.pth")
    config = convert_checkpoint(tmp_path / "model.pth", "odtk")[1].config
    assert config.aspect_ratios == (0.5, 1.0, 2.0) and config.anchor_sizes[0] == (
        32.0,
        32 * 2 ** (1 / 3),
        32 * 2 ** (2 / 3),
    )
    assert (config.box_offset, config.anchor_profile, config.low_quality) == (1.0, "odtk", "off")


@pytest.mark.parametrize(
    ("rest", "message"),
    [
        ({"angles": [0.0]}, "angles: expected a model of axis-aligned boxes, got one of rotated boxes"),
        ({"ratios": [1.0, "wide"]}, r"ratios: expected numbers above 0, got \[1.0, 'wide'\]"),
        ({"scales": [4.0]}, "anchor_sizes and aspect_ratios: expected 9, as the rows of the heads imply, got 3"),
    ],
)
def test_what_cannot_be_converted(tmp_path: Path, rest: dict[str, object], message: str) -> None:
    torch.save({"state_dict": random_state(shapes(18))} | rest, tmp_path / "model.pth")
    with pytest.raises(DataError, match=message):
        convert_checkpoint(tmp_path / "model.pth", "odtk")
