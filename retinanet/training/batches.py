"""The stream of training batches: order and augmentation depend on seed, epoch and image alone.

So a run that stops anywhere goes on with the very batches it would have had, with any number of worker
processes.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from retinanet.common.errors import DataError
from retinanet.data import DetectionDataset, TrainTransform
from retinanet.model.targets import check_targets

Sample = tuple[Tensor, dict[str, Any]]


def generator_for(seed: int, *path: int) -> torch.Generator:
    """A CPU generator whose stream is decided by the seed and the path, such as (epoch, index)."""
    state = np.random.SeedSequence(seed, spawn_key=path).generate_state(1, np.uint64)
    # manual_seed takes 63 bits without a sign.
    return torch.Generator().manual_seed(int(state[0]) >> 1)


class EpochBatches(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, image index) from a point in the run to its end; an epoch's last may be smaller.

    Args:
        num_images: Size of the data set.
        batch_size: Images in a batch.
        epochs: Epochs of the whole run.
        seed: Decides the order of the images, anew for each epoch.
        epoch: Epoch to start in.
        step: Batches of that epoch to leave out.
    """

    def __init__(
        self, num_images: int, batch_size: int, epochs: int, seed: int, *, epoch: int = 0, step: int = 0
    ) -> None:
        """Keeps where to start; batches are made as they are asked for."""
        self.num_images = num_images
        self.batch_size = batch_size
        self.epochs = epochs
        self.seed = seed
        self.epoch = epoch
        self.step = step

    @property
    def steps_per_epoch(self) -> int:
        """Batches in an epoch."""
        return -(-self.num_images // self.batch_size)

    def __len__(self) -> int:
        return (self.epochs - self.epoch) * self.steps_per_epoch - self.step

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for epoch in range(self.epoch, self.epochs):
            order = torch.randperm(self.num_images, generator=generator_for(self.seed, epoch)).tolist()
            first = self.step if epoch == self.epoch else 0
            for start in range(first * self.batch_size, self.num_images, self.batch_size):
                yield [(epoch, index) for index in order[start : start + self.batch_size]]


class AugmentedImages(Dataset[Sample]):
    """Images as they are shown in an epoch; the key is (epoch, image index)."""

    def __init__(self, dataset: DetectionDataset, transform: TrainTransform, seed: int, num_classes: int) -> None:
        """Keeps what an epoch is made of."""
        self.dataset = dataset
        self.transform = transform
        self.seed = seed
        self.num_classes = num_classes

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, index = key
        image, target = self.dataset.load(index)
        image, target = self.transform(image, target, generator_for(self.seed, epoch, index))
        try:
            check_targets([target], 1, self.num_classes)
        except ValueError as error:
            raise DataError(f"{self.dataset.source}: image {target['image_id']}: {error}") from error
        return image, target


def batch_loader(images: AugmentedImages, batches: EpochBatches, workers: int, pin_memory: bool) -> DataLoader[Any]:
    """Loads the batches of a run, as lists of samples, across its epochs."""
    return DataLoader(
        images,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=list,
        pin_memory=pin_memory,
        worker_init_fn=_ignore_interrupts,
        # Without a generator of its own the loader draws from the global one, which a continued run must not
        # do again.
        generator=torch.Generator(),
    )


def _ignore_interrupts(worker: int) -> None:
    # Ctrl-C reaches the whole process group; the training process decides what happens, and ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
