"""Several processes: the same losses and weights as one, for any number of them, and an end when one of them dies."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_cases import SUBPROCESS
from synthetic import TINY_MODEL, rectangles, tiny_config
from torch.utils.data import TensorDataset
from training_cases import Stop, interrupt, metrics, small_model

from retinanet.checkpoints.model_file import load_state
from retinanet.cli.main import main
from retinanet.common.errors import DataError, UsageError
from retinanet.data import DetectionDataset, TrainTransform
from retinanet.model.network import RetinaNet
from retinanet.training import run
from retinanet.training.engine import Engine, LostProcessError
from retinanet.training.learner import Learner
from retinanet.training.options import TrainOptions
from retinanet.training.run import train

pytest.importorskip("accelerate")

# Crops of several sizes, and a last batch of one image, of which only one of two processes gets a share.
OPTIONS = TrainOptions(
    epochs=2,
    batch_size=4,
    optimizer="sgd",  # AdamW enlarges rounding errors of gradients near 0
    lr=1e-2,
    log_every=1,
    device="cpu",
    ema_decay=0.9,
    transform=TrainTransform(crop=64, scale=(0.6, 1.25)),
)

#: Modules that start several processes, with the options for two on this machine.
LAUNCHERS = {
    "torchrun": "torch.distributed.run --nproc-per-node 2 --standalone",
    "accelerate": "accelerate.commands.launch --multi_gpu --num_processes 2 --main_process_port 0",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DetectionDataset:
    return rectangles(tmp_path_factory.mktemp("distributed"), 5, size=80)


def new_model(rule: str = "per_image") -> RetinaNet:
    torch.manual_seed(7)
    fields = {"backbone_norm": "frozen", "min_size": (48, 64), "loss_normaliser": rule}
    return RetinaNet(tiny_config(**fields))


def in_processes(work: Callable[[int], Any]) -> list[int | None]:
    """Call `work(rank)` in two processes like those of a launcher; return their exit codes, None after a minute."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def child(rank: int) -> None:
        names = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
        names |= {"RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": 1}
        os.environ.update({name: str(value) for name, value in names.items()})
        signal.signal(signal.SIGTERM, lambda *_: interrupt())
        work(rank)

    # Forked processes need not import anything again. They cannot evaluate, because OpenMP's threads do not survive the
    # fork.
    children = [multiprocessing.get_context("fork").Process(target=child, args=(rank,)) for rank in (0, 1)]
    for process in children:
        process.start()
    codes = []
    for process in children:
        process.join(60)
        codes.append(process.exitcode)
        process.kill()
    return codes


def interrupt_all() -> None:
    """Interrupt a run in all processes of `in_processes`."""
    os.kill(os.getpid(), signal.SIGTERM)  # the other process learns of it before the next step


