"""Training on any Dataset or IterableDataset, and pipelines of torchvision.transforms.v2."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from synthetic import rectangles, tiny_config
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset
from torchvision.transforms import v2
from training_cases import Stop, interrupt, metrics

from retinanet.common.errors import DataError, UsageError
from retinanet.data import DetectionDataset
from retinanet.model.network import RetinaNet
from retinanet.training.batches import SamplePreparation, generator_for
from retinanet.training.loggers import Loggers
from retinanet.training.options import TrainOptions
from retinanet.training.pipeline import apply_pipeline
from retinanet.training.run import train

OPTIONS = TrainOptions(epochs=2, batch_size=2, optimizer="adamw", lr=1e-3, log_every=1, device="cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DetectionDataset:
    return rectangles(tmp_path_factory.mktemp("own"), 5, size=64)


def new_model() -> RetinaNet:
    torch.manual_seed(7)
    return RetinaNet(tiny_config(backbone="mobilenet_v3_small"))


class Own(Dataset):
    """A data set without anything but items and a length."""

    def __init__(self, data: DetectionDataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        image, target = self.data[index]
        return image.float() / 255, {"boxes": target["boxes"], "labels": target["labels"]}


class Stream(IterableDataset):
    """A stream without a length, whose order differs from epoch to epoch."""

    epoch = 0

    def __init__(self, data: DetectionDataset) -> None:
        self.data = data
        self.seen: list[int] = []

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[Any]:
        for index in range(len(self.data)):
            self.seen.append((index + self.epoch) % len(self.data))
            yield self.data[self.seen[-1]]


def test_any_dataset_gives_the_same_run(data: DetectionDataset, tmp_path: Path) -> None:
    for name, dataset in (("ours", data), ("own", Own(data))):
        train(new_model(), dataset, data, OPTIONS, tmp_path / name, progress=None)
    # Bytes and floats differ in the rounding of a division.
    for one, two in zip(*(metrics(tmp_path / name) for name in ("ours", "own")), strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-3)


def test_a_stream_is_trained_on_and_resumed(data: DetectionDataset, tmp_path: Path) -> None:
    options = dataclasses.replace(OPTIONS, steps_per_epoch=3)
    stream = Stream(data)
    train(new_model(), stream, None, options, tmp_path / "whole", progress=None)
    assert stream.seen == [0, 1, 2, 3, 4, 1, 2, 3, 4, 0]
    with pytest.raises(KeyboardInterrupt):
        train(new_model(), stream, None, options, tmp_path / "stopped", progress=Stop(4, interrupt))
    train(new_model(), stream, None, options, tmp_path / "stopped", resume=True, progress=None)
    assert metrics(tmp_path / "stopped") == metrics(tmp_path / "whole")


def test_a_stream_without_length_or_with_too_few_images(data: DetectionDataset, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="steps_per_epoch: Stream has no length, so expected the number of steps"):
        train(new_model(), Stream(data), None, OPTIONS, tmp_path / "a", progress=None)
    options = dataclasses.replace(OPTIONS, steps_per_epoch=9)
    with pytest.raises(DataError, match="ended after 3 of 9 steps of epoch 1; give the number of steps"):
        train(new_model(), Stream(data), None, options, tmp_path / "b", progress=None)


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ("text", "Own: image 3: expected an image and its target"),
        ((torch.zeros(1, 8, 8), {}), r"expected shape \[3, H, W\] with pixels in it, got \[1, 8, 8\]"),
        ((torch.zeros(3, 8, 8), {"boxes": torch.zeros(1, 4)}), "expected a tensor 'labels', got NoneType"),
        ((torch.zeros(3, 8, 8), {"boxes": torch.ones(1, 4), "labels": torch.zeros(1).long()}), "expected x1 < x2"),
    ],
)
def test_malformed_samples_are_named(data: DetectionDataset, sample: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        SamplePreparation(Own(data), OPTIONS, 2)(sample, 0, 3)


class TestPipeline:
    @staticmethod
    def target() -> dict[str, Any]:
        return {
            "boxes": torch.tensor([[2.0, 4, 10, 12], [20, 20, 30, 28]]),
            "labels": torch.tensor([1, 0]),
            "crowd_boxes": torch.tensor([[0.0, 0, 16, 16]]),
            "image_id": 8,
        }

    def test_boxes_and_crowds_follow_the_image(self) -> None:
        image = torch.zeros(3, 32, 40, dtype=torch.uint8)
        image[:, 4:12, 2:10] = 255
        flipped, target = apply_pipeline(v2.RandomHorizontalFlip(1.0), image, self.target(), generator_for(0))
        assert torch.equal(flipped, image.flip(-1)) and type(flipped) is type(target["boxes"]) is Tensor
        assert target["boxes"].tolist() == [[30, 4, 38, 12], [10, 20, 20, 28]]
        assert target["labels"].tolist() == [1, 0] and target["image_id"] == 8
        assert target["crowd_boxes"].tolist() == [[24, 0, 40, 16]]

    def test_boxes_outside_are_left_out(self) -> None:
        image = torch.zeros(3, 32, 40, dtype=torch.uint8)

        def crop(i: Tensor, t: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
            return v2.functional.crop(i, 0, 0, 16, 12), {**t, "boxes": v2.functional.crop(t["boxes"], 0, 0, 16, 12)}

        for pipeline in (crop, v2.Compose([crop, v2.SanitizeBoundingBoxes()])):
            cut, target = apply_pipeline(pipeline, image, self.target(), generator_for(0))
            assert cut.shape == (3, 16, 12)
            assert target["boxes"].tolist() == [[2, 4, 10, 12]] and target["labels"].tolist() == [1]
            assert target["crowd_boxes"].tolist() == [[0, 0, 12, 16]]

    def test_boxes_may_come_in_another_format(self) -> None:
        image = torch.zeros(3, 32, 40, dtype=torch.uint8)
        _, target = apply_pipeline(v2.ConvertBoundingBoxFormat("CXCYWH"), image, self.target(), generator_for(0))
        assert torch.equal(target["boxes"], self.target()["boxes"])
        assert torch.equal(target["crowd_boxes"], self.target()["crowd_boxes"])

    def test_random_numbers_depend_on_the_sample_alone(self) -> None:
        pipeline = v2.Compose([v2.RandomIoUCrop(), v2.ColorJitter(0.5, 0.5), v2.SanitizeBoundingBoxes()])
        image, target = torch.randint(0, 256, (3, 32, 40), dtype=torch.uint8), self.target()
        before = torch.get_rng_state()
        one, again, other = (apply_pipeline(pipeline, image, target, generator_for(0, i))[0] for i in (1, 1, 2))
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.equal(one, again) and (one.shape != other.shape or not torch.equal(one, other))

    def test_wrong_results_are_named(self) -> None:
        image = torch.zeros(3, 32, 40, dtype=torch.uint8)
        for pipeline, message in (
            (lambda i, t: i, "transform: image 8: expected the pipeline to return an image and a dict, got Image"),
            (lambda i, t: (i[:1], t), r"an image tensor \[3, H, W\], got \[1, 32, 40\]"),
            (lambda i, t: (i, {**t, "boxes": t["boxes"][:1]}), "as many labels as boxes, got 1 boxes and 3 labels"),
            (lambda i, t: (i, [t]), "a dict with `boxes` and `labels`, got list"),
            (lambda i, t: (i, {"labels": t["labels"]}), r"a dict with `boxes` and `labels`, got \['labels'\]"),
            (lambda i, t: (i, {**t, "boxes": [1, 2]}), r"`boxes` \[M, 4\] and `labels` \[M\] as tensors, got list"),
            (lambda i, t: (i.to(torch.int32), t), "uint8 or floating point, got torch.int32"),
            (lambda i, t: (i / 255 - 2.5, t), "values in 0..1, got -2.5 to -2.5; leave Normalize out"),
        ):
            with pytest.raises(DataError, match=message):
                apply_pipeline(pipeline, image, self.target(), generator_for(0))

    def test_training_with_a_pipeline(self, data: DetectionDataset, tmp_path: Path) -> None:
        pipeline = v2.Compose([v2.RandomPhotometricDistort(), v2.RandomZoomOut(), v2.SanitizeBoundingBoxes()])
        for name, workers in (("here", 0), ("worker", 1)):
            options = dataclasses.replace(OPTIONS, epochs=1, workers=workers)
            train(new_model(), data, None, options, tmp_path / name, progress=None, transform=pipeline)
        assert metrics(tmp_path / "here") == metrics(tmp_path / "worker")


class TestDocumentation:
    """The examples of docs/training.md run."""

    @staticmethod
    def blocks() -> list[str]:
        page = Path(__file__).parents[2] / "docs" / "training.md"
        if not page.exists():
            pytest.skip("the documents are only in the source tree")
        return re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)

    def test_training_in_python(self, data: DetectionDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        for name in ("train.json", "val.json"):
            content = json.loads(data.source.read_text())
            for image in content["images"]:
                image["file_name"] = str(data.source.parent / image["file_name"])
            (tmp_path / name).write_text(json.dumps(content))

        class Items(Stream):
            """A stand-in for litdata's class, whose items are dicts."""

            def __init__(self, folder: str) -> None:
                assert folder == "pictures"
                super().__init__(data)

            def __getitem__(self, index: int) -> dict[str, Any]:
                image, target = data[index]
                return {"image": image, **target}

            def __iter__(self) -> Iterator[Any]:
                return (self[index] for index in range(len(data)))

        monkeypatch.setitem(sys.modules, "litdata", SimpleNamespace(StreamingDataset=Items))
        names: dict[str, Any] = {}
        small = partial(tiny_config, backbone="mobilenet_v3_small")
        for block in self.blocks()[:3]:
            code = block.replace("RetinaNetConfig(class_names", "small(class_names").replace(
                ', backbone="resnet18"', ""
            )
            exec(code, {**names, "small": small}, names)
        for run in ("mine", "distorted", "streamed"):
            assert len([line for line in metrics(tmp_path / "runs" / run) if line["kind"] == "epoch"]) == 2

    def test_loggers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        line = {"kind": "step", "step": 3, "loss": 0.5}
        for name, block in zip(("wandb", "mlflow", "trackio"), self.blocks()[3:], strict=True):
            module = MagicMock()
            monkeypatch.setitem(sys.modules, name, module)
            names: dict[str, Any] = {}
            exec(block, names)
            logger = next(value for key, value in names.items() if key.lower() == name and isinstance(value, type))()
            loggers = Loggers([logger])
            loggers.record(line)
            loggers.record({**line, "kind": "epoch"})
            loggers.close()
            assert loggers.active == [logger] and len(module.method_calls + module.init().method_calls) >= 2
