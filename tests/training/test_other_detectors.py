"""Training of an SSD, an FCOS and a Faster R-CNN: the loss falls, and an interrupted run continues exactly."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from synthetic import rectangles
from torch import Tensor
from training_cases import OPTIONS, SMALL_FIELDS, Stop, assert_same_run, interrupt, metrics, small_model

from retinanet.common.errors import UsageError
from retinanet.data import DetectionDataset, TrainTransform
from retinanet.model.losses import ImageLosses
from retinanet.training.engine import Engine
from retinanet.training.learner import Learner
from retinanet.training.run import train
from retinanet.training.summary import describe_training

RECIPE = dataclasses.replace(OPTIONS, epochs=1, batch_size=4, transform=TrainTransform())


@pytest.mark.parametrize(
    ("architecture", "fields"),
    [("ssd", {}), ("ssd", {"cls_loss": "focal"}), ("fcos", {"head_depth": 2}), ("fasterrcnn", {})],
)
def test_the_loss_falls(data: DetectionDataset, tmp_path: Path, architecture: str, fields: dict[str, object]) -> None:
    options = dataclasses.replace(RECIPE, epochs=6, batch_size=5, warmup_steps=0, schedule="constant")
    train(small_model(architecture, **fields), data, None, options, tmp_path / "run", progress=None)
    lines = [line for line in metrics(tmp_path / "run") if line["kind"] == "epoch"]
    losses = [line["loss"] for line in lines]
    assert len(losses) == 6
    names = small_model(architecture, **fields).loss_names
    assert losses[0] == pytest.approx(sum(lines[0][name] for name in names))
    assert losses[-1] < 0.7 * losses[0]


def test_an_fcos_under_autocast_has_its_losses_to_rounding(data: DetectionDataset) -> None:
    samples, values = [data.load(0), data.load(1)], []
    for precision in ("fp32", "bf16"):
        learner = Learner(small_model("fcos"), dataclasses.replace(RECIPE, precision=precision), 1)
        values.append(learner.step(samples))
    assert not torch.equal(*values)
    torch.testing.assert_close(*values, rtol=0.05, atol=0)


@pytest.mark.parametrize("architecture", SMALL_FIELDS)
def test_an_interrupted_run_continues_exactly(tmp_path: Path, architecture: str) -> None:
    # The last batch has one image. The moving average of the weights is what last.safetensors holds.
    data = rectangles(tmp_path / "data", 5, size=64)
    recipe = dataclasses.replace(RECIPE, ema_decay=0.9)
    train(small_model(architecture), data, data, recipe, tmp_path / "whole", progress=None)
    with pytest.raises(KeyboardInterrupt):
        train(small_model(architecture), data, data, recipe, tmp_path / "parts", progress=Stop(1, interrupt))
    other = small_model(architecture, class_weights=(1.0, 2.0))
    with pytest.raises(UsageError, match=r"model.class_weights was \[\] in this run, now it is \[1.0, 2.0\]"):
        train(other, data, data, recipe, tmp_path / "parts", resume=True, progress=None)
    train(small_model(architecture), data, data, recipe, tmp_path / "parts", resume=True, progress=None)
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


# Faster R-CNN draws other samples in other parts.
@pytest.mark.parametrize("architecture", ["ssd", "fcos"])
def test_parts_of_a_batch_give_its_losses(data: DetectionDataset, tmp_path: Path, architecture: str) -> None:
    # Without batch normalisation in training mode, the parts do not change the result.
    losses = []
    for accumulate in (1, 2):
        model = small_model(architecture)
        model.train = lambda mode=True, model=model: torch.nn.Module.train(model, False)  # type: ignore[method-assign]
        options = dataclasses.replace(RECIPE, accumulate=accumulate)
        train(model, data, None, options, tmp_path / f"run{accumulate}", progress=None)
        losses.append([line["loss"] for line in metrics(tmp_path / f"run{accumulate}")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_the_summary_names_the_size_and_the_default_boxes(data: DetectionDataset) -> None:
    lines = describe_training(small_model("ssd").config, RECIPE, data, data)
    assert lines[0] == "the network sees pictures of 80 x 80 pixels at 320 x 320, enlarged 4.0 times"
    assert lines[1].startswith(
        "objects from about 11 x 11 pixels in the pictures reach an IoU of 0.5 with a default box; smaller ones are "
        "matched to their best one alone"
    )


def test_the_summary_of_an_fcos_names_the_finest_points(data: DetectionDataset) -> None:
    config = small_model("fcos", min_size=(160,), fpn_levels=(4, 5)).config
    assert describe_training(config, RECIPE, data, data)[1].startswith(
        "objects from about 8 x 8 pixels in the pictures have a point of the finest level inside"
    )


class TestDrawsOfAFasterRCNN:
    """The samples of its losses, which it draws from the global random generator."""

    def losses(self, data: DetectionDataset, state: int, accumulate: int = 1, engine: Engine | None = None) -> Tensor:
        """Return the losses of two steps before which the global generator has a given state."""
        learner = Learner(small_model("fasterrcnn"), dataclasses.replace(RECIPE, accumulate=accumulate), 2, engine)
        torch.manual_seed(state)
        before = torch.get_rng_state()
        losses = torch.stack([learner.step([data.load(i) for i in range(4)]) for _ in range(2)])
        assert torch.equal(torch.get_rng_state(), before)
        return losses

    def test_they_do_not_depend_on_what_came_before(self, data: DetectionDataset) -> None:
        assert torch.equal(self.losses(data, 1), self.losses(data, 2))

    def test_they_differ_between_steps_parts_and_processes(
        self, data: DetectionDataset, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        draws: list[float] = []
        forward = Learner._forward

        def drawing(learner: Learner, *args: Any) -> ImageLosses:
            draws.append(torch.rand(()).item())
            return forward(learner, *args)

        monkeypatch.setattr(Learner, "_forward", drawing)
        second = Engine(torch.device("cpu"))
        second.rank = 1
        for engine in (None, second):
            self.losses(data, 0, 2, engine)
        assert len(set(draws)) == len(draws) == 2 * 2 * 2
