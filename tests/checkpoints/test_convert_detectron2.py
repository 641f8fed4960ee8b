"""detectron2's layout: converted models find what its maths, stated in plain PyTorch, finds."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from convert_cases import (
    BOUND,
    CHANNELS,
    DEPTH,
    MEAN,
    STD,
    Found,
    Heads,
    State,
    assert_same_boxes,
    assert_same_detections,
    assert_same_heads,
    best,
    clip,
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
    with_area,
)
from torch import Tensor
from torch.nn import functional as F

from retinanet.checkpoints.convert import convert_checkpoint
from retinanet.checkpoints.model_file import load_model, save_model

CLASSES = 3
SLOTS = [0, 3, 6, 1, 4, 7, 2, 5, 8]  # theirs, of each of ours
PIXEL_MEAN = {"caffe": (103.53, 116.28, 123.675), "pytorch": (123.675, 116.28, 103.53)}
PIXEL_STD = {"caffe": (1.0, 1.0, 1.0), "pytorch": (58.395, 57.12, 57.375)}


def names(stage: int, block: int, part: str) -> str:
    kind = part.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
    kind = f"conv{part[2]}.norm" if part.startswith("bn") else kind
    return "backbone.bottom_up." + (f"res{stage + 1}.{block}.{kind}" if stage else f"stem.{kind}")


def shapes(depth: int, classes: int, norm: bool, channels: int = CHANNELS, convs: int = DEPTH) -> dict[str, list[int]]:
    top = 2048 if depth >= 50 else 512
    layers = {f"backbone.fpn_lateral{3 + i}": (channels, top // 4 * 2**i, 1) for i in range(3)}
    layers |= {f"backbone.fpn_output{3 + i}": (channels, channels, 3) for i in range(3)}
    layers |= {"backbone.top_block.p6": (channels, top, 3), "backbone.top_block.p7": (channels, channels, 3)}
    step = 3 if norm else 2
    for head in ("cls", "bbox"):
        layers |= {f"head.{head}_subnet.{step * i}": (channels, channels, 3) for i in range(convs)}
    layers |= {"head.cls_score": (9 * classes, channels, 3), "head.bbox_pred": (36, channels, 3)}
    result = resnet_shapes(names, depth) | conv_shapes(layers)
    for name in [f"head.{head}_subnet.{3 * i + 1}" for head in ("cls", "bbox") for i in range(convs) if norm]:
        result |= {f"{name}.weight": [channels], f"{name}.bias": [channels]}
    return result


def batch_of(image: Tensor, style: str) -> Tensor:
    """Of an image as a project's reader gives it: BGR or RGB in 0..255."""
    channels = image.flip(0) if style == "caffe" else image
    return normalised(channels * 255, 32, PIXEL_MEAN[style], PIXEL_STD[style])


def heads(state: State, depth: int, style: str, batch: Tensor) -> Heads:
    fpn = [[f"backbone.fpn_{kind}{level}" for level in (3, 4, 5)] for kind in ("lateral", "output")]
    maps = resnet(state, names, depth, batch, stride_in_1x1=style == "caffe")
    levels = pyramid(state, maps, *fpn, "backbone.top_block.p6", "backbone.top_block.p7")
    outputs = []
    for subnet, last in (("cls_subnet", "cls_score"), ("bbox_subnet", "bbox_pred")):
        norm = f"head.{subnet}.1.weight" in state
        for x in levels:
            for i in range(DEPTH):
                x = conv(state, f"head.{subnet}.{(3 if norm else 2) * i}", x)
                if norm:
                    name = f"head.{subnet}.{3 * i + 1}"
                    x = F.group_norm(x, 32, state[f"{name}.weight"], state[f"{name}.bias"])
                x = x.relu()
            outputs.append(conv(state, f"head.{last}", x)[0])
    return Heads(outputs[:5], outputs[5:])


def base_anchors() -> list[Tensor]:
    """Three ratios of each of three sizes."""
    levels = []
    for size in (32, 64, 128, 256, 512):
        sides = []
        for octave in (0, 1 / 3, 2 / 3):
            for ratio in (0.5, 1.0, 2.0):
                width = (size**2 * 4**octave / ratio) ** 0.5
                sides.append([width, width * ratio])
        half = torch.tensor(sides) / 2
        levels.append(torch.cat((-half, half), 1))
    return levels


def detections(outputs: Heads, image: Tensor) -> tuple[Tensor, Found]:
    """Decoded boxes of all anchors; and what is left of them, clipped after NMS, those without area dropped."""
    anchors = grid(base_anchors(), outputs.logits, 0.0)
    boxes = decode(anchors, rows(outputs.deltas, 4), high=BOUND)
    found = suppressed(best(boxes, outputs.logits, CLASSES, 1000), 100)
    return clip(boxes, image), with_area(found._replace(boxes=clip(found.boxes, image)))