@pytest.fixture(scope="module")
def alone(data: DetectionDataset, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the folders of uninterrupted runs of one process, by rule of the loss normaliser."""
    folders = {rule: tmp_path_factory.mktemp("alone") / rule for rule in ("per_image", "batch")}
    for rule, folder in folders.items():
        train(new_model(rule), data, None, OPTIONS, folder, progress=None)
    return folders


def assert_same_to_rounding(got: Path, expected: Path) -> None:
    for one, two in zip(metrics(got), metrics(expected), strict=True):
        assert one.keys() == two.keys() and one.pop("kind") == two.pop("kind")
        assert one == pytest.approx(two, rel=1e-4, abs=1e-6)
    for part in ("model", "average"):
        one, two = (load_state(folder / "last.pt")[part] for folder in (got, expected))
        for name, value in two.items():
            torch.testing.assert_close(one[name], value, rtol=1e-4, atol=1e-4)


def test_two_processes_equal_one_and_the_run_continues_with_one(
    data: DetectionDataset, alone: dict[str, Path], tmp_path: Path
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    options = dataclasses.replace(OPTIONS, accumulate=2)

    def work(rank: int) -> None:
        train(new_model("batch"), data, None, options, whole, progress=None)
        with pytest.raises(KeyboardInterrupt):
            train(new_model("batch"), data, None, OPTIONS, stopped, progress=Stop(1, interrupt_all))

    assert in_processes(work) == [0, 0]
    assert_same_to_rounding(whole, alone["batch"])
    progress = load_state(stopped / "last.pt")["progress"]
    assert (progress["epoch"], progress["step"]) == (0, 1)
    train(new_model("batch"), data, None, OPTIONS, stopped, resume=True, progress=None)
    assert_same_to_rounding(stopped, alone["batch"])


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_other_and_loses_what_was_not_saved(
    data: DetectionDataset, alone: dict[str, Path], tmp_path: Path, victim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, calls = data.load, []

    def work(rank: int) -> None:
        def dying(index: int) -> Any:
            calls.append(index)
            if rank == victim and len(calls) == 4 - rank:  # while it loads its share of the third batch
                os.kill(os.getpid(), signal.SIGKILL)
            return load(index)

        monkeypatch.setattr(data, "load", dying)
        with pytest.raises(LostProcessError, match="has ended; its own message or the launcher's says why"):
            train(new_model(), data, None, OPTIONS, tmp_path / "run", progress=None)

    started = time.monotonic()
    codes = in_processes(work)
    assert codes[victim] == -signal.SIGKILL and codes[1 - victim] == 0
    assert time.monotonic() - started < 30
    # The run continues with one process from its last save, the end of the first epoch or the start.
    train(new_model(), data, None, OPTIONS, tmp_path / "run", resume=True, progress=None)
    assert_same_to_rounding(tmp_path / "run", alone["per_image"])


@pytest.mark.parametrize("rule", ["per_image", "batch"])
def test_parts_of_a_batch_give_its_result(
    data: DetectionDataset, alone: dict[str, Path], tmp_path: Path, rule: str
) -> None:
    options = dataclasses.replace(OPTIONS, accumulate=3)
    train(new_model(rule), data, None, options, tmp_path / "run", progress=None)
    assert_same_to_rounding(tmp_path / "run", alone[rule])


def test_two_processes_continue_a_faster_rcnn_exactly(data: DetectionDataset, tmp_path: Path) -> None:
    # It draws the samples of its losses, and two processes draw different ones.
    def work(rank: int) -> None:
        options = dataclasses.replace(OPTIONS, epochs=1, batch_size=2)
        whole, parts = tmp_path / "whole", tmp_path / "parts"
        train(small_model("fasterrcnn"), data, None, options, whole, progress=None)
        with pytest.raises(KeyboardInterrupt):
            train(small_model("fasterrcnn"), data, None, options, parts, progress=Stop(1, interrupt_all))
        train(small_model("fasterrcnn"), data, None, options, parts, resume=True, progress=None)

    assert in_processes(work) == [0, 0]
    one, two = (load_state(tmp_path / name / "last.pt") for name in ("parts", "whole"))
    for part in ("model", "average"):
        assert all(torch.equal(one[part][name], value) for name, value in two[part].items())
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")


class OneOfTwo(Engine):
    """The second of two processes, whose first one has a given number of images."""

    processes, rank = 2, 1

    def __init__(self, others: int, device: str = "cpu") -> None:
        super().__init__(torch.device(device))
        self.others = others

    def exchange(self, values: list[int]) -> list[list[int]]:
        return [[self.others, *values[1:]], values]


def test_processes_compute_equally_many_parts(data: DetectionDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    options = dataclasses.replace(OPTIONS, accumulate=2)
    samples = [data.load(0)]
    norms = []
    for others, parts in ((1, 1), (2, 2)):
        model = new_model()
        learner = Learner(model, options, 1, OneOfTwo(others))
        forward, calls = model.image_losses, []
        monkeypatch.setattr(model, "image_losses", lambda *args, f=forward, c=calls: (c.append(1), f(*args))[1])
        plan = learner.plan(samples)
        assert (plan.images, plan.parts) == (1 + others, parts)
        norms.append(learner.step(samples, plan)[2] * plan.images)
        assert len(calls) == parts
    # The image that stands in for none in the second part adds nothing.
    torch.testing.assert_close(norms[0], norms[1])


class TestSynchronisedBatchNorm:
    def test_a_share_without_images_is_refused_before_training(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = RetinaNet(tiny_config(backbone_norm="sync"))
        last = "batch_size: the last batch of an epoch has {} images, and backbone_norm sync needs {}, one in each part"
        for device, images, accumulate, message in (
            ("cuda", 5, 2, last.format("1 of 5", 2)),
            ("cuda", 7, 2, last.format("3 of 7", 4)),
            ("cpu", 8, 1, "backbone_norm: sync normalises over the images of 2 processes on GPUs only; choose frozen"),
        ):
            monkeypatch.setattr(run, "start_engine", lambda _, device=device: OneOfTwo(1, device))
            options = dataclasses.replace(OPTIONS, accumulate=accumulate)
            with pytest.raises(UsageError, match=message):
                train(model, TensorDataset(torch.zeros(images)), None, options, tmp_path / "run", progress=None)
        assert not (tmp_path / "run").exists()

    def test_a_stream_that_ends_for_one_process(self, data: DetectionDataset) -> None:
        options = dataclasses.replace(OPTIONS, accumulate=2)
        learner = Learner(RetinaNet(tiny_config(backbone_norm="sync")), options, 1, OneOfTwo(2))
        with pytest.raises(DataError, match="has 1 of the 3 images of a step for process 1, .* needs 2 in every"):
            learner.plan([data.load(0)])
        assert learner.plan([data.load(0)], stop=True).stop
        assert learner.plan([data.load(0), data.load(1)]).parts == 2


def test_a_batch_needs_an_image_for_each_part() -> None:
    with pytest.raises(UsageError, match=r"at least 3 images, one for each part .*accumulate 3\), got 2"):
        Learner(new_model(), TrainOptions(batch_size=2, accumulate=3, device="cpu"), 1)


@pytest.fixture(scope="module")
def command(data: DetectionDataset, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return the command of a run of one epoch, up to the name of its folder."""
    config = {name: value for name, value in new_model().config.to_dict().items() if name in TINY_MODEL}
    path = tmp_path_factory.mktemp("launcher") / "config.json"
    path.write_text(json.dumps({**config, "backbone_norm": "frozen"}))
    command = f"train --train {data.source} --val {data.source} --config {path} --batch-size 4 --epochs 1"
    return f"{command} --device cpu --threads 1 --output".split()


@pytest.fixture(scope="module")
def one_process(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the run of one process without a launcher."""
    folder = tmp_path_factory.mktemp("one_process") / "run"
    assert main([*command, str(folder)]) == 0
    return folder


class TestLauncher:
    @pytest.mark.parametrize("launcher", LAUNCHERS.values(), ids=LAUNCHERS)
    def test_two_processes_train_evaluate_and_write_once(
        self, command: list[str], one_process: Path, launcher: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        # A configuration that the user has made for Accelerate is in HF_HOME.
        environment = {**SUBPROCESS, "ACCELERATE_USE_CPU": "1", "HF_HOME": str(tmp_path)}
        run_dir = tmp_path / "run"
        whole = [sys.executable, "-m", *launcher.split(), "-m", "retinanet", *command, str(run_dir)]
        subprocess.run(whole, check=True, env=environment, timeout=180)
        assert capfd.readouterr().out.count("IoU 0.50:0.95") == 1
        assert {path.name for path in run_dir.iterdir()} == {path.name for path in one_process.iterdir()}
        (two,), (one,) = metrics(run_dir), metrics(one_process)
        assert one.keys() == two.keys() and "AR100" in one and one.pop("kind") == two.pop("kind")
        assert two == pytest.approx(one, rel=1e-4, abs=1e-6)

    def test_a_single_device_for_several_processes(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("WORLD_SIZE", "2")
        data = rectangles(tmp_path / "data", 2)
        with pytest.raises(UsageError, match="device: expected auto, cpu or cuda for 2 processes, .* got 'cuda:1'"):
            train(new_model(), data, None, dataclasses.replace(OPTIONS, device="cuda:1"), tmp_path / "run")
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
        with pytest.raises(UsageError, match="ACCELERATE_MIXED_PRECISION=fp16: give the option --precision"):
            train(new_model(), data, None, OPTIONS, tmp_path / "run")
