"""Other projects' RetinaNets in plain PyTorch, on state dicts with their names, and comparisons with converted models.

Here and in `test_convert_<project>.py`, the computation of a project uses nothing of the package under test. It runs in
float64, so that no decision depends on rounding.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import nms

from retinanet.model.network import RetinaNet

State = dict[str, Tensor]
#: Function that names a module of a ResNet by stage (0 is the stem), block and part (conv1, bn1, downsample.0, ...).
Namer = Callable[[int, int, str], str]

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
CHANNELS, DEPTH = 32, 2  # Channels of the pyramid and depth of the heads in most tests.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BOUND = math.log(1000 / 16)


def torchvision_names(prefix: str) -> Namer:
    """Return torchvision's names after a prefix."""
    return lambda stage, block, part: f"{prefix}layer{stage}.{block}.{part}" if stage else f"{prefix}{part}"


def blocks_of(depth: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield stage, block, input channels of the block and channels of its convolutions."""
    before, expansion = 64, 4 if depth >= 50 else 1
    for stage, count in enumerate(BLOCKS[depth], start=1):
        for block in range(count):
            yield stage, block, before, 32 * 2**stage
            before = 32 * 2**stage * expansion


def resnet_shapes(name: Namer, depth: int, *, counters: bool = False) -> dict[str, list[int]]:
    """Return the shapes of a ResNet's tensors by name."""
    shapes = {name(0, 0, "conv1"): [64, 3, 7, 7], name(0, 0, "bn1"): [64]}
    for stage, block, before, width in blocks_of(depth):
        sides = (1, 3, 1) if depth >= 50 else (3, 3)
        widths = [before, *[width] * (len(sides) - 1), width * 4 if depth >= 50 else width]
        for i, side in enumerate(sides):
            shapes[name(stage, block, f"conv{i + 1}")] = [widths[i + 1], widths[i], side, side]
            shapes[name(stage, block, f"bn{i + 1}")] = widths[i + 1 : i + 2]
        if block == 0 and widths[-1] != widths[0]:
            shapes[name(stage, block, "downsample.0")] = [widths[-1], widths[0], 1, 1]
            shapes[name(stage, block, "downsample.1")] = [widths[-1]]
    result = {}
    for module, shape in shapes.items():
        result[f"{module}.weight"] = shape
        if len(shape) == 1:
            result |= {f"{module}.{part}": shape for part in ("bias", "running_mean", "running_var")}
            result |= {f"{module}.num_batches_tracked": []} if counters else {}
    return result


def conv_shapes(convs: dict[str, tuple[int, int, int]], *, bias: bool = True) -> dict[str, list[int]]:
    """Return the shapes of convolutions, which are given by name as output channels, input channels and side."""
    shapes = {f"{name}.weight": [out, into, side, side] for name, (out, into, side) in convs.items()}
    return shapes | ({f"{name}.bias": [out] for name, (out, _, _) in convs.items()} if bias else {})


def random_state(shapes: dict[str, list[int]]) -> State:
    """Return random tensors under which activations neither vanish nor explode."""
    state = {}
    for name, shape in shapes.items():
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(7)
        elif name.endswith("running_var"):
            state[name] = torch.rand(shape) + 0.5
        elif len(shape) == 4:
            state[name] = torch.randn(shape) * (1.4 / math.prod(shape[1:])) ** 0.5
        elif name.endswith("weight"):
            state[name] = torch.rand(shape) * 0.6 + 0.6
        else:
            state[name] = torch.randn(shape) * 0.1
    return state


def pyramid_shapes(
    depth: int, lateral: Sequence[str], smooth: Sequence[str], p6: str, p7: str, channels: int = CHANNELS
) -> dict[str, tuple[int, int, int]]:
    """Return the convolutions of a pyramid on a ResNet, with P6 from C5, in the form of `conv_shapes`."""
    top = 2048 if depth >= 50 else 512
    convs = {name: (channels, top // 4 * 2**i, 1) for i, name in enumerate(lateral)}
    convs |= {name: (channels, channels, 3) for name in smooth}
    return convs | {p6: (channels, top, 3), p7: (channels, channels, 3)}


def small_state() -> dict[str, Tensor]:
    """Return a state dict of yhenon's project: a ResNet-18 for two classes."""
    convs = {f"fpn.P{3 + i}_1": (8, 128 * 2**i, 1) for i in range(3)}
    convs |= {name: (8, 8, 3) for name in ("fpn.P3_2", "fpn.P4_2", "fpn.P5_2", "fpn.P7_2")} | {"fpn.P6": (8, 512, 3)}
    for head, out in (("classificationModel", 18), ("regressionModel", 36)):
        convs |= {f"{head}.conv{i}": (8, 8, 3) for i in (1, 2, 3, 4)} | {f"{head}.output": (out, 8, 3)}
    return random_state(resnet_shapes(torchvision_names(""), 18, counters=True) | conv_shapes(convs))


def doubled(state: State) -> State:
    """Return a state dict with its floating-point tensors in float64."""
    return {name: value.double() if value.is_floating_point() else value for name, value in state.items()}


def conv(state: State, name: str, x: Tensor, stride: int = 1) -> Tensor:
    """Apply a convolution with the padding that keeps the size at stride 1."""
    weight = state[f"{name}.weight"]
    return F.conv2d(x, weight, state.get(f"{name}.bias"), stride, padding=weight.shape[-1] // 2)


def batch_norm(state: State, name: str, x: Tensor) -> Tensor:
    """Apply batch normalisation with the running statistics."""
    mean, var, gain, bias = (
        state[f"{name}.{part}"][:, None, None] for part in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) / (var + 1e-5).sqrt() * gain + bias


def resnet(state: State, name: Namer, depth: int, x: Tensor, *, stride_in_1x1: bool = False) -> list[Tensor]:
    """Return C3, C4 and C5 of a ResNet."""
    x = F.relu(batch_norm(state, name(0, 0, "bn1"), conv(state, name(0, 0, "conv1"), x, 2)))
    x = F.max_pool2d(x, 3, 2, 1)
    ends = {}
    for stage, block, _, _ in blocks_of(depth):
        stride = 2 if stage > 1 and block == 0 else 1
        last = 3 if depth >= 50 else 2
        strided = 2 if depth >= 50 and not stride_in_1x1 else 1
        y = x
        for i in range(1, last + 1):
            y = conv(state, name(stage, block, f"conv{i}"), y, stride if i == strided else 1)
            y = batch_norm(state, name(stage, block, f"bn{i}"), y)
            y = F.relu(y) if i < last else y
        if f"{name(stage, block, 'downsample.0')}.weight" in state:
            x = conv(state, name(stage, block, "downsample.0"), x, stride)
            x = batch_norm(state, name(stage, block, "downsample.1"), x)
        x = ends[stage] = F.relu(x + y)
    return [ends[2], ends[3], ends[4]]


def pyramid(
    state: State,
    maps: list[Tensor],  # C3, C4, C5
    lateral: Sequence[str],  # Names for P3, P4, P5.
    smooth: Sequence[str],
    p6: str,
    p7: str,
    *,
    relu: bool = True,
) -> list[Tensor]:
    """Return P3 to P7, with P6 from C5."""
    p5 = conv(state, lateral[2], maps[2])
    p4 = conv(state, lateral[1], maps[1]) + F.interpolate(p5, scale_factor=2)
    p3 = conv(state, lateral[0], maps[0]) + F.interpolate(p4, scale_factor=2)
    top = conv(state, p6, maps[2], 2)
    end = conv(state, p7, F.relu(top) if relu else top, 2)
    return [*(conv(state, name, p) for name, p in zip(smooth, (p3, p4, p5), strict=True)), top, end]


def tower(
    state: State,
    levels: Sequence[Tensor],
    hidden: Sequence[str],
    output: str,
    norm: Callable[[int, Tensor], Tensor] | None = None,
) -> list[Tensor]:
    """Return the output of a head for each level: convolutions, each with `norm` and ReLU, and a last one."""
    outputs = []
    for x in levels:
        for i, name in enumerate(hidden):
            x = conv(state, name, x)
            x = (x if norm is None else norm(i, x)).relu()
        outputs.append(conv(state, output, x)[0])
    return outputs


def normalised(image: Tensor, multiple: int, mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> Tensor:
    """Return a batch of one image, normalised and then padded with zeros to a multiple."""
    mean, std = (torch.tensor(v, dtype=image.dtype)[:, None, None] for v in (mean, std))
    height, width = image.shape[-2:]
    return F.pad((image - mean) / std, (0, -width % multiple, 0, -height % multiple))[None]


def spread(state: State, classes: str, boxes: str, heads: Heads, deltas: float = 0.3) -> None:
    """Scale the output layers so that many scores are above 0.05 and boxes move by about `deltas` of their size.

    Args:
        state: Changed in place.
        classes: The name of the layer for classes.
        boxes: The name of the layer for boxes.
        heads: The outputs of these layers before the change.
        deltas: Standard deviation of the deltas.
    """
    for name, maps, std, bias in ((classes, heads.logits, 1.5, -3.0), (boxes, heads.deltas, deltas, 0.0)):
        state[f"{name}.weight"] *= std / torch.cat([level.flatten() for level in maps]).std().item()
        state[f"{name}.bias"] += bias


class Heads(NamedTuple):
    """Outputs of the heads for one image, finest level first."""

    logits: list[Tensor]  # L tensors [A*K, H, W]
    deltas: list[Tensor]  # L tensors [A*4, H, W]


class Detections(NamedTuple):
    """Detections of one image."""

    boxes: Tensor  # [D, 4]
    scores: Tensor  # [D]
    labels: Tensor  # [D]


class Original(NamedTuple):
    """Results of a project's own model for one image."""

    heads: Heads
    boxes: Tensor  # [positions * A, 4], decoded from all anchors
    limits: tuple[int, int]  # Height and width to which `boxes` are clipped.
    detections: Detections


def rows(maps: list[Tensor], columns: int) -> Tensor:
    """Return maps [A * columns, H, W] as one tensor [positions * A, columns], position by position."""
    return torch.cat([level.unflatten(0, (-1, columns)).permute(2, 3, 0, 1).reshape(-1, columns) for level in maps])


def base_anchors(sides: list[list[tuple[float, float]]], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Return the anchors [A, 4] of each level around 0, from their widths and heights, computed in `dtype`."""
    halves = [torch.tensor(level, dtype=dtype) / 2 for level in sides]
    return [torch.cat((-half, half), 1) for half in halves]


def grid(base: list[Tensor], maps: list[Tensor], centre: float) -> Tensor:
    """Return the base anchors [A, 4] of each level at every position, in float32 as all of these projects do."""
    levels = []
    for i, (anchors, level) in enumerate(zip(base, maps, strict=True)):
        y, x = ((torch.arange(n, dtype=torch.float32) + centre) * 8 * 2**i for n in level.shape[-2:])
        y, x = torch.meshgrid(y, x, indexing="ij")
        levels.append((torch.stack((x, y, x, y), -1).reshape(-1, 1, 4) + anchors).reshape(-1, 4))
    return torch.cat(levels).double()


def decode(anchors: Tensor, deltas: Tensor, low: float = -math.inf, high: float = math.inf) -> Tensor:
    """Return boxes from anchors and from deltas of the centre and the logarithm of the sides, both [..., 4]."""
    size = anchors[:, 2:] - anchors[:, :2]
    centre = (anchors[:, :2] + anchors[:, 2:]) / 2 + deltas[:, :2] * size
    half = deltas[:, 2:].clamp(low, high).exp() * size / 2
    return torch.cat((centre - half, centre + half), 1)


def clip(boxes: Tensor, image: Tensor) -> Tensor:
    """Clip boxes to an image."""
    height, width = image.shape[-2:]
    return boxes.clamp(min=0).minimum(torch.tensor([width, height] * 2, dtype=boxes.dtype))


def candidates(boxes: Tensor, logits: list[Tensor], num_classes: int, topk: int | None) -> Detections:
    """Return the candidates with a score above 0.05, at most `topk` per level, from all boxes [positions * A, 4]."""
    first, kept = 0, []
    for level in logits:
        scores = rows([level], num_classes).sigmoid()
        anchor, label = (scores > 0.05).nonzero(as_tuple=True)
        order = scores[anchor, label].sort(descending=True, stable=True).indices[:topk]
        anchor, label = anchor[order], label[order]
        kept.append((boxes[first + anchor], scores[anchor, label], label))
        first += len(scores)
    return Detections(*(torch.cat(parts) for parts in zip(*kept, strict=True)))


def suppressed(detections: Detections, limit: int | None) -> Detections:
    """Apply NMS at IoU 0.5 within each class, and return at most `limit` detections, best first."""
    kept = []
    for label in detections.labels.unique():
        index = (detections.labels == label).nonzero()[:, 0]
        kept.append(index[nms(detections.boxes[index], detections.scores[index], 0.5)])
    index = torch.cat(kept)
    index = index[detections.scores[index].sort(descending=True, stable=True).indices[:limit]]
    return Detections(*(part[index] for part in detections))


def with_area(detections: Detections) -> Detections:
    """Remove the boxes that clipping has left without area."""
    kept = (detections.boxes[:, 2:] > detections.boxes[:, :2]).all(1)
    return Detections(*(part[kept] for part in detections))


def assert_converted(
    model: RetinaNet, image: Tensor, original: Original, slots: Sequence[int], least: int, *, area: bool = False
) -> None:
    """Compare a converted model, which becomes float64, with the original in all steps on one image.

    Args:
        model: The converted model.
        image: An image, float64.
        original: The results of the original.
        slots: For each anchor slot of the model, the slot of the original.
        least: Number of detections that the original must have at least.
        area: Whether the original drops boxes without area.
    """
    model.double()
    batch = model.transform([image])[0].tensors
    assert_same_heads(model, batch, original.heads, slots)
    assert_same_boxes(model, batch, original.limits, original.boxes, slots)
    assert_same_detections(model, image, original.detections, least, area=area)


def assert_same_heads(model: RetinaNet, batch: Tensor, expected: Heads, slots: Sequence[int]) -> None:
    """Compare the logits of each slot; `assert_same_boxes` compares the deltas."""
    with torch.no_grad():
        heads = model.heads(batch)
    assert [level.shape[1:] for level in heads.cls_logits] == [level.shape for level in expected.logits]
    for level, original in zip(heads.cls_logits, expected.logits, strict=True):
        by_slot = original.unflatten(0, (len(slots), -1))[list(slots)]
        torch.testing.assert_close(level[0].unflatten(0, (len(slots), -1)), by_slot, rtol=1e-7, atol=1e-7)


def assert_same_boxes(
    model: RetinaNet, batch: Tensor, size: Sequence[int], boxes: Tensor, slots: Sequence[int]
) -> None:
    """Compare every anchor's decoded box, clipped to a height and a width, with `boxes` [positions * A, 4]."""
    config = model.config
    model.config = dataclasses.replace(config, score_threshold=0.0, topk=10**6)
    try:
        with torch.no_grad():
            candidates = model.candidates(batch, torch.tensor([size]))
    finally:
        model.config = config
    used = candidates.anchor_index[0] >= 0
    assert used.sum() == len(boxes) * config.num_classes
    expected = boxes.unflatten(0, (-1, len(slots)))[:, list(slots)].flatten(0, 1)
    anchors = candidates.anchor_index[0, used]
    torch.testing.assert_close(candidates.boxes[0, used], expected[anchors], rtol=1e-5, atol=1e-3)


def assert_same_detections(
    model: RetinaNet, image: Tensor, expected: Detections, least: int, *, area: bool = False
) -> None:
    """Compare boxes, scores and classes in their order; with `area`, only boxes that have one."""
    with torch.no_grad():
        result = model([image])[0]
    detections = Detections(result["boxes"].double(), result["scores"].double(), result["labels"])
    detections = with_area(detections) if area else detections
    assert len(expected.scores) >= least
    torch.testing.assert_close(detections.scores, expected.scores, rtol=0, atol=1e-6)
    assert torch.equal(detections.labels, expected.labels)
    torch.testing.assert_close(detections.boxes, expected.boxes, rtol=0, atol=1e-3)
