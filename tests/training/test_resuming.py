"""What a run may be resumed with: the same options, model and data, more epochs, and files of an earlier version."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from synthetic import rectangles
from training_cases import OPTIONS, Stop, assert_same_run, interrupt, metrics, new_model

from retinanet.checkpoints.model_file import load_model, load_state, save_state
from retinanet.common.errors import DataError, UsageError
from retinanet.data import DetectionDataset, TrainTransform
from retinanet.training.run import train

CONSTANT = dataclasses.replace(OPTIONS, epochs=4, schedule="constant", evaluate_every=2, warmup_steps=0)


def test_resuming_a_finished_run_changes_nothing(uninterrupted: Path, data: DetectionDataset) -> None:
    before = {p.name: p.read_bytes() for p in uninterrupted.iterdir()}
    result = train(new_model(), data, data, OPTIONS, uninterrupted, resume=True, progress=None)
    assert result.epochs == 3 and result.best is not None
    assert result.score_thresholds == load_model(uninterrupted / "last.safetensors").score_thresholds
    assert {p.name: p.read_bytes() for p in uninterrupted.iterdir()} == before


def test_resuming_a_run_of_an_earlier_version(uninterrupted: Path, data: DetectionDataset, tmp_path: Path) -> None:
    # The configuration of such a run has the fields of `compat` at its top level.
    run_dir = tmp_path / "run"
    shutil.copytree(uninterrupted, run_dir)
    state = load_state(run_dir / "last.pt")
    description = json.loads(state["description"])
    description["model"] |= description["model"].pop("compat")
    save_state(run_dir / "last.pt", {**state, "description": json.dumps(description)})
    assert train(new_model(), data, data, OPTIONS, run_dir, resume=True, progress=None).epochs == 3
    with pytest.raises(UsageError, match="cannot resume: model.compat.p7_relu was True in this run, now it is False"):
        other = new_model(compat={"p7_relu": False})
        train(other, data, data, OPTIONS, uninterrupted, resume=True, progress=None)


def test_a_run_of_an_earlier_version_lacks_newer_options(
    uninterrupted: Path, data: DetectionDataset, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(uninterrupted, run_dir)
    state = load_state(run_dir / "last.pt")
    description = json.loads(state["description"])
    del (
        description["options"]["save_every"],
        description["options"]["transform"]["hue"],
        state["progress"]["planned_epochs"],
    )
    save_state(run_dir / "last.pt", {**state, "description": json.dumps(description)})
    assert train(new_model(), data, data, OPTIONS, run_dir, resume=True, progress=None).epochs == 3


def test_a_constant_schedule_lets_a_run_get_more_epochs(data: DetectionDataset, tmp_path: Path) -> None:
    run_dir = tmp_path / "grown"
    train(new_model(), data, data, dataclasses.replace(CONSTANT, epochs=2), run_dir, progress=None)
    train(new_model(), data, data, CONSTANT, tmp_path / "straight", progress=None)
    grown = dataclasses.replace(CONSTANT, save_every=0.0)
    assert train(new_model(), data, data, grown, run_dir, resume=True, progress=None).epochs == 4
    assert_same_run(run_dir, tmp_path / "straight")
    assert json.loads((run_dir / "config.json").read_text())["options"]["epochs"] == 4
    with pytest.raises(UsageError, match="cannot resume with 3 epochs: it has begun epoch 4"):
        train(new_model(), data, data, dataclasses.replace(grown, epochs=3), run_dir, resume=True, progress=None)


def test_more_epochs_leave_the_warm_up_as_it_was(data: DetectionDataset, tmp_path: Path) -> None:
    short = dataclasses.replace(CONSTANT, warmup_steps=1000)  # 12 steps, so 1 step of warm-up
    with pytest.raises(KeyboardInterrupt):
        train(new_model(), data, None, short, tmp_path, progress=Stop(2, interrupt))
    long = dataclasses.replace(short, epochs=400)
    with pytest.raises(KeyboardInterrupt):
        train(new_model(), data, None, long, tmp_path, resume=True, progress=Stop(4, interrupt))
    assert [line["lr"] for line in metrics(tmp_path) if line["kind"] == "step"] == [1e-3, 1e-3]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 2e-3}, r"cannot resume: options.lr was 0.001 in this run, now it is 0.002"),
        ({"epochs": 4}, r"cannot resume with 4 epochs: the multistep schedule .* --weights \S+/last.safetensors"),
        ({"transform": TrainTransform(crop=32)}, r"cannot resume: options.transform.\w+ was"),
    ],
)
def test_resuming_with_other_options(
    uninterrupted: Path, data: DetectionDataset, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        options = dataclasses.replace(OPTIONS, **changes)
        train(new_model(), data, data, options, uninterrupted, resume=True, progress=None)


def test_resuming_with_another_model_or_data(uninterrupted: Path, data: DetectionDataset, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot resume: model.head_depth was 1 in this run, now it is 2"):
        train(new_model(head_depth=2), data, data, OPTIONS, uninterrupted, resume=True, progress=None)
    other = rectangles(tmp_path / "other", 5, size=80, seed=1)
    with pytest.raises(UsageError, match="cannot resume: data.train.sha256"):
        train(new_model(), other, data, OPTIONS, uninterrupted, resume=True, progress=None)
    with pytest.raises(UsageError, match="cannot resume: data.validation.images was 5 in this run, now it is None"):
        train(new_model(), data, None, OPTIONS, uninterrupted, resume=True, progress=None)


def test_damaged_state_is_named(data: DetectionDataset, tmp_path: Path) -> None:
    (tmp_path / "last.pt").write_bytes(b"junk")
    with pytest.raises(DataError, match=r"last.pt: not a training state"):
        train(new_model(), data, data, OPTIONS, tmp_path, resume=True, progress=None)
    torch.save({"model": {}}, tmp_path / "last.pt")
    with pytest.raises(DataError, match=r"last.pt: not the state of a training run"):
        train(new_model(), data, data, OPTIONS, tmp_path, resume=True, progress=None)
