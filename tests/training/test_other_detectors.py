"""Training of an SSD: its loss falls, and an interrupted run continues as if nothing had stopped it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from synthetic import CATEGORY_IDS, CLASS_NAMES, rectangles
from training_cases import OPTIONS, Stop, assert_same_run, interrupt, metrics

from retinanet.common.errors import UsageError
from retinanet.data import DetectionDataset, TrainTransform
from retinanet.model.architectures import build_model
from retinanet.model.detector import Detector
from retinanet.model.detector_config import CONFIG_CLASSES
from retinanet.training.run import train
from retinanet.training.summary import describe_training

RECIPE = dataclasses.replace(OPTIONS, epochs=1, batch_size=4, transform=TrainTransform())


SMALL_PYRAMID = {"backbone": "mobilenet_v3_small", "fpn_channels": 32, "min_size": None, "fpn_levels": (3, 4, 5)}
SMALL_PYRAMID |= {"backbone_norm": "batch", "trainable_backbone_layers": None}
#: Fields of small models, by architecture.
FIELDS = {
    "ssd": {"network": "ssdlite320"},
    "fcos": {**SMALL_PYRAMID, "head_depth": 1},
    "fasterrcnn": {
        **SMALL_PYRAMID,
        "anchor_sizes": (16, 24, 40),
        "representation_size": 32,
        "proposals_training": 100,
        "roi_batch_size": 32,
    },
}


def new_model(architecture: str, **fields: object) -> Detector:
    torch.manual_seed(7)
    names = {"class_names": CLASS_NAMES, "category_ids": CATEGORY_IDS}
    return build_model(CONFIG_CLASSES[architecture](**{**names, **FIELDS[architecture], **fields}))


@pytest.mark.parametrize(
    ("architecture", "fields"),
    [("ssd", {}), ("ssd", {"cls_loss": "focal"}), ("fcos", {"head_depth": 2}), ("fasterrcnn", {})],
)
def test_the_loss_falls(data: DetectionDataset, tmp_path: Path, architecture: str, fields: dict[str, object]) -> None:
    options = dataclasses.replace(RECIPE, epochs=6, batch_size=5, warmup_steps=0, schedule="constant")
    train(new_model(architecture, **fields), data, None, options, tmp_path / "run", progress=None)
    lines = [line for line in metrics(tmp_path / "run") if line["kind"] == "epoch"]
    losses = [line["loss"] for line in lines]
    assert len(losses) == 6
    names = new_model(architecture, **fields).loss_names
    assert losses[0] == pytest.approx(sum(lines[0][name] for name in names))
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("architecture", FIELDS)
def test_an_interrupted_run_continues_exactly(tmp_path: Path, architecture: str) -> None:
    # The last batch has one image.
    data = rectangles(tmp_path / "data", 5, size=64)
    train(new_model(architecture), data, data, RECIPE, tmp_path / "whole", progress=None)
    with pytest.raises(KeyboardInterrupt):
        train(new_model(architecture), data, data, RECIPE, tmp_path / "parts", progress=Stop(1, interrupt))
    other = new_model(architecture, class_weights=(1.0, 2.0))
    with pytest.raises(UsageError, match=r"model.class_weights was \[\] in this run, now it is \[1.0, 2.0\]"):
        train(other, data, data, RECIPE, tmp_path / "parts", resume=True, progress=None)
    train(new_model(architecture), data, data, RECIPE, tmp_path / "parts", resume=True, progress=None)
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


# Faster R-CNN draws other samples in other parts.
@pytest.mark.parametrize("architecture", ["ssd", "fcos"])
def test_parts_of_a_batch_give_its_losses(data: DetectionDataset, tmp_path: Path, architecture: str) -> None:
    # Without batch normalisation in training mode, the parts do not change the result.
    losses = []
    for accumulate in (1, 2):
        model = new_model(architecture)
        model.train = lambda mode=True, model=model: torch.nn.Module.train(model, False)  # type: ignore[method-assign]
        options = dataclasses.replace(RECIPE, accumulate=accumulate)
        train(model, data, None, options, tmp_path / f"run{accumulate}", progress=None)
        losses.append([line["loss"] for line in metrics(tmp_path / f"run{accumulate}")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_the_summary_names_the_size_and_the_default_boxes(data: DetectionDataset) -> None:
    lines = describe_training(new_model("ssd").config, RECIPE, data, data)
    assert lines[0] == "the network sees pictures of 80 x 80 pixels at 320 x 320, enlarged 4.0 times"
    assert lines[1].startswith(
        "objects from about 11 x 11 pixels in the pictures reach an IoU of 0.5 with a default box; smaller ones are "
        "matched to their best one alone"
    )


def test_the_summary_of_an_fcos_names_the_finest_points(data: DetectionDataset) -> None:
    config = new_model("fcos", min_size=(160,), fpn_levels=(4, 5)).config
    assert describe_training(config, RECIPE, data, data)[1].startswith(
        "objects from about 8 x 8 pixels in the pictures have a point of the finest level inside"
    )
