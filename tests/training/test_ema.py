"""The moving average of the weights: its values, and the exact resumption of a run that keeps one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from synthetic import rectangles, tiny_config
from torch import nn

from retinanet.checkpoints.model_file import load_model, load_state
from retinanet.data import TrainTransform
from retinanet.model.network import RetinaNet
from retinanet.training.ema import WeightAverage
from retinanet.training.learner import Learner
from retinanet.training.options import TrainOptions
from retinanet.training.run import train


def test_average_follows_its_definition() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    average = WeightAverage(model, decay=0.5)
    expected = model[0].weight.detach().clone()
    # The decay is (1 + t) / (10 + t) in the first steps, and later the given decay.
    for step, decay in ((1, 2 / 11), (2, 3 / 12), (100, 0.5)):
        with torch.no_grad():
            model[0].weight.normal_()
            model[1].num_batches_tracked += 1
        average.update(model, step)
        expected = decay * expected + (1 - decay) * model[0].weight.detach()
    torch.testing.assert_close(average.model[0].weight, expected)
    assert average.model[1].num_batches_tracked == model[1].num_batches_tracked == 3
    assert not any(p.requires_grad for p in average.model.parameters()) and not average.model.training


def test_a_run_saves_the_average_and_resumes_it(tmp_path: Path) -> None:
    data = rectangles(tmp_path / "data", 4, size=64)
    transform = TrainTransform(crop=64)
    options = TrainOptions(
        epochs=2, batch_size=2, optimizer="adamw", lr=1e-2, ema_decay=0.9, device="cpu", transform=transform
    )

    def new_model() -> RetinaNet:
        torch.manual_seed(3)
        return RetinaNet(tiny_config())

    class StopAtThirdStep:
        def __init__(self, **_: object) -> None:
            self.step = 0

        def update(self) -> None:
            self.step += 1
            if self.step == 3:
                raise KeyboardInterrupt

        def set_postfix_str(self, *_: object, **__: object) -> None:
            pass

        def write(self, *_: object, **__: object) -> None:
            pass

        def close(self) -> None:
            pass

    train(new_model(), data, None, options, tmp_path / "whole", progress=None)
    with pytest.raises(KeyboardInterrupt):
        train(new_model(), data, None, options, tmp_path / "parts", progress=StopAtThirdStep)
    train(new_model(), data, None, options, tmp_path / "parts", resume=True, progress=None)

    whole, parts = (load_state(tmp_path / run / "last.pt") for run in ("whole", "parts"))
    saved = load_model(tmp_path / "whole" / "last.safetensors").state_dict()
    assert any(not torch.equal(whole["average"][name], whole["model"][name]) for name in whole["model"])
    for name, value in whole["average"].items():
        assert torch.equal(parts["average"][name], value) and torch.equal(saved[name], value)


def test_the_state_of_a_compiled_model_continues_in_one_that_is_not() -> None:
    options = TrainOptions(batch_size=2, ema_decay=0.9, device="cpu")
    models = [RetinaNet(tiny_config()), RetinaNet(tiny_config())]
    models[0].backbone = torch.compile(models[0].backbone)
    compiled, plain = (Learner(model, options, 1) for model in models)
    plain.load_state(compiled.state())
    compiled.load_state(plain.state())
    states = zip(plain.model.state_dict().values(), compiled.model.state_dict().values(), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in states)
