"""Training: it learns, continues exactly where it stopped, and refuses a run folder or data that do not fit."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from synthetic import rectangles, tiny_config

from retinanet.checkpoints.model_file import load_model, load_state, save_state
from retinanet.common.errors import DataError, DivergedError, UsageError
from retinanet.data import DetectionDataset, TrainTransform
from retinanet.detection.evaluate import evaluate
from retinanet.model.losses import ImageLosses
from retinanet.model.network import RetinaNet
from retinanet.model.thresholds import ScoreThresholds
from retinanet.training import loss_log, run_folder
from retinanet.training.batches import generator_for
from retinanet.training.options import TrainOptions
from retinanet.training.run import train

TRANSFORM = TrainTransform(crop=64, scale=(0.8, 1.25), brightness=0.2)
OPTIONS = TrainOptions(
    epochs=3, batch_size=2, optimizer="adamw", lr=1e-3, log_every=2, device="cpu", transform=TRANSFORM
)
CONSTANT = dataclasses.replace(OPTIONS, epochs=4, schedule="constant", evaluate_every=2, warmup_steps=0)
STEPS_PER_EPOCH = 3


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DetectionDataset:
    return rectangles(tmp_path_factory.mktemp("training"), 5, size=80)


def new_model(**changes: object) -> RetinaNet:
    torch.manual_seed(7)
    # With several sizes, each step draws one.
    # The backbone is the one with the fewest weights, because most of these tests save and compare all of them.
    return RetinaNet(tiny_config(**{"min_size": (56, 64, 72), "backbone": "mobilenet_v3_small", **changes}))


class Stop:
    """A progress bar that calls an action after a number of steps, counted over the whole run."""

    def __init__(self, at: int, action: Callable[[], None]) -> None:
        self.at = at
        self.action = action

    def __call__(self, *, total: int, initial: int, **_: Any) -> Stop:
        self.total, self.step = total, initial
        return self

    def update(self) -> None:
        self.step += 1
        if self.step == self.at:
            self.action()

    def set_postfix_str(self, *_: Any, **__: Any) -> None:
        pass

    def write(self, *_: Any, **__: Any) -> None:
        pass

    def close(self) -> None:
        pass


def interrupt() -> None:
    raise KeyboardInterrupt


def crash() -> None:
    raise RuntimeError("crash")


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl without the fields that depend on the clock."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if "second" not in k} for line in lines]


def assert_same_run(got: Path, expected: Path) -> None:
    one, two = load_state(got / "last.pt"), load_state(expected / "last.pt")
    assert one["model"].keys() == two["model"].keys()
    for name, value in two["model"].items():
        assert torch.equal(one["model"][name], value), name
    for index, state in two["optimizer"]["state"].items():
        for name, value in state.items():
            assert torch.equal(torch.as_tensor(one["optimizer"]["state"][index][name]), torch.as_tensor(value))
    assert torch.equal(one["rng"], two["rng"])
    assert metrics(got) == metrics(expected)
    for name in ("best.safetensors", "last.safetensors"):
        assert (got / name).read_bytes() == (expected / name).read_bytes()


@pytest.fixture(scope="module")
def uninterrupted(data: DetectionDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("uninterrupted") / "run"
    train(new_model(), data, data, OPTIONS, run_dir, progress=None)
    return run_dir


# The run folder.


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


# Stopping and resuming.


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


KILLED = """
import dataclasses, os, signal, sys
from pathlib import Path
sys.path[:0] = {folders!r}
import test_training as t
from retinanet.data import open_dataset

t.torch.set_num_threads(1)
data = open_dataset(Path({data!r}))
options = dataclasses.replace(t.OPTIONS, save_every=1e-9)
rename = Path.replace

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

def kill_before_the_state_is_in_place(path, target):
    kill() if target.name == "last.pt" else rename(path, target)

def kill_in_next_save():
    Path.replace = kill_before_the_state_is_in_place

stops = [t.Stop(2, kill), t.Stop(3, kill_in_next_save), t.Stop(5, kill), t.Stop(6, kill_in_next_save), t.Stop(8, kill)]
for number, stop in enumerate(stops):
    child = os.fork()
    if not child:
        t.train(t.new_model(), data, data, options, {run!r}, resume=number > 0, progress=stop)
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


def test_saves_within_an_epoch(uninterrupted: Path, data: DetectionDataset, tmp_path: Path) -> None:
    options = dataclasses.replace(OPTIONS, save_every=1e-9)
    with pytest.raises(RuntimeError, match="crash"):
        train(new_model(), data, data, options, tmp_path, progress=Stop(5, crash))
    progress = load_state(tmp_path / "last.pt")["progress"]
    assert (progress["epoch"], progress["step"]) == (1, 2)
    train(new_model(), data, data, OPTIONS, tmp_path, resume=True, progress=None)
    assert_same_run(tmp_path, uninterrupted)


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


# Errors.


def test_an_existing_run_is_not_overwritten(uninterrupted: Path, data: DetectionDataset, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds a run already; continue it with --resume, or name another folder"):
        train(new_model(), data, data, OPTIONS, uninterrupted, progress=None)
    with pytest.raises(UsageError, match="no run to resume"):
        train(new_model(), data, data, OPTIONS, tmp_path / "nothing", resume=True, progress=None)


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


def test_classes_must_be_the_models(data: DetectionDataset, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="classes differ from the model's: expected blue, red; got red, blue"):
        train(new_model(class_names=("blue", "red")), data, data, OPTIONS, tmp_path / "run", progress=None)
    assert not (tmp_path / "run").exists()


def test_damaged_state_is_named(data: DetectionDataset, tmp_path: Path) -> None:
    (tmp_path / "last.pt").write_bytes(b"junk")
    with pytest.raises(DataError, match=r"last.pt: not a training state"):
        train(new_model(), data, data, OPTIONS, tmp_path, resume=True, progress=None)
    torch.save({"model": {}}, tmp_path / "last.pt")
    with pytest.raises(DataError, match=r"last.pt: not the state of a training run"):
        train(new_model(), data, data, OPTIONS, tmp_path, resume=True, progress=None)


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
            result = result._replace(bbox_regression=result.bbox_regression * math.nan)
        if len(calls) == 5 and culprit == "gradient":
            result.bbox_regression.register_hook(lambda gradient: gradient * math.inf)
        return result

    monkeypatch.setattr(model, "image_losses", poisoned)
    order = torch.randperm(5, generator=generator_for(OPTIONS.seed, 1)).tolist()[2:4]
    named = ", ".join(str(data.image_ids[index]) for index in order)
    with pytest.raises(
        DivergedError, match=rf"step 5 \(epoch 2\): training diverged: .* images {named}, learning"
    ) as error:
        train(model, data, data, OPTIONS, tmp_path, progress=None)
    assert error.value.exit_code == 4 and "\n" not in str(error.value)
    state = load_state(tmp_path / "last.pt")
    assert state["progress"]["epoch"] == 1
    assert all(value.isfinite().all() for value in state["model"].values())


# Learning.


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
