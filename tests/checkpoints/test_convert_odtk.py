"""NVIDIA's ODTK: converted models give the detections of its computation, stated in plain PyTorch."""

from __future__ import annotations

import math
from pathlib import Path

import convert_cases as cases
import pytest
import torch
from convert_cases import CHANNELS, Detections, Heads, Original, State, random_state
from torch import Tensor

import retinanet_ops as ops
from retinanet.checkpoints.convert import convert_checkpoint
from retinanet.common.errors import DataError

CLASSES = 3
# Slot of the original for each slot of the converted model, for the default ratios 1, 2, 0.5 and for other ratios.
SLOTS = {(1.0, 2.0, 0.5): [2, 5, 8, 0, 3, 6, 1, 4, 7], (3.0, 1.0): [1, 3, 0, 2]}
SCALES = {(1.0, 2.0, 0.5): [4 * 2 ** (i / 3) for i in range(3)], (3.0, 1.0): [3.0, 5.0]}


def resnet_names(depth: int) -> cases.Namer:
    return cases.torchvision_names(f"backbones.ResNet{depth}FPN.features.")


def pyramid_names(depth: int) -> tuple[list[str], list[str], str, str]:
    """Return the names of the lateral and the smoothing convolutions, of P6 and of P7."""
    fpn = f"backbones.ResNet{depth}FPN."
    lateral, smooth = ([f"{fpn}{kind}{level}" for level in (3, 4, 5)] for kind in ("lateral", "smooth"))
    return lateral, smooth, f"{fpn}pyramid6", f"{fpn}pyramid7"


def shapes(depth: int, anchors: int = 9) -> dict[str, list[int]]:
    layers = cases.pyramid_shapes(depth, *pyramid_names(depth))
    for head, columns in (("cls_head", CLASSES), ("box_head", 4)):
        layers |= {f"{head}.{2 * i}": (CHANNELS, CHANNELS, 3) for i in range(4)}
        layers |= {f"{head}.8": (anchors * columns, CHANNELS, 3)}
    classifier = resnet_names(depth)(0, 0, "fc")
    unused = {f"{classifier}.weight": [10, 2048 if depth >= 50 else 512], f"{classifier}.bias": [10]}
    return cases.resnet_shapes(resnet_names(depth), depth, counters=True) | unused | cases.conv_shapes(layers)


def heads(state: State, depth: int, batch: Tensor) -> Heads:
    maps = cases.resnet(state, resnet_names(depth), depth, batch)
    levels = cases.pyramid(state, maps, *pyramid_names(depth))
    hidden = {head: [f"{head}.{2 * i}" for i in range(4)] for head in ("cls_head", "box_head")}
    return Heads(*(cases.tower(state, levels, hidden[head], f"{head}.8") for head in hidden))


def base_anchors(ratios: tuple[float, ...]) -> list[Tensor]:
    """Return all ratios of each scale, around the middle of a cell."""
    strides = (8, 16, 32, 64, 128)
    sides = [
        [(scale * stride / r**0.5, scale * stride * r**0.5) for scale in SCALES[ratios] for r in ratios]
        for stride in strides
    ]
    return [level + stride / 2 for level, stride in zip(cases.base_anchors(sides), strides, strict=True)]


def decode(anchors: Tensor, deltas: Tensor) -> Tensor:
    """Return boxes, where a box from x1 to x2 is x2 - x1 + 1 wide."""
    size = anchors[:, 2:] - anchors[:, :2] + 1
    centre = anchors[:, :2] + 0.5 * size + deltas[:, :2] * size
    size = deltas[:, 2:].exp() * size
    return torch.cat((centre - 0.5 * size, centre + 0.5 * size - 1), 1)


def suppressed(detections: Detections, limit: int) -> Detections:
    """Apply NMS with sides x2 - x1 + 1 within each class, and return at most `limit` detections, best first."""
    order = detections.scores.sort(descending=True, stable=True).indices
    detections = Detections(*(part[order] for part in detections))
    area = (detections.boxes[:, 2:] - detections.boxes[:, :2] + 1).prod(1)
    kept: list[int] = []
    for i, box in enumerate(detections.boxes):
        others = detections.boxes[kept]
        inter = (torch.minimum(box[2:], others[:, 2:]) - torch.maximum(box[:2], others[:, :2]) + 1).clamp(min=0).prod(1)
        same = detections.labels[kept] == detections.labels[i]
        if not (same & (inter / (area[i] + area[kept] - inter) > 0.5)).any():
            kept.append(i)
    return Detections(*(part[kept[:limit]] for part in detections))


