"""The training loop, from files to the optimizer's step: ours and the loop of torchvision's reference scripts.

Both train the same network with the same weights on the same JPEG files, without augmentation, in one process. The loop
of the reference reads with `CocoDetection`, moves a batch to the device, reads the loss on the host in every step and
keeps the times of waiting for data and of a step. Ours does all of that (on a GPU it reads the losses in groups), and
clips the gradients. The learning rate is so small that the weights stay as they are, so that every epoch can be
compared with the first.

A row is an epoch of 8 images in batches of 2. Its `data_seconds` and `step_seconds` in the JSON are the mean times of a
step in its last epoch: waiting for images, and the rest. The groups "data alone" read and transform the same batches
without a model.
"""

from __future__ import annotations

import functools
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from harness import one_thread
from torch import Tensor, nn

torchvision = pytest.importorskip("torchvision")

from torch.utils.data import BatchSampler, DataLoader, SequentialSampler  # noqa: E402
from torchvision.datasets import CocoDetection, wrap_dataset_for_transforms_v2  # noqa: E402
from torchvision.io import write_jpeg  # noqa: E402
from torchvision.models.detection import RetinaNet as TorchvisionRetinaNet  # noqa: E402
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone  # noqa: E402
from torchvision.ops.feature_pyramid_network import LastLevelP6P7  # noqa: E402
from torchvision.transforms import v2  # noqa: E402

from retinanet.data import DetectionDataset, TrainTransform, open_dataset  # noqa: E402
from retinanet.model.config import RetinaNetConfig  # noqa: E402
from retinanet.model.network import RetinaNet  # noqa: E402
from retinanet.training.batches import AugmentedImages, Sample, SamplePreparation, loader_of  # noqa: E402
from retinanet.training.engine import Engine  # noqa: E402
from retinanet.training.interrupts import Interrupts  # noqa: E402
from retinanet.training.learner import Learner  # noqa: E402
from retinanet.training.loop import train_epoch  # noqa: E402
from retinanet.training.loss_log import LossLog  # noqa: E402
from retinanet.training.options import TrainOptions  # noqa: E402
from retinanet.training.progress import Progress  # noqa: E402

IMAGES, BATCH, OBJECTS = 8, 2, 50
FILE_SIZE, SIZE = (480, 640), 256  # of the files, and of the shorter side in the network
LR = 1e-12
OPTIONS = TrainOptions(
    epochs=1,
    batch_size=BATCH,
    lr=LR,
    log_every=0,
    schedule="constant",
    transform=TrainTransform(horizontal_flip=0.0),
)
BATCHES = [[(0, index) for index in range(start, start + BATCH)] for start in range(0, IMAGES, BATCH)]


class Setting(NamedTuple):
    """The files, and both models with the same weights."""

    files: DetectionDataset
    ours: RetinaNet
    theirs: nn.Module
    device: torch.device


