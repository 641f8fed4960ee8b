"""Options, learning rates, parameter groups, and the order and augmentation of batches."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from synthetic import rectangles, tiny_config

from retinanet.common.devices import resolve_device
from retinanet.common.errors import DataError
from retinanet.data import DetectionDataset, TrainTransform
from retinanet.model.network import RetinaNet
from retinanet.training.batches import AugmentedImages, EpochBatches, SamplePreparation, generator_for, loader_of
from retinanet.training.engine import Engine
from retinanet.training.optimizer import build_optimizer, lr_factor
from retinanet.training.options import TrainOptions

TRANSFORM = TrainTransform(crop=64, scale=(0.8, 1.25), brightness=0.2)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DetectionDataset:
    return rectangles(tmp_path_factory.mktemp("recipe"), 5, size=80)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs: expected an integer of at least 1, got 0"),
        ({"batch_size": 1.5}, "batch_size: expected an integer of at least 1"),
        ({"lr": 0.0}, "lr: expected a number above 0"),
        ({"clip_norm": math.nan}, "clip_norm: expected a number above 0"),
        ({"momentum": 1.5}, "momentum: expected a number in 0..1"),
        ({"optimizer": "lbfgs"}, "optimizer: expected one of sgd, adamw, got 'lbfgs'"),
        ({"schedule": "step"}, "schedule: expected one of"),
        ({"precision": "fp8"}, "precision: expected one of fp32, bf16, fp16"),
        ({"best_metric": "mAP"}, "best_metric: expected one of AP, AP50"),
        ({"milestones": (8, 11)}, "milestones: expected fractions of the run"),
    ],
)
def test_wrong_options_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainOptions(**changes)


def test_wrong_device() -> None:
    assert resolve_device("cpu").type == "cpu"
    with pytest.raises(ValueError, match="device: expected auto, cpu, cuda or cuda:N, got 'gpu'"):
        resolve_device("gpu")
    with pytest.raises(ValueError, match="device: expected one of .* CUDA devices, got 'cuda:99'"):
        resolve_device("cuda:99")


def test_learning_rate_schedules() -> None:
    options = TrainOptions(warmup_steps=100, warmup_factor=0.1, schedule="multistep", milestones=(0.5, 0.75))
    factors = [lr_factor(step, 2000, options) for step in range(2000)]
    assert factors[0] == pytest.approx(0.1) and factors[50] == pytest.approx(0.55)
    assert set(factors[100:1000]) == {1.0}
    assert factors[1000] == pytest.approx(0.1) and factors[1499] == pytest.approx(0.1)
    assert factors[1500] == pytest.approx(0.01)
    cosine = dataclasses.replace(options, schedule="cosine")
    assert lr_factor(100, 2000, cosine) == pytest.approx(1.0)
    assert lr_factor(1050, 2000, cosine) == pytest.approx(0.5)
    assert 0 < lr_factor(1999, 2000, cosine) < 1e-5
    # Warm-up is at most a tenth of a short run.
    assert lr_factor(10, 100, cosine) == pytest.approx(1.0)
    assert lr_factor(99, 100, dataclasses.replace(options, schedule="constant")) == 1.0


def test_automatic_learning_rate() -> None:
    assert TrainOptions(batch_size=16).learning_rate == pytest.approx(0.01)
    assert TrainOptions(batch_size=2).learning_rate == pytest.approx(0.00125)
    assert TrainOptions(optimizer="adamw").learning_rate == pytest.approx(1e-4)


def test_parameter_groups() -> None:
    model = RetinaNet(tiny_config(trainable_backbone_layers=2))
    options = TrainOptions(lr=0.1, backbone_lr_factor=0.5, weight_decay=0.01, norm_weight_decay=0.0)
    optimizer = build_optimizer(model, options)
    settings = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    names = {name: settings.get(id(p)) for name, p in model.named_parameters()}
    assert names["backbone.body.layer2.0.conv1.weight"] is None
    assert names["backbone.body.layer3.0.conv1.weight"] == (0.05, 0.01)
    assert names["backbone.body.layer3.0.bn1.weight"] == (0.05, 0.0)
    assert names["backbone.fpn.inner_blocks.0.0.weight"] == (0.1, 0.01)
    assert names["head.classification_head.conv.0.1.weight"] == (0.1, 0.0)
    assert names["head.regression_head.bbox_reg.bias"] == (0.1, 0.0)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(settings) == len(trained) == sum(len(g["params"]) for g in optimizer.param_groups)


def test_batches_of_a_run() -> None:
    batches = EpochBatches(5, 2, epochs=3, seed=4)
    full = list(batches)
    assert len(full) == len(batches) == 9
    for epoch in range(3):
        part = full[3 * epoch : 3 * epoch + 3]
        assert [len(batch) for batch in part] == [2, 2, 1]
        assert sorted(index for batch in part for _, index in batch) == [0, 1, 2, 3, 4]
        assert {e for batch in part for e, _ in batch} == {epoch}
    orders = [[index for batch in full[i : i + 3] for _, index in batch] for i in (0, 3, 6)]
    assert len({tuple(order) for order in orders}) > 1
    assert list(EpochBatches(5, 2, epochs=3, seed=4, epoch=1, step=2)) == full[5:]
    assert list(EpochBatches(5, 2, epochs=3, seed=5)) != full
    # Every image of a batch belongs to one process; a process may get none of the last batch.
    shares = [list(EpochBatches(5, 2, epochs=3, seed=4, rank=rank, processes=2)) for rank in (0, 1)]
    assert [one + two for one, two in zip(*shares, strict=True)] == full and shares[1][2] == []


def augmented(data: DetectionDataset, transform: TrainTransform, num_classes: int = 2) -> AugmentedImages:
    return AugmentedImages(data, SamplePreparation(data, TrainOptions(transform=transform), num_classes))


def test_augmentation_differs_between_epochs_and_images(data: DetectionDataset) -> None:
    images = augmented(data, TRANSFORM)
    assert torch.equal(images[0, 1][0], images[0, 1][0])
    assert not torch.equal(images[0, 1][0], images[1, 1][0])
    draws = [torch.rand(1, generator=generator_for(0, *path)).item() for path in ((0,), (0, 0), (0, 1), (1, 0), (1,))]
    assert len(set(draws)) == len(draws)


def test_loader_leaves_the_global_generator_alone(data: DetectionDataset) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    images = augmented(data, TRANSFORM)
    batches = EpochBatches(5, 2, epochs=1, seed=0)
    assert len(list(loader_of(images, TrainOptions(), Engine(torch.device("cpu")), batch_sampler=batches))) == 3
    assert torch.equal(torch.get_rng_state(), before)


def test_malformed_targets_name_the_data_set_and_image(data: DetectionDataset) -> None:
    images = augmented(data, TrainTransform(), num_classes=1)
    bad = next(i for i in range(len(data)) if (data.load(i)[1]["labels"] == 1).any())
    with pytest.raises(
        DataError, match=rf"annotations.json: image {data.image_ids[bad]}: .* expected class ids in 0..0"
    ):
        images[0, bad]
