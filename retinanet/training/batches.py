"""The stream of training batches, whose order and augmentation depend only on seed, epoch and image.

A run that stops anywhere therefore continues with the batches that it would have had, for any number of workers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from retinanet.common.errors import DataError
from retinanet.common.signals import ignore_stop_signals
from retinanet.data import DetectionDataset, TrainTransform
from retinanet.model.targets import check_targets

Sample = tuple[Tensor, dict[str, Any]]


def generator_for(seed: int, *path: int) -> torch.Generator:
    """Return a CPU generator whose stream depends only on the seed and the path, such as (epoch, index)."""
    state = np.random.SeedSequence(seed, spawn_key=path).generate_state(1, np.uint64)
    # Drop one bit, so that the seed is not negative as a signed 64-bit integer.
    return torch.Generator().manual_seed(int(state[0]) >> 1)


class EpochBatches(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, image index) from a point in the run to its end. The last batch of an epoch may be smaller.

    Args:
        num_images: Size of the data set.
        batch_size: Images in a batch.
        epochs: Number of epochs in the whole run.
        seed: Seed of the order of the images, which differs from epoch to epoch.
        epoch: Epoch to start in, counted from 0.
        step: Number of batches of that epoch to skip.
        rank: Number of a process, from 0. Only its share of every batch is returned, which may be empty.
        processes: Number of processes that share every batch.
    """

    def __init__(
        self,
        num_images: int,
        batch_size: int,
        epochs: int,
        seed: int,
        *,
        epoch: int = 0,
        step: int = 0,
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        """Keep the starting point; batches are made when they are requested."""
        self.num_images = num_images
        self.batch_size = batch_size
        self.epochs = epochs
        self.seed = seed
        self.epoch = epoch
        self.step = step
        self.rank = rank
        self.processes = processes

    @property
    def steps_per_epoch(self) -> int:
        """Number of batches in an epoch."""
        return -(-self.num_images // self.batch_size)

    def __len__(self) -> int:
        return (self.epochs - self.epoch) * self.steps_per_epoch - self.step

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for epoch in range(self.epoch, self.epochs):
            order = torch.randperm(self.num_images, generator=generator_for(self.seed, epoch)).tolist()
            first = self.step if epoch == self.epoch else 0
            for start in range(first * self.batch_size, self.num_images, self.batch_size):
                batch = order[start : start + self.batch_size]
                yield [(epoch, index) for index in batch[self.rank :: self.processes]]


class AugmentedImages(Dataset[Sample]):
    """Augmented images with their targets, by (epoch, image index).

    Reading an item raises DataError if its target is malformed. The message names the data set and the image.
    """

    def __init__(self, dataset: DetectionDataset, transform: TrainTransform, seed: int, num_classes: int) -> None:
        """Keep the images and their augmentation."""
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
    """Make a loader of the batches of a run, each a list of samples, across its epochs."""
    return DataLoader(
        images,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=list,
        pin_memory=pin_memory,
        worker_init_fn=ignore_stop_signals,
        # Without this generator, the loader would draw from the global one. A continued run makes a second loader, so
        # its random numbers would then differ from those of an uninterrupted run.
        generator=torch.Generator(),
    )