def random_checkpoint(depth: int, style: str, norm: bool, image: Tensor) -> State:
    # GroupNorm needs more than one value in each of its 32 groups, on the top level, too.
    state = random_state(shapes(depth, CLASSES, norm, channels=64 if norm else CHANNELS))
    # Weights for pixels of 0..255 are smaller.
    state["backbone.bottom_up.stem.conv1.weight"] /= max(PIXEL_STD["pytorch"]) / max(PIXEL_STD[style])
    spread(state, "head.cls_score", "head.bbox_pred", heads(state, depth, style, batch_of(image.float(), style)))
    return state


@pytest.mark.parametrize(("depth", "style", "norm"), [(50, "caffe", False), (18, "pytorch", True)])
def test_finds_the_same(tmp_path: Path, depth: int, style: str, norm: bool) -> None:
    torch.manual_seed(depth)
    image = torch.rand(3, 90, 70, dtype=torch.float64)
    state = random_checkpoint(depth, style, norm, image)
    path = tmp_path / "model.pkl"
    arrays = {name: value.numpy() for name, value in state.items()}
    path.write_bytes(pickle.dumps({"model": arrays, "__author__": "someone"}))
    model, report = convert_checkpoint(path, "detectron2", style=style, fields={"min_size": None})
    assert set(report.mapped) == set(state) and not report.unused
    assert report.config.backbone == f"resnet{depth}" and report.config.num_classes == CLASSES
    assert report.config.class_names == ("class 0", "class 1", "class 2")

    model.double()
    outputs = heads(doubled(state), depth, style, batch_of(image, style))
    batch = model.transform([image])[0].tensors
    assert batch.shape == (1, 3, 96, 96)
    assert_same_heads(model, batch, outputs, SLOTS)
    boxes, found = detections(outputs, image)
    assert_same_boxes(model, batch, image.shape[-2:], boxes, SLOTS)
    assert_same_detections(model, image, found, least=60, area=True)


def test_models_of_its_zoo(tmp_path: Path) -> None:
    """A ResNet-50 for COCO as published: with constants, which are left out, in a pickle of an old protocol."""
    state = {name: torch.zeros(shape) for name, shape in shapes(50, 80, False, channels=256, convs=4).items()}
    constants = {"pixel_mean": PIXEL_MEAN["caffe"], "pixel_std": PIXEL_STD["caffe"]}
    state |= {name: torch.tensor(value).view(3, 1, 1) for name, value in constants.items()}
    state |= {f"anchor_generator.cell_anchors.{i}": torch.zeros(9, 4) for i in range(5)}
    path = tmp_path / "model_final.pkl"
    arrays = {name: value.numpy() for name, value in state.items()}
    path.write_bytes(pickle.dumps({"model": arrays, "__author__": "Detectron2 Model Zoo"}, protocol=2))
    model, report = convert_checkpoint(path, "detectron2")
    assert sum(p.numel() for p in model.parameters()) == 37_915_572
    assert len(report.unused) == 7 and len(report.mapped) == len(state) - 7
    config = report.config
    assert (config.backbone, config.stride_in_1x1, config.backbone_norm) == ("resnet50", True, "frozen")
    assert config.class_names[0] == "person" and config.category_ids[-1] == 90
    assert config.image_mean == pytest.approx(MEAN) and config.image_std == pytest.approx((1 / 255,) * 3)
    assert config.clip_after_nms and config.max_detections == 100
    assert any("assuming caffe style" in note for note in report.notes)
    save_model(tmp_path / "model.safetensors", model)
    assert load_model(tmp_path / "model.safetensors").config == config


def test_constants_of_the_file_are_used(tmp_path: Path) -> None:
    state = random_state(shapes(18, 2, False))
    state |= {"pixel_mean": torch.tensor([25.5, 51.0, 102.0]), "pixel_std": torch.tensor(PIXEL_STD["pytorch"])}
    torch.save({"model": state, "iteration": 90000}, tmp_path / "model.pth")
    for style, mean, std in (("pytorch", (0.1, 0.2, 0.4), STD), ("caffe", (0.4, 0.2, 0.1), STD[::-1])):
        config = convert_checkpoint(tmp_path / "model.pth", "detectron2", style=style)[1].config
        assert config.image_mean == pytest.approx(mean) and config.image_std == pytest.approx(std)
        assert not config.stride_in_1x1  # ResNet-18 has no 1x1 convolutions before its 3x3 ones
