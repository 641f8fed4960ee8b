"""Parts of a recipe: class weights, early stopping, several image sizes, advice about memory, tiny images, loggers."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from synthetic import rectangles, tiny_config
from training_cases import metrics

from retinanet.cli.main import build_parser
from retinanet.cli.train_config import build_config, build_options
from retinanet.common.errors import DataError, UsageError
from retinanet.data import DetectionDataset, TrainTransform
from retinanet.detection.evaluate import EvaluationResult
from retinanet.model.network import RetinaNet
from retinanet.training import run
from retinanet.training.class_weights import balanced_weights, read_weights
from retinanet.training.learner import _LEAST_SCALE, Learner, StepPlan
from retinanet.training.loggers import Loggers
from retinanet.training.loss_log import LossLog
from retinanet.training.options import TrainOptions
from retinanet.training.progress import Progress
from retinanet.training.run import train

SMALLEST = {"backbone": "mobilenet_v3_small"}
OPTIONS = TrainOptions(epochs=1, batch_size=2, optimizer="adamw", lr=1e-3, log_every=1, device="cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DetectionDataset:
    return rectangles(tmp_path_factory.mktemp("recipe"), 3, size=64)


def samples_of(data: DetectionDataset) -> list[Any]:
    return [data.load(index) for index in range(len(data))]


class TestClassWeights:
    def test_balanced_weights(self) -> None:
        # 100 and 25 objects: weights proportional to 1/10 and 1/5 that have the mean 1 over the objects.
        assert balanced_weights([100, 25]) == pytest.approx((125 / 150, 250 / 150), abs=1e-4)
        assert balanced_weights([7, 7, 0]) == (1.0, 1.0, 1.0)
        assert balanced_weights([10**6, 1])[1] == 10.0
        assert balanced_weights([]) == () and balanced_weights([0]) == (1.0,)

    def test_file(self, tmp_path: Path) -> None:
        path = tmp_path / "weights.json"
        for content, message in (
            ({"green": 2}, "weights.json: green: no such class; the data has red, blue"),
            ({"red": 0}, "weights.json: red: expected a weight above 0, got 0"),
            ([1, 2], "weights.json: expected a JSON object of weights by class name, got list"),
        ):
            path.write_text(json.dumps(content))
            with pytest.raises(DataError, match=message):
                read_weights(path, ("red", "blue"))
        path.write_text('{"blue": 3}')
        assert read_weights(path, ("red", "blue")) == (1.0, 3.0)

    def test_option_becomes_a_field_of_the_configuration(self, data: DetectionDataset) -> None:
        arguments = "train --train a --val a --output b --class-weights auto --lr auto --patience 3".split()
        args = build_parser().parse_args(arguments)
        config = build_config(args, data, {}, None)
        counts = [sum(box.label == label for box in data.boxes) for label in (0, 1)]
        assert config.class_weights == balanced_weights(counts)
        options = build_options(args, {})
        assert options.lr is None and options.learning_rate == 0.00125 and options.patience == 3

    def test_only_the_foreground_of_a_class_is_weighted(self, data: DetectionDataset) -> None:
        losses = {}
        for weights in ((), (1.0, 1.0), (1.0, 5.0), (4.0, 5.0)):
            torch.manual_seed(0)
            model = RetinaNet(tiny_config(**SMALLEST, class_weights=weights))
            images, targets = zip(*samples_of(data), strict=True)
            only_red = [{**t, "labels": torch.zeros_like(t["labels"])} for t in targets]
            losses[weights] = [
                model([image / 255 for image in images], chosen)["classification"].item()
                for chosen in (only_red, targets)
            ]
        assert losses[(1.0, 1.0)] == losses[()]
        assert losses[(1.0, 5.0)][0] == losses[()][0] and losses[(1.0, 5.0)][1] > losses[()][1]
        # The loss is linear in the weights of the foreground.
        assert losses[(4.0, 5.0)][0] > losses[()][0]

    def test_wrong_number_of_weights(self) -> None:
        with pytest.raises(ValueError, match="class_weights: expected 2 numbers above 0, one per class, got"):
            tiny_config(class_weights=(1.0,))


def test_early_stopping_and_training_on(
    data: DetectionDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    values = iter([0.0, 0.0, 0.0, 0.5, 0.4, 0.5, 0.3, 0.2, 0.1])
    original = run.evaluate_detections

    def scripted(*args: Any) -> EvaluationResult:
        result = original(*args)
        return dataclasses.replace(result, stats={**result.stats, "AP": next(values)})

    monkeypatch.setattr(run, "evaluate_detections", scripted)
    options = dataclasses.replace(OPTIONS, epochs=9, patience=2, batch_size=3, schedule="constant")
    torch.manual_seed(0)
    result = train(RetinaNet(tiny_config(**SMALLEST)), data, data, options, tmp_path)
    # A number that has never risen above 0 does not count: training has not begun to succeed.
    assert (result.epochs, result.best, result.best_epoch) == (6, 0.5, 4)
    assert "stopped after epoch 6 of 9, because AP has not risen in 2 evaluations" in capsys.readouterr().err
    longer = dataclasses.replace(options, patience=3)
    result = train(RetinaNet(tiny_config(**SMALLEST)), data, data, longer, tmp_path, resume=True, progress=None)
    assert result.epochs == 7


def test_a_step_draws_one_of_several_sizes(data: DetectionDataset) -> None:
    model = RetinaNet(tiny_config(**SMALLEST, min_size=(48, 64, 96)))
    learners = [Learner(model, dataclasses.replace(OPTIONS, seed=seed), 100) for seed in (0, 0, 1)]
    drawn = []
    for learner in learners:
        drawn.append([])
        for step in range(20):
            learner.schedule.last_epoch = step
            plan = learner.plan(samples_of(data))
            assert plan.size == (-(-plan.min_size // 32) * 32,) * 2
            drawn[-1].append(plan.min_size)
    assert drawn[0] == drawn[1] != drawn[2]
    assert set(drawn[0]) == {48, 64, 96}


@pytest.mark.parametrize(
    ("error", "accumulate", "remedy"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), 1, "; --accumulate 2 computes"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), 2, "; a smaller"),
        (MemoryError(), 1, "; --accumulate 2 computes"),
    ],
)
def test_advice_about_memory(
    data: DetectionDataset, monkeypatch: pytest.MonkeyPatch, error: Exception, accumulate: int, remedy: str
) -> None:
    model = RetinaNet(tiny_config(**SMALLEST))

    def full(*args: Any) -> None:
        raise error

    monkeypatch.setattr(model, "image_losses", full)
    learner = Learner(model, dataclasses.replace(OPTIONS, accumulate=accumulate), 1)
    with pytest.raises(UsageError, match=rf"step: {2 // accumulate} images of 64 x 64 pixels at a time{remedy}"):
        learner.step(samples_of(data)[:2])
    monkeypatch.setattr(model, "image_losses", lambda *args: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        learner.step(samples_of(data)[:2])


def test_advice_stays_within_what_can_be_split(data: DetectionDataset) -> None:
    learner = Learner(RetinaNet(tiny_config(**SMALLEST)), dataclasses.replace(OPTIONS, batch_size=7, accumulate=2), 1)
    plan = StepPlan(7, 2, 64, (64, 64), False)
    learner.engine.processes = 2
    # A share of 4 images in 3 parts, the most that batch_size allows, has a part of 2 images as well.
    assert "2 images of 64 x 64 pixels at a time; a smaller" in learner._memory_advice(plan, 4)
    assert "; --accumulate 3 computes fewer at a time;" in learner._memory_advice(plan, 3)
    assert "1 images" in learner._memory_advice(plan, 0)
    learner.model.eval()  # batch normalisation is trained no more
    assert "; --accumulate 3 computes fewer at a time with the same result;" in learner._memory_advice(plan, 3)


def test_a_scale_that_does_not_help_is_a_divergence(data: DetectionDataset) -> None:
    learner = Learner(RetinaNet(tiny_config(**SMALLEST)), OPTIONS, 10)
    learner.scaler = torch.amp.GradScaler("cpu", init_scale=4 * _LEAST_SCALE)
    learner.trained[0].register_hook(lambda gradient: gradient * torch.nan)
    before = [p.detach().clone() for p in learner.trained]
    norms = [learner.step(samples_of(data)[:2])[2].item() for _ in range(4)]
    assert norms[:3] == [0.0, 0.0, 0.0] and math.isnan(norms[3])
    assert all(torch.equal(p, old) for p, old in zip(learner.trained, before, strict=True))


def test_times_belong_to_their_lines() -> None:
    progress, collector = Progress(), Collector()
    names = ("classification", "bbox_regression")
    log = LossLog(None, names, progress, 2, read_every=4, state_path=Path("last.pt"), loggers=Loggers([collector]))
    for step, seconds in enumerate([(1.0, 10.0), (3.0, 30.0), (5.0, 50.0), (7.0, 70.0)], start=1):
        assert not collector.lines
        log.add(torch.ones(3), step=step, lr=0.1, image_ids=[], seconds=seconds)
    assert [line["step"] for line in collector.lines] == [2, 4]
    assert [line["data_seconds"] for line in collector.lines] == [2.0, 6.0]
    assert [line["step_seconds"] for line in collector.lines] == pytest.approx([20.0, 60.0], abs=0.5)


def test_batch_norm_of_one_tiny_image(data: DetectionDataset, tmp_path: Path) -> None:
    # The last step of the epoch has one image of 32 pixels, of which the backbone's last map has one pixel.
    options = dataclasses.replace(OPTIONS, transform=TrainTransform(crop=32, min_visible=0.0))
    train(RetinaNet(tiny_config()), data, None, options, tmp_path, progress=None)
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2, 2]


class Broken:
    def on_step(self, line: dict[str, Any]) -> None:
        raise ConnectionError("no route to host")


class Collector:
    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def on_step(self, line: dict[str, Any]) -> None:
        self.lines.append(line)

    on_epoch = on_step

    def close(self) -> None:
        self.lines.append({"kind": "closed"})


def test_loggers(data: DetectionDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    torch.manual_seed(0)
    collector, options = Collector(), dataclasses.replace(OPTIONS, log="tensorboard")
    loggers = [Broken(), collector]
    train(RetinaNet(tiny_config(**SMALLEST)), data, data, options, tmp_path, progress=None, loggers=loggers)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert collector.lines == [*lines, {"kind": "closed"}]
    for line in lines:
        assert 0 <= line["data_seconds"] < 10 and 0 < line["step_seconds"] < 10
    error = capsys.readouterr().err
    assert error.count("Broken.on_step failed, so this logger gets nothing more: ConnectionError: no route") == 1
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("step/loss")] == [1, 2]
    assert events.Scalars("epoch/AP50")[0].value == pytest.approx(lines[-1]["AP50"])


def test_a_logger_needs_no_method() -> None:
    Loggers([object()]).record({"kind": "step"})
