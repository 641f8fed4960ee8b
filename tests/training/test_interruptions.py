"""A run that was interrupted, crashed or killed continues exactly where it was saved."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from training_cases import OPTIONS, STEPS_PER_EPOCH, Stop, assert_same_run, crash, interrupt, new_model

from retinanet.checkpoints.model_file import load_state
from retinanet.data import DetectionDataset
from retinanet.model.losses import ImageLosses
from retinanet.training import loss_log, run_folder
from retinanet.training.run import train


@pytest.mark.parametrize("at", [1, STEPS_PER_EPOCH, 5, 3 * STEPS_PER_EPOCH])
def test_interrupted_and_resumed(uninterrupted: Path, data: DetectionDataset, tmp_path: Path, at: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(new_model(), data, data, OPTIONS, tmp_path, progress=Stop(at, interrupt))
    progress = load_state(tmp_path / "last.pt")["progress"]
    assert progress["epoch"] * STEPS_PER_EPOCH + progress["step"] == at
    torch.manual_seed(99)  # the random state at the time of resuming must not matter
    result = train(new_model(score_threshold=0.05), data, data, OPTIONS, tmp_path, resume=True, progress=None)
    assert result.epochs == 3
    assert_same_run(tmp_path, uninterrupted)


@pytest.fixture
def _ctrl_c() -> Iterator[None]:
    """Install Python's default handler of SIGINT, which is ignored if a shell started the tests in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_ctrl_c")
def test_ctrl_c_inside_a_step_waits_for_its_end(
    uninterrupted: Path, data: DetectionDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = new_model()
    losses, calls = model.image_losses, []

    def signalled(*args: Any) -> ImageLosses:
        calls.append(1)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return losses(*args)

    monkeypatch.setattr(model, "image_losses", signalled)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(model, data, data, OPTIONS, tmp_path, progress=None)
    assert signal.getsignal(signal.SIGINT) is before
    progress = load_state(tmp_path / "last.pt")["progress"]
    assert (progress["epoch"], progress["step"]) == (1, 2)
    train(new_model(), data, data, OPTIONS, tmp_path, resume=True, progress=None)
    assert_same_run(tmp_path, uninterrupted)


@pytest.mark.usefixtures("_ctrl_c")
def test_a_second_ctrl_c_does_not_stop_the_save(
    data: DetectionDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = run_folder.save_state

    def impatient(*args: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        save(*args)

    def first() -> None:
        monkeypatch.setattr(run_folder, "save_state", impatient)
        interrupt()

    with pytest.raises(KeyboardInterrupt, match="last.pt holds the state after step 2 of epoch 1; continue with"):
        train(new_model(), data, None, OPTIONS, tmp_path, progress=Stop(2, first))
    assert load_state(tmp_path / "last.pt")["progress"]["step"] == 2


def test_interrupted_while_evaluating(
    uninterrupted: Path, data: DetectionDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("retinanet.training.run.detect_dataset", lambda *args, **kwargs: interrupt())
        with pytest.raises(KeyboardInterrupt):
            train(new_model(), data, data, OPTIONS, tmp_path, progress=None)
    train(new_model(), data, data, OPTIONS, tmp_path, resume=True, progress=None)
    assert_same_run(tmp_path, uninterrupted)


@pytest.mark.parametrize("where", ["step", "save_state", "save_model", "write_line"])
def test_a_crash_loses_at_most_the_epoch(
    uninterrupted: Path, data: DetectionDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    with monkeypatch.context() as patch:
        stop = Stop(5, crash) if where == "step" else None
        if where != "step":
            place: Any = loss_log.LossLog if where == "write_line" else run_folder
            original, calls = getattr(place, where), []

            def fails_late(*args: Any) -> Any:
                result = original(*args)
                calls.append(1)
                if len(calls) == 4:
                    crash()
                return result

            patch.setattr(place, where, fails_late)
        with pytest.raises(RuntimeError, match="crash"):
            train(new_model(), data, data, OPTIONS, tmp_path, progress=stop)
    train(new_model(), data, data, OPTIONS, tmp_path, resume=True, progress=None)
    assert_same_run(tmp_path, uninterrupted)


def test_saves_within_an_epoch(uninterrupted: Path, data: DetectionDataset, tmp_path: Path) -> None:
    options = dataclasses.replace(OPTIONS, save_every=1e-9)
    with pytest.raises(RuntimeError, match="crash"):
        train(new_model(), data, data, options, tmp_path, progress=Stop(5, crash))
    progress = load_state(tmp_path / "last.pt")["progress"]
    assert (progress["epoch"], progress["step"]) == (1, 2)
    train(new_model(), data, data, OPTIONS, tmp_path, resume=True, progress=None)
    assert_same_run(tmp_path, uninterrupted)


KILLED = """
import dataclasses, os, signal, sys
from pathlib import Path
sys.path[:0] = {folders!r}
import torch
from training_cases import OPTIONS, Stop, new_model
from retinanet.data import open_dataset
from retinanet.training.run import train

torch.set_num_threads(1)
data = open_dataset(Path({data!r}))
options = dataclasses.replace(OPTIONS, save_every=1e-9)
rename = Path.replace

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

def kill_before_the_state_is_in_place(path, target):
    kill() if target.name == "last.pt" else rename(path, target)

def kill_in_next_save():
    Path.replace = kill_before_the_state_is_in_place

stops = [Stop(2, kill), Stop(3, kill_in_next_save), Stop(5, kill), Stop(6, kill_in_next_save), Stop(8, kill)]
for number, stop in enumerate(stops):
    child = os.fork()
    if not child:
        train(new_model(), data, data, options, {run!r}, resume=number > 0, progress=stop)
        os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (number, status)
"""


def test_killed_five_times_and_resumed(uninterrupted: Path, data: DetectionDataset, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    folders = [str(folder) for folder in Path(__file__).parents[:2]]
    script = KILLED.format(folders=folders, data=str(data.source), run=str(run_dir))
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    progress = load_state(run_dir / "last.pt")["progress"]
    assert (progress["epoch"], progress["step"]) == (2, 2)
    (run_dir / ".last.pt.abc.tmp").write_bytes(b"half")  # a kill during saving leaves such a file
    train(new_model(), data, data, OPTIONS, run_dir, resume=True, progress=None)
    assert_same_run(run_dir, uninterrupted)
    assert not list(run_dir.glob(".*.tmp"))
