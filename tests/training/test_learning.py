"""Training learns a small data set, keeps the thresholds that belong to its weights, and stops when it diverges."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from synthetic import rectangles, tiny_config
from training_cases import OPTIONS, Stop, interrupt, metrics, new_model

from retinanet.checkpoints.model_file import load_model, load_state
from retinanet.common.errors import DivergedError
from retinanet.data import DetectionDataset
from retinanet.detection.evaluate import evaluate
from retinanet.model.losses import ImageLosses
from retinanet.model.network import RetinaNet
from retinanet.model.thresholds import ScoreThresholds
from retinanet.training.batches import generator_for
from retinanet.training.options import TrainOptions
from retinanet.training.run import train


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_learns_a_small_data_set(tmp_path: Path, precision: str) -> None:
    data = rectangles(tmp_path / "data", 8)
    torch.manual_seed(0)
    options = TrainOptions(
        epochs=45 if precision == "fp32" else 2,
        batch_size=4,
        optimizer="adamw",
        lr=2e-3,
        schedule="cosine",
        precision=precision,
        evaluate_every=15,
        best_metric="AP50",
        channels_last=precision == "bf16",
        log_every=0,
        device="cpu",
    )
    result = train(RetinaNet(tiny_config()), data, data, options, tmp_path / "run", progress=None)
    epochs = [line for line in metrics(tmp_path / "run") if line["kind"] == "epoch"]
    assert epochs[-1]["loss"] < epochs[0]["loss"]
    if precision == "fp32":
        assert result.best is not None and result.best > 0.9
        best = load_model(tmp_path / "run" / "best.safetensors")
        again = evaluate(best, data)
        assert again.stats["AP50"] == pytest.approx(result.best, abs=0.02)
        # The thresholds were chosen with other batches, whose scores may differ in the last bits.
        assert best.score_threshold == pytest.approx(again.curves.overall.best_threshold(), abs=0.02)
        last = load_model(tmp_path / "run" / "last.safetensors")
        assert last.score_thresholds == result.score_thresholds is not None
        assert best.score_threshold == result.best_threshold
        assert all(again.curves.by_class[i].at(best.score_thresholds.by_class[i]).f1 > 0.8 for i in range(2))


def test_thresholds_belong_to_the_weights_that_were_evaluated(data: DetectionDataset, tmp_path: Path) -> None:
    model = new_model()
    model.score_thresholds = ScoreThresholds(0.9, (0.9, 0.9))
    options = dataclasses.replace(OPTIONS, epochs=1, ema_decay=0.9)
    result = train(model, data, None, options, tmp_path / "run", progress=None)
    assert result.score_thresholds is model.score_thresholds is None
    assert load_model(tmp_path / "run" / "last.safetensors").score_thresholds is None


def test_thresholds_last_until_the_next_step(
    data: DetectionDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = new_model()
    model.score_thresholds = thresholds = ScoreThresholds(0.9, (0.9, None))
    last = tmp_path / "last.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(data, "load", lambda index: interrupt())  # before the first step
        for start, resume in ((model, False), (new_model(), True)):
            with pytest.raises(KeyboardInterrupt):
                train(start, data, None, OPTIONS, tmp_path, resume=resume, progress=None)
            assert load_model(last).score_thresholds == start.score_thresholds == thresholds
    with pytest.raises(KeyboardInterrupt):
        train(new_model(), data, None, OPTIONS, tmp_path, resume=True, progress=Stop(1, interrupt))
    assert load_model(last).score_thresholds is None


@pytest.mark.parametrize("culprit", ["loss", "gradient"])
def test_divergence_names_the_images(
    data: DetectionDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, culprit: str
) -> None:
    model = new_model()
    losses, calls = model.image_losses, []

    def poisoned(*args: Any) -> ImageLosses:
        calls.append(1)
        result = losses(*args)
        if len(calls) == 5 and culprit == "loss":
            result.sums["bbox_regression"] = result.sums["bbox_regression"] * math.nan
        if len(calls) == 5 and culprit == "gradient":
            result.sums["bbox_regression"].register_hook(lambda gradient: gradient * math.inf)
        return result

    monkeypatch.setattr(model, "image_losses", poisoned)
    order = torch.randperm(5, generator=generator_for(OPTIONS.seed, 1)).tolist()[2:4]
    named = ", ".join(str(data.image_ids[index]) for index in order)
    values = r"classification \S+, bbox_regression \S+, gradient norm \S+"
    with pytest.raises(
        DivergedError, match=rf"step 5 \(epoch 2\): training diverged: {values}, images {named}, learning"
    ) as error:
        train(model, data, data, OPTIONS, tmp_path, progress=None)
    assert error.value.exit_code == 4 and "\n" not in str(error.value)
    state = load_state(tmp_path / "last.pt")
    assert state["progress"]["epoch"] == 1
    assert all(value.isfinite().all() for value in state["model"].values())
