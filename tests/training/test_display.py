"""What a run shows where the output is no terminal: a line an epoch, and the time of a step."""

from __future__ import annotations

import dataclasses
import io
import re
import time

import pytest

from retinanet.common import progress as common_progress
from retinanet.common.progress import ProgressLines, clock_in, duration, make_bar, progress_bar
from retinanet.training.display import Display
from retinanet.training.options import TrainOptions
from retinanet.training.progress import Progress


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_the_bar_is_tqdm_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    from tqdm import tqdm

    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr("sys.stderr", terminal)
    assert isinstance(make_bar(total=3), tqdm)
    monkeypatch.setattr("sys.stderr", io.StringIO())
    assert isinstance(make_bar(total=3), ProgressLines)


def test_short_work_prints_nothing(capsys: pytest.CaptureFixture[str], clock: Clock) -> None:
    assert list(progress_bar("checking images", "image", delay=2)(iter("abc"), total=3)) == list("abc")
    assert capsys.readouterr().err == ""


def test_long_work_prints_a_line_every_two_minutes(capsys: pytest.CaptureFixture[str], clock: Clock) -> None:
    for _ in progress_bar("evaluating", "batch")([0] * 10):
        clock.now += 50
    assert capsys.readouterr().err.splitlines() == [
        "evaluating: 3 of 10 batches, 6 min left",
        "evaluating: 6 of 10 batches, 3 min left",
        "evaluating: 9 of 10 batches, 50 s left",
    ]
    for _ in progress_bar("reading", "file")(iter([0] * 2)):
        clock.now += common_progress.SECONDS_BETWEEN_LINES
    assert capsys.readouterr().err.splitlines() == ["reading: 1 file", "reading: 2 files"]


OPTIONS = TrainOptions(epochs=2, device="cpu")
RECORD = {"loss": 0.5, "images_per_second": 4.0, "AP": 0.25}


def test_a_run_prints_a_line_an_epoch_and_the_time_of_a_step(capsys: pytest.CaptureFixture[str], clock: Clock) -> None:
    progress = Progress(epoch_sums=[3.0, 1.0, 8.0])
    with Display(make_bar, progress, OPTIONS, 100) as display:
        for epoch in range(2):
            for _ in range(100):
                clock.now += 3
                progress.count(2, 0.5, 2.5)
                display.after_step()
            display.evaluating()
            clock.now += 100
            progress.best, progress.best_epoch = 0.25, epoch + 1
            display.after_epoch(RECORD)
            progress.next_epoch()
    lines = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"3.00 s per step: the other 178 steps take 9 min, until \d\d:\d\d; evaluations .*", lines[0])
    middle = "training: {} of 200 steps, {} left, epoch {}/2, loss 0.500, 0.7 images/s, data 500 ms, step 2.50 s{}"
    assert lines[1:] == [
        middle.format(62, "7 min", 1, ""),
        "epoch 1/2: loss 0.500, 4.0 images/s, AP 0.250, best 0.250 in epoch 1, 7 min left",
        middle.format(140, "4 min", 2, ", best AP 0.250"),
        middle.format(180, "71 s", 2, ", best AP 0.250"),
        "epoch 2/2: loss 0.500, 4.0 images/s, AP 0.250, best 0.250 in epoch 2",
    ]


def test_slow_steps_are_announced_after_a_minute(capsys: pytest.CaptureFixture[str], clock: Clock) -> None:
    progress = Progress(step=90)
    with Display(make_bar, progress, dataclasses.replace(OPTIONS, epochs=1), 100) as display:
        for _ in range(10):
            clock.now += 25
            progress.count(2, 5, 20)
            display.after_step()
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "per step" in line)
    assert line.startswith("25.00 s per step: the other 5 steps take 2 min")


@pytest.mark.parametrize(
    ("best", "epoch", "advised"), [(0.0, 2, True), (0.1, 2, False), (0.0, 1, False), (0.0, 3, False)]
)
def test_an_ap_that_stays_at_0_brings_advice(
    capsys: pytest.CaptureFixture[str], best: float, epoch: int, advised: bool
) -> None:
    progress = Progress(epoch=epoch, best=best, best_epoch=1)
    with Display(make_bar, progress, dataclasses.replace(OPTIONS, epochs=5), 10) as display:
        display.after_epoch({**RECORD, "AP": 0.0, "step": 30})
    assert ("AP is still 0 after 3 evaluations and 30 steps. A model" in capsys.readouterr().err) is advised


def test_the_time_of_a_step_leaves_evaluations_out(capsys: pytest.CaptureFixture[str], clock: Clock) -> None:
    progress = Progress(best=0.25, best_epoch=1)
    with Display(make_bar, progress, dataclasses.replace(OPTIONS, epochs=4), 8) as display:
        for _ in range(3):
            for _ in range(8):
                clock.now += 2
                display.after_step()
            clock.now += 1000
            display.after_epoch(RECORD)
            progress.next_epoch()
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "per step" in line)
    assert line.startswith("2.00 s per step: the other 10 steps take 20 s")


def test_nothing_is_shown_without_a_bar(capsys: pytest.CaptureFixture[str]) -> None:
    with Display(None, Progress(), OPTIONS, 2) as display:
        display.after_step()
        display.evaluating()
        display.after_epoch(RECORD)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (89, "89 s"), (90, "2 min"), (7100, "118 min"), (7500, "2 h 05 min")]
)
def test_durations_in_words(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_day_is_named_if_it_is_far_away() -> None:
    assert re.fullmatch(r"\d\d:\d\d", clock_in(3600))
    assert re.fullmatch(r"\w+ \d\d \w+, \d\d:\d\d", clock_in(90_000))
