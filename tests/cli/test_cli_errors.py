"""Wrong usage and wrong data: each gives one line and an exit code, and leaves no files behind."""

import errno
import json
import os
import signal
import time
from pathlib import Path

import pytest
from cli_cases import data, make_data, model_file, one_error, run, train_arguments  # noqa: F401  fixtures

from retinanet.cli.errors import report_errors, worker_message
from retinanet.cli.main import build_parser
from retinanet.model.pyramid_config import BACKBONE_STAGES


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["fly"],
        ["sample", "cars", "x"],
        ["detect", "a.png"],
        ["train", "--train", "a.json"],
        ["detect", "a.png", "--model", "m", "--output", "o", "--score", "2"],
        ["detect", "a.png", "--model", "m", "--output", "o", "--tile", "0"],
    ],
)
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*arguments) == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--optimizer", "lion"], "--optimizer: expected one of sgd, adamw, got 'lion'"),
        (
            ["--backbone", "vgg"],
            f"--backbone: expected one of {', '.join(BACKBONE_STAGES)}, custom, got 'vgg'",
        ),
        (
            ["--anchor-sizes", "8"],
            "--anchor-sizes: expected 2 entries, one per level of fpn_levels, got 1",
        ),
        (["--hue", "0.9"], "--hue: expected a number in 0..0.5, got 0.9"),
        (["--device", "abacus"], "--device: expected auto, cpu, cuda or cuda:N, got 'abacus'"),
    ],
)
def test_wrong_option_of_train(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert run(*train_arguments(data, tmp_path / "run"), *options) == 2
    assert one_error(capsys) == message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lr", "x"], "--lr: expected a number above 0, got 'x'"),
        (["--batch_size", "4"], "unrecognized arguments: --batch_size 4, did you mean --batch-size?"),
        (["--scale", "1,2", "3"], "--scale: expected two numbers, the smallest and the largest, got 3"),
        (["--min-size", "0,8"], "--min-size: expected sizes above 0, or 0 alone, got 0 8"),
        (["--fpn-levels", "3,x"], "--fpn-levels: expected an integer of at least 1, got 'x'"),
    ],
)
def test_a_usage_error_is_one_line(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train", *options) == 2
    captured = capsys.readouterr()
    assert captured == ("", f"retinanet: error: {message}; see retinanet train --help\n")


def test_missing_arguments_of_train(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train") == 2
    needed = "required, unless --resume continues a run; see retinanet train --help"
    assert one_error(capsys) == f"--train and --val and --output: {needed}"
    assert run("train", "--train", "a.json", "--val", "a.json") == 2
    assert one_error(capsys) == f"--output: {needed}"
    assert run("train", "--output", tmp_path / "run", "--train", "a.json") == 2
    assert one_error(capsys).startswith("--val: expected a")
    assert run("train", "--resume") == 2
    assert one_error(capsys) == "--resume: expected the folder of the run to continue"


@pytest.mark.parametrize("numbers", ["3,4,5", "3 4 5", "3, 4, 5", "3 4,5"])
def test_lists_take_commas_and_blanks(numbers: str) -> None:
    args = build_parser().parse_args(["train", "--fpn-levels", *numbers.split(), "--scale", *"1,2".split()])
    assert args.fpn_levels == (3, 4, 5) and args.scale == (1.0, 2.0)


@pytest.mark.parametrize(("sizes", "expected"), [("0", None), ("640,800", (640, 800)), ("640 800", (640, 800))])
def test_sizes_to_resize_to(sizes: str, expected: tuple[int, ...] | None) -> None:
    assert build_parser().parse_args(["train", "--min-size", *sizes.split()]).min_size == expected


def test_a_custom_backbone_needs_the_python_api(data: Path, tmp_path: Path, capsys) -> None:
    assert run(*train_arguments(data, tmp_path / "run"), "--backbone", "custom") == 2
    assert one_error(capsys).startswith("--backbone: 'custom' needs a Python module")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"nms_threshold": 2}, "nms_threshold: expected a number in 0..1, got 2"),
        ({"min_sizes": 800}, "min_sizes: no such field in the configuration, did you mean min_size?"),
        ({"compat": {"p7_relu": 1}}, "compat.p7_relu: expected true or false, got 1"),
        ({"p7_relu": 1}, "compat.p7_relu: expected true or false, got 1"),
        ({"compat": 5}, "compat: expected an object with fields, got int"),
    ],
)
def test_an_error_in_a_configuration_file_names_file_and_field(
    data: Path, tmp_path: Path, capsys, fields: dict[str, object], message: str
) -> None:
    (tmp_path / "model.json").write_text(json.dumps(fields))
    assert run(*train_arguments(data, tmp_path / "run"), "--config", tmp_path / "model.json") == 2
    assert one_error(capsys) == f"{tmp_path}/model.json: {message}"


