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
from retinanet.model.ssd import SSD
from retinanet.model.ssd_config import SSDConfig
from retinanet.training.run import train
from retinanet.training.summary import describe_training

RECIPE = dataclasses.replace(OPTIONS, epochs=1, batch_size=4, transform=TrainTransform())


def new_ssd(**fields: object) -> SSD:
    torch.manual_seed(7)
    return SSD(
        SSDConfig(**{"class_names": CLASS_NAMES, "category_ids": CATEGORY_IDS, "network": "ssdlite320", **fields})
    )


@pytest.mark.parametrize("cls_loss", ["mining", "focal"])
def test_the_loss_falls(data: DetectionDataset, tmp_path: Path, cls_loss: str) -> None:
    options = dataclasses.replace(RECIPE, epochs=6, batch_size=5, warmup_steps=0, schedule="constant")
    train(new_ssd(cls_loss=cls_loss), data, None, options, tmp_path / "run", progress=None)
    losses = [line["loss"] for line in metrics(tmp_path / "run") if line["kind"] == "epoch"]
    assert len(losses) == 6
    assert losses[-1] < 0.7 * losses[0]


def test_an_interrupted_run_continues_exactly(tmp_path: Path) -> None:
    # The last batch has one image.
    data = rectangles(tmp_path / "data", 5, size=64)
    train(new_ssd(), data, data, RECIPE, tmp_path / "whole", progress=None)
    with pytest.raises(KeyboardInterrupt):
        train(new_ssd(), data, data, RECIPE, tmp_path / "parts", progress=Stop(1, interrupt))
    other = new_ssd(negative_ratio=2.0)
    with pytest.raises(UsageError, match=r"model.negative_ratio was 3.0 in this run, now it is 2.0"):
        train(other, data, data, RECIPE, tmp_path / "parts", resume=True, progress=None)
    train(new_ssd(), data, data, RECIPE, tmp_path / "parts", resume=True, progress=None)
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


def test_parts_of_a_batch_give_its_losses(data: DetectionDataset, tmp_path: Path) -> None:
    # Without batch normalisation in training mode, the parts do not change the result.
    losses = []
    for accumulate in (1, 2):
        model = new_ssd()
        model.train = lambda mode=True, model=model: torch.nn.Module.train(model, False)  # type: ignore[method-assign]
        options = dataclasses.replace(RECIPE, accumulate=accumulate)
        train(model, data, None, options, tmp_path / f"run{accumulate}", progress=None)
        losses.append([line["loss"] for line in metrics(tmp_path / f"run{accumulate}")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_the_summary_names_the_size_and_the_default_boxes(data: DetectionDataset) -> None:
    lines = describe_training(new_ssd().config, RECIPE, data, data)
    assert lines[0] == "the network sees pictures of 80 x 80 pixels at 320 x 320, enlarged 4.0 times"
    assert lines[1].startswith(
        "objects from about 11 x 11 pixels in the pictures reach an IoU of 0.5 with a default box; smaller ones are "
        "matched to their best one alone"
    )
