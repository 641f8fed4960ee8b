"""detectron2's layout: converted models give the detections of its computation, stated in plain PyTorch."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import convert_cases as cases
import pytest
import torch
from convert_cases import CHANNELS, DEPTH, MEAN, STD, Heads, Original, State
from torch import Tensor
from torch.nn import functional as F

from retinanet.checkpoints.convert import convert_checkpoint
from retinanet.checkpoints.model_file import load_model, save_model

CLASSES = 3
SLOTS = [0, 3, 6, 1, 4, 7, 2, 5, 8]  # Slot of the original for each slot of the converted model.
PIXEL_MEAN = {"caffe": (103.53, 116.28, 123.675), "pytorch": (123.675, 116.28, 103.53)}
PIXEL_STD = {"caffe": (1.0, 1.0, 1.0), "pytorch": (58.395, 57.12, 57.375)}


def names(stage: int, block: int, part: str) -> str:
    kind = part.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
    kind = f"conv{part[2]}.norm" if part.startswith("bn") else kind
    return "backbone.bottom_up." + (f"res{stage + 1}.{block}.{kind}" if stage else f"stem.{kind}")


LATERAL, SMOOTH = ([f"backbone.fpn_{kind}{level}" for level in (3, 4, 5)] for kind in ("lateral", "output"))
P6, P7 = "backbone.top_block.p6", "backbone.top_block.p7"


def shapes(depth: int, classes: int, norm: bool, channels: int = CHANNELS, convs: int = DEPTH) -> dict[str, list[int]]:
    layers = cases.pyramid_shapes(depth, LATERAL, SMOOTH, P6, P7, channels)
    step = 3 if norm else 2
    for head in ("cls", "bbox"):
        layers |= {f"head.{head}_subnet.{step * i}": (channels, channels, 3) for i in range(convs)}
    layers |= {"head.cls_score": (9 * classes, channels, 3), "head.bbox_pred": (36, channels, 3)}
    result = cases.resnet_shapes(names, depth) | cases.conv_shapes(layers)
    for name in [f"head.{head}_subnet.{3 * i + 1}" for head in ("cls", "bbox") for i in range(convs) if norm]:
        result |= {f"{name}.weight": [channels], f"{name}.bias": [channels]}
    return result


def batch_of(image: Tensor, style: str) -> Tensor:
    """Return the batch of an image that the project reads as BGR or RGB in 0..255."""
    channels = image.flip(0) if style == "caffe" else image
    return cases.normalised(channels * 255, 32, PIXEL_MEAN[style], PIXEL_STD[style])


def heads(state: State, depth: int, style: str, batch: Tensor) -> Heads:
    maps = cases.resnet(state, names, depth, batch, stride_in_1x1=style == "caffe")
    levels = cases.pyramid(state, maps, LATERAL, SMOOTH, P6, P7)
    outputs = []
    for subnet, last in (("cls_subnet", "cls_score"), ("bbox_subnet", "bbox_pred")):
        norm = group_norm(state, f"head.{subnet}")
        hidden = [f"head.{subnet}.{(3 if norm else 2) * i}" for i in range(DEPTH)]
        outputs.append(cases.tower(state, levels, hidden, f"head.{last}", norm))
    return Heads(*outputs)


def group_norm(state: State, subnet: str) -> Callable[[int, Tensor], Tensor] | None:
    """Return the normalisation after convolution `i` of a head, or None if the head has none."""
    if f"{subnet}.1.weight" not in state:
        return None
    return lambda i, x: F.group_norm(x, 32, state[f"{subnet}.{3 * i + 1}.weight"], state[f"{subnet}.{3 * i + 1}.bias"])


def base_anchors() -> list[Tensor]:
    """Return three ratios of each of three sizes."""
    levels = []
    for size in (32, 64, 128, 256, 512):
        sides = []
        for octave in (0, 1 / 3, 2 / 3):
            for ratio in (0.5, 1.0, 2.0):
                width = (size**2 * 4**octave / ratio) ** 0.5
                sides.append((width, width * ratio))
        levels.append(sides)
    return cases.base_anchors(levels)


def original(state: State, depth: int, style: str, image: Tensor) -> Original:
    """Return the results of detectron2; boxes are clipped after NMS, and then those without area are dropped."""
    outputs = heads(cases.doubled(state), depth, style, batch_of(image, style))
    anchors = cases.grid(base_anchors(), outputs.logits, 0.0)
    boxes = cases.decode(anchors, cases.rows(outputs.deltas, 4), high=cases.BOUND)
    kept = cases.suppressed(cases.candidates(boxes, outputs.logits, CLASSES, 1000), 100)
    detections = cases.with_area(kept._replace(boxes=cases.clip(kept.boxes, image)))
    return Original(outputs, cases.clip(boxes, image), tuple(image.shape[-2:]), detections)


def random_checkpoint(depth: int, style: str, norm: bool, image: Tensor) -> State:
    # GroupNorm needs more than one value in each of its 32 groups, also on the top level.
    state = cases.random_state(shapes(depth, CLASSES, norm, channels=64 if norm else CHANNELS))
    # Weights for pixels in 0..255 are smaller.
    state["backbone.bottom_up.stem.conv1.weight"] /= max(PIXEL_STD["pytorch"]) / max(PIXEL_STD[style])
    cases.spread(state, "head.cls_score", "head.bbox_pred", heads(state, depth, style, batch_of(image.float(), style)))
    return state


@pytest.mark.parametrize(("depth", "style", "norm"), [(50, "caffe", False), (18, "pytorch", True)])
def test_converted_models_give_the_same_detections(tmp_path: Path, depth: int, style: str, norm: bool) -> None:
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

    assert model.transform([image])[0].tensors.shape == (1, 3, 96, 96)
    cases.assert_converted(model, image, original(state, depth, style, image), SLOTS, least=60, area=True)


def test_models_of_the_model_zoo(tmp_path: Path) -> None:
    """The published ResNet-50 for COCO is a pickle of an old protocol and holds constants that are not needed."""
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
    assert (config.backbone, config.compat.stride_in_1x1, config.backbone_norm) == ("resnet50", True, "frozen")
    assert config.class_names[0] == "person" and config.category_ids[-1] == 90
    assert config.image_mean == pytest.approx(MEAN) and config.image_std == pytest.approx((1 / 255,) * 3)
    assert config.compat.clip_after_nms and config.max_detections == 100
    assert any("assuming caffe style" in note for note in report.notes)
    save_model(tmp_path / "model.safetensors", model)
    assert load_model(tmp_path / "model.safetensors").config == config


def test_mean_and_deviation_are_those_of_the_file(tmp_path: Path) -> None:
    state = cases.random_state(shapes(18, 2, False))
    state |= {"pixel_mean": torch.tensor([25.5, 51.0, 102.0]), "pixel_std": torch.tensor(PIXEL_STD["pytorch"])}
    torch.save({"model": state, "iteration": 90000}, tmp_path / "model.pth")
    for style, mean, std in (("pytorch", (0.1, 0.2, 0.4), STD), ("caffe", (0.4, 0.2, 0.1), STD[::-1])):
        config = convert_checkpoint(tmp_path / "model.pth", "detectron2", style=style)[1].config
        assert config.image_mean == pytest.approx(mean) and config.image_std == pytest.approx(std)
        assert not config.compat.stride_in_1x1  # ResNet-18 has no 1x1 convolutions before its 3x3 ones