def test_an_error_in_the_file_of_a_run_names_it(data: Path, tmp_path: Path, capsys) -> None:
    assert run(*train_arguments(data, tmp_path / "run", "--epochs", 1)) == 0
    path = tmp_path / "run" / "config.json"
    content = json.loads(path.read_text())
    for part, field in (("model", "neck"), ("options", "depth")):
        path.write_text(json.dumps({**content, part: {**content[part], field: 3}}))
        capsys.readouterr()
        assert run("train", "--resume", tmp_path / "run") == 2
        assert one_error(capsys).startswith(f"config.json of the run to continue: {field}: no such field")


def test_wrong_data_stops_training_before_it_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = make_data(tmp_path / "data")
    content = json.loads(data.read_text())
    content["annotations"][2]["bbox"] = [60, 40, 30, 16]
    data.write_text(json.dumps(content))
    assert run(*train_arguments(data, tmp_path / "run"), "--strict") == 3
    reason = "bbox [60, 40, 30, 16] reaches 26 pixels out of its image of 64 x 48 pixels"
    assert one_error(capsys) == f"{data}: annotation 3: {reason}"
    assert not (tmp_path / "run").exists()


def test_train_and_validation_of_different_classes(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = make_data(tmp_path / "other", names=("square", "circle"))
    assert run(*train_arguments(data, tmp_path / "run", "--val", other)) == 3
    assert one_error(capsys) == f"{other}: categories: expected the classes square; got square, circle"


def test_outputs_that_cannot_be_written(
    data: Path, model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    assert run(*train_arguments(data, tmp_path / "file")) == 2
    assert one_error(capsys) == f"{tmp_path}/file: expected a folder for the output, got a file or a path below a file"
    output = ("--output", tmp_path / "file")
    assert run("detect", data.parent / "1.png", "--model", model_file, *output, "--device", "cpu") == 2
    assert one_error(capsys) == f"{tmp_path}/file: expected a folder for the output, got a file or a path below a file"
    assert run("evaluate", model_file, data, "--output", tmp_path, "--device", "cpu") == 2
    assert one_error(capsys) == f"{tmp_path}: expected a file name for the output, got a folder"
    assert run("evaluate", model_file, data, "--output", tmp_path / "no" / "x.json", "--device", "cpu") == 2
    assert one_error(capsys) == f"{tmp_path}/no/x.json: cannot be written: the folder {tmp_path}/no does not exist"
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_no_permission(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    assert run(*train_arguments(data, tmp_path / "locked" / "run")) == 2
    assert one_error(capsys) == f"{tmp_path}/locked/run: the output folder cannot be created (Permission denied)"


@pytest.mark.parametrize("content", [None, b"", b"not a checkpoint", b"\x80" * 200])
@pytest.mark.parametrize("command", ["evaluate", "detect"])
def test_unreadable_checkpoint(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, content: bytes | None
) -> None:
    path = tmp_path / "model.safetensors"
    if content is not None:
        path.write_bytes(content)
    output = tmp_path / "out"
    detect = ("detect", data.parent / "1.png", "--model", path, "--output", output)
    assert run(*(("evaluate", path, data) if command == "evaluate" else detect), "--device", "cpu") == 3
    assert one_error(capsys).startswith(f"{path}: {'no such file' if content is None else 'not a safetensors file'}")
    assert not output.exists()


def test_a_checkpoint_of_other_classes(model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = make_data(tmp_path / "other", names=("circle", "disc"))
    assert run("evaluate", model_file, other, "--device", "cpu") == 3
    assert one_error(capsys) == f"{other}: class 'circle' is not one that the model was trained for: square"


def test_damaged_training_state(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*train_arguments(data, tmp_path / "run", "--epochs", 1)) == 0
    state = tmp_path / "run" / "last.pt"
    state.write_bytes(state.read_bytes()[:1000])
    capsys.readouterr()
    assert run(*train_arguments(data, tmp_path / "run", "--epochs", 1, "--resume")) == 3
    assert one_error(capsys).startswith(f"{state}: not a training state, or cut short: ")


def test_a_file_that_holds_no_backbone_weights(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "w.pth").write_bytes(b"no weights")
    assert run(*train_arguments(data, tmp_path / "run", "--backbone-weights", tmp_path / "w.pth")) == 3
    assert one_error(capsys).startswith(f"{tmp_path}/w.pth: ")
    assert not (tmp_path / "run").exists()


def test_an_error_in_a_loading_process_is_reported_without_its_traceback() -> None:
    text = (
        "Caught DataError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
        '  File "x.py", line 1, in load\nretinanet.common.errors.DataError: a/b.png: no such file\n'
    )
    assert worker_message(text) == "a/b.png: no such file"
    assert worker_message("a: 1: x\na: 2: y") == "a: 1: x\na: 2: y"


def test_ctrl_c_saves_the_state_and_exits_with_130(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from retinanet.training.learner import Learner

    def interrupted(*_args: object, **_options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Learner, "step", interrupted)
    assert run(*train_arguments(data, tmp_path / "run")) == 130
    state = tmp_path / "run" / "last.pt"
    assert one_error(capsys).startswith(f"interrupted: {state} holds the state before the first step; continue with")
    assert (tmp_path / "run" / "last.pt").exists() and not list((tmp_path / "run").glob(".*.tmp"))


@pytest.mark.parametrize(
    ("number", "code", "word"), [("SIGTERM", 143, "terminated"), ("SIGHUP", 129, "terminal closed")]
)
def test_a_signal_ends_a_command(number: str, code: int, word: str, capsys: pytest.CaptureFixture[str]) -> None:
    stop = signal.Signals[number]
    inherited = signal.signal(stop, signal.SIG_DFL)  # a parent such as nohup may have set it to be ignored
    try:
        assert report_errors(lambda: os.kill(os.getpid(), stop) or time.sleep(60) or 0) == code  # type: ignore[func-returns-value]
        assert one_error(capsys) == word
        assert signal.getsignal(stop) is signal.SIG_DFL
    finally:
        signal.signal(stop, inherited)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
            "a process that loads images has died (DataLoader worker (pid 7) is killed by signal: Killed.); choose "
            "fewer --workers, or smaller images if memory has run out",
        ),
        (OSError(errno.ENOSPC, "No space left on device"), "output: No space left on device"),
    ],
)
def test_an_error_of_the_system_is_one_line(error: Exception, message: str, capsys) -> None:
    def work() -> int:
        raise error

    assert report_errors(work) == 2
    assert one_error(capsys) == message


def test_nohup_keeps_a_command_alive() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert report_errors(lambda: os.kill(os.getpid(), signal.SIGHUP) or 0) == 0  # type: ignore[func-returns-value]
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_training_that_diverges_exits_with_4(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*train_arguments(data, tmp_path / "run", "--optimizer", "sgd", "--lr", "1e30", "--warmup-steps", 0)) == 4
    assert "diverged" in one_error(capsys)