def written(boxes: Tensor) -> Tensor:
    """Return boxes as a result file has them: x1, y1 and the sides x2 - x1 + 1, y2 - y1 + 1."""
    return boxes + torch.tensor([0, 0, 1, 1])


def original(state: State, depth: int, ratios: tuple[float, ...], image: Tensor) -> Original:
    """Return the results of ODTK; boxes are clipped before NMS, and their second corner is the last covered pixel."""
    outputs = heads(cases.doubled(state), depth, cases.normalised(image, 128))
    boxes = decode(cases.grid(base_anchors(ratios), outputs.logits, 0.0), cases.rows(outputs.deltas, 4))
    height, width = image.shape[-2:]
    clipped = boxes.clamp(min=0).minimum(torch.tensor([width - 1, height - 1] * 2))
    assert (clipped[:, 2:] > clipped[:, :2]).all()
    detections = suppressed(cases.candidates(clipped, outputs.logits, CLASSES, 1000), 100)
    detections = detections._replace(boxes=written(detections.boxes))
    return Original(outputs, written(boxes).clamp(min=0), (10**6, 10**6), detections)


@pytest.mark.parametrize(("depth", "ratios"), [(18, (1.0, 2.0, 0.5)), (50, (3.0, 1.0))])
def test_converted_models_give_the_same_detections(tmp_path: Path, depth: int, ratios: tuple[float, ...]) -> None:
    torch.manual_seed(depth)
    image = torch.rand(3, 128, 128, dtype=torch.float64)
    slots = SLOTS[ratios]
    state = random_state(shapes(depth, len(slots)))
    outputs = heads(state, depth, cases.normalised(image, 128).float())
    cases.spread(state, "cls_head.8", "box_head.8", outputs, deltas=0.15)
    state["box_head.8.bias"][2] += 5  # A log ratio beyond the bound that other projects have.
    content = {"backbone": [f"ResNet{depth}FPN"], "classes": CLASSES, "state_dict": state}
    torch.save(content | {"ratios": list(ratios), "scales": SCALES[ratios], "iteration": 9}, tmp_path / "model.pth")
    model, report = convert_checkpoint(tmp_path / "model.pth", "odtk", fields={"min_size": None})
    assert set(report.mapped) | set(report.unused) == set(state)
    assert {name.split(".")[-1] for name in report.unused} == {"weight", "bias", "num_batches_tracked"}
    assert report.config.aspect_ratios == tuple(sorted(ratios)) and report.config.size_divisible == 128

    cases.assert_converted(model, image, original(state, depth, ratios, image), slots, least=60)


def test_boxes_that_end_a_pixel_further_give_the_deltas_of_odtk() -> None:
    """The expected numbers are those of ODTK for the anchor 0, 0, 32, 32 and the box 8, 4, 40, 52."""
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
    assert (config.compat.box_offset, config.compat.anchor_profile, config.low_quality) == (1.0, "odtk", "off")


@pytest.mark.parametrize(
    ("rest", "message"),
    [
        ({"angles": [0.0]}, "angles: expected a model of axis-aligned boxes, got one of rotated boxes"),
        ({"ratios": [1.0, "wide"]}, r"ratios: expected numbers above 0, got \[1.0, 'wide'\]"),
        ({"ratios": [1.0, True]}, r"ratios: expected numbers above 0, got \[1.0, True\]"),
        ({"scales": [4.0, math.inf]}, r"scales: expected numbers above 0, got \[4.0, inf\]"),
        ({"scales": [4.0]}, "anchor_sizes and aspect_ratios: expected 9, as the rows of the heads imply, got 3"),
    ],
)
def test_what_cannot_be_converted(tmp_path: Path, rest: dict[str, object], message: str) -> None:
    torch.save({"state_dict": random_state(shapes(18))} | rest, tmp_path / "model.pth")
    with pytest.raises(DataError, match=message):
        convert_checkpoint(tmp_path / "model.pth", "odtk")
