"""The commands from end to end on a tiny data set."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from cli_cases import (  # noqa: F401  fixtures
    SUBPROCESS,
    data,
    model_file,
    one_error,
    run,
    train_arguments,
)
from safetensors.torch import load_file

from retinanet.data import open_dataset


def test_train_kill_resume_evaluate_detect(data: Path, tmp_path: Path) -> None:
    """A run that is killed, resumed, terminated and resumed gives the weights of an uninterrupted run, bit for bit."""

    def start(*arguments: object) -> subprocess.Popen:
        command = [sys.executable, "-m", "retinanet", *map(str, arguments)]
        return subprocess.Popen(command, env=SUBPROCESS, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def lines(run_dir: Path) -> int:
        path = run_dir / "metrics.jsonl"
        return path.read_text().count('"kind": "epoch"') if path.exists() else 0

    def stop(process: subprocess.Popen, run_dir: Path, epochs: int, number: signal.Signals) -> tuple[int, str]:
        deadline = time.monotonic() + 90
        while lines(run_dir) < epochs and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(number)
        return process.wait(timeout=60), process.stderr.read()

    options = ("--epochs", 8, "--evaluate-every", 8, "--scale", 0.8, 1.2, "--crop", 48)
    straight = start(*train_arguments(data, tmp_path / "straight", *options))
    broken = tmp_path / "broken"
    code, _ = stop(start(*train_arguments(data, broken, *options)), broken, 2, signal.SIGKILL)
    assert code == -signal.SIGKILL and 2 <= lines(broken) < 8, "the run ended before it could be killed"
    again = ("train", "--resume", broken, "--device", "cpu", "--threads", 1)
    code, error = stop(start(*again), broken, 4, signal.SIGTERM)
    assert code == 143, error
    assert re.search(
        r"^retinanet: error: terminated: \S+/last.pt holds the state after (step \d of )?epoch \d+; cont", error, re.M
    )
    assert error.rstrip().endswith(f"with `retinanet train --resume {broken}`")
    assert "Traceback" not in error and not list(broken.glob(".*.tmp"))
    last = start(*again)
    out, error = last.communicate(timeout=120)
    assert last.returncode == 0, error
    assert re.search(r"^epoch 8/8: loss .* images/s, AP ", error, re.M) and "\r" not in error
    assert "8 epochs; best AP " in out
    straight_out, straight_error = straight.communicate(timeout=120)
    assert straight.returncode == 0, straight_error
    ours, expected = (load_file(folder / "last.safetensors") for folder in (broken, tmp_path / "straight"))
    assert ours.keys() == expected.keys() and all(torch.equal(ours[key], expected[key]) for key in ours)

    best = broken / "best.safetensors"
    assert run("evaluate", best, data, "--output", tmp_path / "numbers.json", "--device", "cpu") == 0
    stats = json.loads((tmp_path / "numbers.json").read_text())["stats"]
    assert len(stats) == 12
    output = ("--output", tmp_path / "detections")
    assert run("detect", data.parent / "1.png", "--model", best, *output, "--device", "cpu") == 0
    assert (tmp_path / "detections" / "1_detections.png").exists()


def test_training_again_into_a_run_needs_resume(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*train_arguments(data, tmp_path / "run", "--epochs", 1)) == 0
    capsys.readouterr()
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    assert run(*train_arguments(data, tmp_path / "run", "--epochs", 1)) == 2
    assert one_error(capsys).startswith(f"{tmp_path}/run: holds a run already")
    assert run(*train_arguments(data, tmp_path / "run", "--epochs", 3, "--resume")) == 2
    assert one_error(capsys).startswith(f"{tmp_path}/run: cannot resume with 3 epochs: the multistep schedule has")
    (tmp_path / "config.json").write_text('{"score_threshold": 0.25}')
    resumed = (*train_arguments(data, tmp_path / "run", "--epochs", 1), "--resume")
    assert run(*resumed, "--config", tmp_path / "config.json") == 2
    assert one_error(capsys).startswith(f"{tmp_path}/run: cannot resume: model.score_threshold was 0.05 in this run")
    assert run(*resumed, "--weights", tmp_path / "none.safetensors") == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path}/none.safetensors: not read, because a resumed run continues")
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before
    assert run(*train_arguments(data, tmp_path / "none", "--resume")) == 2
    assert one_error(capsys) == f"{tmp_path}/none: no run to resume: the folder has no last.pt"
    assert not (tmp_path / "none").exists()


def test_a_run_knows_its_data(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    moving, run_dir = tmp_path / "moving", tmp_path / "run"
    shutil.copytree(data.parent, moving)
    monkeypatch.chdir(tmp_path)
    arguments = train_arguments(Path("moving") / data.name, Path("run"), "--images", "moving")
    assert run(*arguments, "--epochs", 1, "--schedule", "constant", "--crop", 99) == 0
    captured = capsys.readouterr()
    assert "the network sees pictures of 64 x 48 pixels as they are\n" in captured.out
    assert "retinanet: warning: training starts from random weights" in captured.err
    assert "retinanet: warning: --crop 99: nothing is cropped" in captured.err
    monkeypatch.chdir("/")
    resumed = ("train", "--resume", run_dir, "--device", "cpu", "--threads", 1)
    assert run(*resumed, "--epochs", 2) == 0
    captured = capsys.readouterr()
    assert "2 epochs; best AP" in captured.out and "random weights" not in captured.err

    moving.rename(tmp_path / "moved")
    assert run(*resumed) == 2
    assert one_error(capsys) == (
        f"{run_dir}: {moving / data.name}, which this run was started with, no longer exists; "
        "give its new place with --train"
    )
    places = ("--train", tmp_path / "moved" / data.name, "--val", data, "--images", tmp_path / "moved")
    assert run(*resumed, *places) == 0
    assert "all 2 epochs of this run are complete; train longer with --epochs" in capsys.readouterr().err
    assert run("train", "--resume", "--output", run_dir, "--device", "cpu", "--threads", 1) == 0
    kept = json.loads((run_dir / "config.json").read_text())["data_options"]
    assert kept == {name.removeprefix("--"): str(path) for name, path in zip(places[::2], places[1::2], strict=True)}

    content = json.loads((run_dir / "config.json").read_text())
    del content["data_options"]
    (run_dir / "config.json").write_text(json.dumps(content))
    capsys.readouterr()
    assert run(*resumed) == 2
    assert one_error(capsys).endswith(f"{run_dir} does not say where its data is")
    assert run(*resumed, "--output", tmp_path) == 2
    assert one_error(capsys).startswith(f"--resume {run_dir}: expected the folder of --output {tmp_path}")


def test_voc_gives_the_same_training_as_coco(data: Path, tmp_path: Path) -> None:
    for entry in open_dataset(data).coco["annotations"]:
        x, y, w, h = (int(value) for value in entry["bbox"])
        corners = f"<xmin>{x + 1}</xmin><ymin>{y + 1}</ymin><xmax>{x + w}</xmax><ymax>{y + h}</ymax>"
        square = f"<object><name>square</name><bndbox>{corners}</bndbox></object>"
        xml = f"<annotation><filename>{entry['image_id']}.png</filename>{square}</annotation>"
        (tmp_path / f"{entry['image_id']}.xml").write_text(xml)
    images = ("--images", data.parent, "--epochs", 1)
    assert run(*train_arguments(data, tmp_path / "coco", *images)) == 0
    assert run(*train_arguments(tmp_path, tmp_path / "voc", *images)) == 0
    coco, voc = (load_file(tmp_path / name / "last.safetensors") for name in ("coco", "voc"))
    assert all(torch.equal(coco[key], voc[key]) for key in coco)
    model = tmp_path / "coco" / "last.safetensors"
    assert run("evaluate", model, tmp_path, "--images", data.parent, "--device", "cpu") == 0