@functools.cache
def setting(device: torch.device) -> Setting:
    """Write the files and make both models."""
    torch.manual_seed(0)
    folder = Path(tempfile.mkdtemp(prefix="train_loop_"))
    height, width = FILE_SIZE
    content: dict[str, Any] = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}]}
    for number in range(IMAGES):
        coarse = torch.rand(1, 3, height // 8, width // 8)
        picture = nn.functional.interpolate(coarse, size=FILE_SIZE, mode="bilinear")[0]
        write_jpeg((255 * picture).byte(), str(folder / f"{number}.jpg"))
        content["images"].append({"id": number, "file_name": f"{number}.jpg", "width": width, "height": height})
        for _ in range(OBJECTS):
            side = (8 + 150 * torch.rand(2)).round().tolist()
            corner = [
                int(torch.randint(0, int(limit - s), (1,))) for limit, s in zip((width, height), side, strict=True)
            ]
            content["annotations"].append(
                {
                    "id": len(content["annotations"]) + 1,
                    "image_id": number,
                    "category_id": 1,
                    "bbox": [*corner, *side],
                    "area": side[0] * side[1],
                    "iscrowd": 0,
                }
            )
    (folder / "annotations.json").write_text(json.dumps(content))
    # The files are read in every epoch, as they are for a data set that is larger than memory.
    files = open_dataset(folder / "annotations.json", cache_bytes=0)
    backbone = resnet_fpn_backbone(
        backbone_name="resnet18",
        weights=None,
        norm_layer=nn.BatchNorm2d,
        trainable_layers=5,
        returned_layers=[2, 3, 4],
        extra_blocks=LastLevelP6P7(256, 256),
    )
    sizes = {"min_size": SIZE, "max_size": 1333}
    # CocoDetection's labels are the category ids, so torchvision's model has a class 0 that does not occur.
    theirs = TorchvisionRetinaNet(backbone, 2, **sizes).to(device)
    config = RetinaNetConfig(
        class_names=("none", "a"),
        backbone="resnet18",
        backbone_norm="batch",
        trainable_backbone_layers=None,
        min_size=(SIZE,),
    )
    ours = RetinaNet(config).to(device)
    ours.load_state_dict(theirs.state_dict())
    return Setting(files, ours, theirs, device)


class OneClassMore(AugmentedImages):
    """Our data with torchvision's labels, which are the category ids."""

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        image, target = super().__getitem__(key)
        return image, {**target, "labels": target["labels"] + 1}


def our_batches(made: Setting) -> Iterator[list[Sample]]:
    prepare = SamplePreparation(made.files, OPTIONS, 2)
    return iter(loader_of(OneClassMore(made.files, prepare), OPTIONS, Engine(made.device), batch_sampler=BATCHES))


def our_epoch(made: Setting, times: dict[str, float]) -> Callable[[], Tensor]:
    learner = Learner(made.ours, OPTIONS, 1000, Engine(made.device))
    read_every = 1 if made.device.type == "cpu" else 20

    def epoch() -> Tensor:
        progress = Progress()
        log = LossLog(None, progress, 0, read_every, Path("last.pt"))
        train_epoch(learner, our_batches(made), len(BATCHES), progress, log, Interrupts(), lambda: None)
        times["data_seconds"], times["step_seconds"] = progress.step_times
        return torch.tensor(progress.epoch_sums[:2]) / len(BATCHES)

    return epoch


def their_loader(made: Setting) -> DataLoader[Any]:
    transforms = v2.Compose([v2.PILToTensor(), v2.ToDtype(torch.float, scale=True), v2.ToPureTensor()])
    dataset = CocoDetection(made.files.source.parent, made.files.source, transforms=transforms)
    dataset = wrap_dataset_for_transforms_v2(dataset, target_keys=("boxes", "labels"))
    sampler = BatchSampler(SequentialSampler(dataset), BATCH, drop_last=True)
    return DataLoader(dataset, batch_sampler=sampler, collate_fn=lambda batch: tuple(zip(*batch, strict=True)))


def their_epoch(made: Setting, times: dict[str, float]) -> Callable[[], Tensor]:
    model, device, loader = made.theirs, made.device, their_loader(made)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)

    def epoch() -> Tensor:
        model.train()
        sums, waited, stepped = torch.zeros(2), 0.0, 0.0
        started = time.perf_counter()
        for images, targets in loader:
            loaded = time.perf_counter()
            waited += loaded - started
            images = [image.to(device) for image in images]
            targets = [{name: value.to(device) for name, value in target.items()} for target in targets]
            losses = model(images, targets)
            total = sum(losses.values())
            assert math.isfinite(total.item())
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            schedule.step()
            sums += torch.stack([loss.detach() for loss in losses.values()]).cpu()
            started = time.perf_counter()
            stepped += started - loaded
        times["data_seconds"], times["step_seconds"] = waited / len(loader), stepped / len(loader)
        return sums / len(loader)

    return epoch


EPOCHS = {"ours": our_epoch, "torchvision": their_epoch}


@pytest.fixture(autouse=True)
def _one_thread(device: torch.device) -> Iterator[None]:
    with one_thread(device.type == "cpu"):
        yield


@pytest.mark.full
@pytest.mark.parametrize("row", EPOCHS)
def test_training_loop(compare, benchmark, device, row):
    made = setting(device)
    times: dict[str, float] = {}
    compare(
        row,
        EPOCHS[row](made, times),
        their_epoch(made, {})(),
        check=lambda actual, expected: torch.testing.assert_close(actual, expected, rtol=1e-3, atol=0),
        group=f"training loop, resnet18, {IMAGES} JPEG files of 640 x 480 at {SIZE} pixels, one thread",
        rival=their_epoch(made, {}) if row == "ours" else None,
    )
    benchmark.extra_info.update(times)


@pytest.mark.parametrize("row", EPOCHS)
def test_data_alone(compare, device, row):
    made = setting(device)

    def read_of(row: str) -> Callable[[], list[Any]]:
        if row == "ours":
            return lambda: [sample for batch in our_batches(made) for sample in batch]
        loader = their_loader(made)
        return lambda: [sample for batch in loader for sample in zip(*batch, strict=True)]

    def check(actual: list[Any], expected: list[Any]) -> None:
        for (image, target), (other, truth) in zip(actual, expected, strict=True):
            image = image / 255 if image.dtype == torch.uint8 else image
            torch.testing.assert_close(image, other)
            torch.testing.assert_close(target["boxes"], truth["boxes"].float())
            assert torch.equal(target["labels"], truth["labels"])

    compare(
        row,
        read_of(row),
        read_of("torchvision")(),
        check=check,
        group=f"data alone, {IMAGES} JPEG files of 640 x 480",
        rival=read_of("torchvision") if row == "ours" else None,
    )
