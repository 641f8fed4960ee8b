"""The folder of a run: what is in it, what it depends on, and who may write into it."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from training_cases import OPTIONS, Stop, assert_same_run, interrupt, metrics, new_model

from retinanet.checkpoints.model_file import load_model, load_state
from retinanet.common.errors import DataError, UsageError
from retinanet.data import DetectionDataset
from retinanet.detection.evaluate import evaluate
from retinanet.training.run import train


def test_run_folder(uninterrupted: Path, data: DetectionDataset) -> None:
    names = [".lock", "best.safetensors", "config.json", "last.pt", "last.safetensors", "metrics.jsonl"]
    assert sorted(p.name for p in uninterrupted.iterdir()) == names
    config = json.loads((uninterrupted / "config.json").read_text())
    assert config["options"]["lr"] == 1e-3 and config["options"]["transform"]["crop"] == 64
    assert config["model"]["class_names"] == ["red", "blue"]
    assert config["data"]["train"]["images"] == 5

    lines = metrics(uninterrupted)
    assert [line["step"] for line in lines if line["kind"] == "step"] == [2, 4, 6, 8]
    epochs = [line for line in lines if line["kind"] == "epoch"]
    assert [(line["epoch"], line["step"]) for line in epochs] == [(1, 3), (2, 6), (3, 9)]
    for line in epochs:
        assert line["loss"] == pytest.approx(line["classification"] + line["bbox_regression"])
        assert 0 <= line["AP50"] <= 1
    state = load_state(uninterrupted / "last.pt")
    assert state["progress"]["epoch"] == 3 and state["progress"]["step"] == 0
    assert state["progress"]["best"] == max(line["AP"] for line in epochs)
    last = load_model(uninterrupted / "last.safetensors")
    assert evaluate(last, data, batch_size=2).stats["AP"] == pytest.approx(epochs[-1]["AP"], abs=1e-9)


def test_the_same_seed_gives_the_same_run(uninterrupted: Path, data: DetectionDataset, tmp_path: Path) -> None:
    train(new_model(), data, data, OPTIONS, tmp_path / "same", progress=None)
    assert_same_run(tmp_path / "same", uninterrupted)
    train(new_model(), data, None, dataclasses.replace(OPTIONS, seed=1), tmp_path / "other", progress=None)
    one, two = (load_state(p / "last.pt")["model"] for p in (tmp_path / "other", uninterrupted))
    assert not all(torch.equal(one[name], two[name]) for name in one)


def test_worker_processes_change_nothing(uninterrupted: Path, data: DetectionDataset, tmp_path: Path) -> None:
    options = dataclasses.replace(OPTIONS, workers=2)
    with pytest.raises(KeyboardInterrupt):
        train(new_model(), data, data, options, tmp_path, progress=Stop(5, interrupt))
    train(new_model(), data, data, options, tmp_path, resume=True, progress=None)
    assert_same_run(tmp_path, uninterrupted)


def test_without_validation_and_with_rare_evaluation(data: DetectionDataset, tmp_path: Path) -> None:
    result = train(new_model(), data, None, OPTIONS, tmp_path / "none", progress=None)
    assert result.epochs == 3 and result.best is None and result.stats is None
    assert not (tmp_path / "none" / "best.safetensors").exists()
    options = dataclasses.replace(OPTIONS, evaluate_every=2, best_metric="AR100")
    result = train(new_model(), data, data, options, tmp_path / "rare", progress=None)
    evaluated = [line["epoch"] for line in metrics(tmp_path / "rare") if "AP" in line]
    assert evaluated == [2, 3]
    assert result.stats is not None and result.best is not None and result.best >= result.stats["AR100"]


def test_two_processes_exclude_each_other(uninterrupted: Path, data: DetectionDataset, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(uninterrupted, run_dir)
    (run_dir / ".last.pt.abc.tmp").write_bytes(b"the other process is writing this")
    with FileLock(run_dir / ".lock"):
        with pytest.raises(UsageError, match="run: another process is training in this folder; wait for its end"):
            train(new_model(), data, data, OPTIONS, run_dir, resume=True, progress=None)
        assert (run_dir / ".last.pt.abc.tmp").exists()
    train(new_model(), data, data, OPTIONS, run_dir, resume=True, progress=None)
    assert not (run_dir / ".last.pt.abc.tmp").exists()


def test_an_existing_run_is_not_overwritten(uninterrupted: Path, data: DetectionDataset, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds a run already; continue it with --resume, or name another folder"):
        train(new_model(), data, data, OPTIONS, uninterrupted, progress=None)
    with pytest.raises(UsageError, match="no run to resume"):
        train(new_model(), data, data, OPTIONS, tmp_path / "nothing", resume=True, progress=None)


def test_classes_must_be_the_models(data: DetectionDataset, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="classes differ from the model's: expected blue, red; got red, blue"):
        train(new_model(class_names=("blue", "red")), data, data, OPTIONS, tmp_path / "run", progress=None)
    assert not (tmp_path / "run").exists()
