"""The stream of training batches, whose order and augmentation depend only on seed, epoch and image.

A run that stops anywhere therefore continues with the batches that it would have had, for any number of workers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, get_worker_info

from retinanet.common.errors import DataError, one_line
from retinanet.common.signals import ignore_stop_signals
from retinanet.model.targets import check_images, check_targets
from retinanet.training.engine import Engine
from retinanet.training.options import TrainOptions
from retinanet.training.pipeline import Pipeline, apply_pipeline
from retinanet.training.progress import Progress

Sample = tuple[Tensor, dict[str, Any]]


def seed_for(seed: int, *path: int) -> int:
    """Return a seed below 2**63 that depends only on another seed and the path, such as (epoch, index)."""
    state = np.random.SeedSequence(seed, spawn_key=path).generate_state(1, np.uint64)
    # Drop one bit, so that the seed is not negative as a signed 64-bit integer.
    return int(state[0]) >> 1


def generator_for(seed: int, *path: int) -> torch.Generator:
    """Return a CPU generator whose stream depends only on the seed and the path, such as (epoch, index)."""
    return torch.Generator().manual_seed(seed_for(seed, *path))


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


class SamplePreparation:
    """Augmentation and check of the samples of a data set.

    Args:
        dataset: The data set, for messages.
        options: Seed and augmentation.
        num_classes: Number of classes; labels must be in 0..K-1.
        pipeline: A pipeline of torchvision.transforms.v2, which follows the augmentation of the options, or None.
    """

    def __init__(
        self, dataset: Dataset[Any], options: TrainOptions, num_classes: int, pipeline: Pipeline | None = None
    ) -> None:
        """Keep the arguments."""
        self.source = getattr(dataset, "source", type(dataset).__name__)
        self.transform = options.transform
        self.seed = options.seed
        self.num_classes = num_classes
        self.pipeline = pipeline

    def __call__(self, sample: Any, *path: int) -> Sample:
        """Return a sample, augmented by random numbers that depend only on the seed and the path, its last part.

        Raises:
            DataError: The sample is malformed. The message names the data set and the image.
        """
        where = f"{self.source}: image {path[-1]}"
        try:
            image, target = sample
            target = {"image_id": path[-1], **target}
            where = f"{self.source}: image {target['image_id']}"
            check_images([image])
            check_targets([target], 1, self.num_classes)
        except (TypeError, ValueError) as error:
            raise DataError(f"{where}: expected an image and its target: {one_line(error)}") from error
        rng = generator_for(self.seed, *path)
        image, target = self.transform(image, target, rng)
        if self.pipeline is not None:
            image, target = apply_pipeline(self.pipeline, image, target, rng)
        return image, target


class AugmentedImages(Dataset[Sample]):
    """Augmented images with their targets, by (epoch, image index).

    Reading an item raises DataError if its target is malformed. The message names the data set and the image.
    """

    def __init__(self, dataset: Dataset[Any], prepare: SamplePreparation) -> None:
        """Keep the images and their preparation."""
        self.dataset = dataset
        self.prepare = prepare

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, index = key
        return self.prepare(self.dataset[index], epoch, index)


class AugmentedStream(IterableDataset[Sample]):
    """Augmented images of one epoch of an IterableDataset, in its order."""

    def __init__(self, dataset: IterableDataset[Any], prepare: SamplePreparation, epoch: int, rank: int) -> None:
        """Keep the stream and its preparation."""
        self.dataset = dataset
        self.prepare = prepare
        self.path = (epoch, rank)

    def __iter__(self) -> Iterator[Sample]:
        info = get_worker_info()
        worker = 0 if info is None else info.id
        for index, sample in enumerate(self.dataset):
            yield self.prepare(sample, *self.path, worker, index)


def stream_batches(
    dataset: IterableDataset[Any],
    prepare: SamplePreparation,
    options: TrainOptions,
    progress: Progress,
    engine: Engine,
) -> Iterator[list[Sample]]:
    """Yield the batches of a run from an IterableDataset, from the point that the run has reached.

    The stream is read from its start in every epoch, after `set_epoch(epoch)` if it has this method. It decides itself
    which images each process and each worker of the loader gets. A stream that has ended yields empty batches.
    """
    share = len(range(engine.rank, options.batch_size, engine.processes))
    first, skipped = progress.epoch, progress.step
    for epoch in range(first, options.epochs):
        if hasattr(dataset, "set_epoch"):
            dataset.set_epoch(epoch)
        stream = AugmentedStream(dataset, prepare, epoch, engine.rank)
        batches = iter(loader_of(stream, options, engine, batch_size=share))
        for _ in range(skipped if epoch == first else 0):
            next(batches, None)
        while progress.epoch == epoch:
            yield next(batches, [])


def loader_of(images: Dataset[Sample], options: TrainOptions, engine: Engine, **batching: Any) -> DataLoader[Any]:
    """Make a loader of batches, each a list of samples.

    Args:
        images: Images that are prepared for training.
        options: The number of workers.
        engine: The device, which decides whether memory is pinned.
        **batching: `batch_sampler` or `batch_size`.
    """
    return DataLoader(
        images,
        num_workers=options.workers,
        collate_fn=list,
        pin_memory=engine.device.type == "cuda",
        worker_init_fn=ignore_stop_signals,
        # Without this generator, the loader would draw from the global one. A continued run makes a second loader, so
        # its random numbers would then differ from those of an uninterrupted run.
        generator=torch.Generator(),
        **batching,
    )
