"""How long models take to detect and to learn, and which share of it is not the network's."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median

import torch
from torch import Tensor

from retinanet.model.detector import Detector
from retinanet.model.targets import Batch

#: One measurement of each duration of each model per round. A median of five is not moved by two disturbed ones.
_ROUNDS = 5


@dataclass(frozen=True)
class Times:
    """Durations of a model, and shares of them. The shares of a two-stage detector are None.

    The second part of such a network works on proposals, so its outputs cannot be fixed to measure the rest.

    Attributes:
        detection_seconds: Seconds from an image to its detections, resizing included, for one image at a time.
        post_processing_share: Share of `detection_seconds` between the outputs of the network and the detections.
        step_seconds: Seconds per image from a batch that is prepared to the losses and the gradients of all weights.
        loss_share: Share of `step_seconds` between the outputs of the network and the losses, and back to the gradients
            of these outputs: matching and losses.
    """

    detection_seconds: float
    post_processing_share: float | None
    step_seconds: float
    loss_share: float | None

    def to_dict(self) -> dict[str, float | None]:
        """Return the fields by name."""
        return asdict(self)


def measure_in_turns(
    models: Sequence[Detector],
    dtypes: Sequence[torch.dtype | None],
    images: Sequence[Tensor],  # N tensors [3, H_i, W_i] uint8 or floating in 0..1
    targets: Sequence[dict[str, Tensor]],  # `boxes` [M_i, 4] and `labels` [M_i] of each image
) -> list[Times]:
    """Measure models on the same images, in turns, so that whatever else the machine does hits all of them alike.

    Args:
        models: The models, whose gradients and statistics of batch normalisation are changed.
        dtypes: The dtype to which autocast converts the convolutions of a step of each model, or None.
        images: The images. All of them make a batch of training, and each one a batch of detection.
        targets: Their ground truth.

    Returns:
        Medians of several rounds, in the order of the models.
    """
    stopwatches = [_Stopwatch(model, dtype, images, targets) for model, dtype in zip(models, dtypes, strict=True)]
    rounds = [[stopwatch.measure() for stopwatch in stopwatches] for _ in range(_ROUNDS + 1)]
    # The first round makes what is made once, such as the choice of algorithms.
    return [_medians(measured) for measured in zip(*rounds[1:], strict=True)]


def _medians(rounds: Sequence[dict[str, float]]) -> Times:
    medians = {name: median(values[name] for values in rounds) for name in rounds[0]}
    detection, step = medians["detection"], medians["step"]
    if "loss" not in medians:
        return Times(detection, None, step, None)
    return Times(detection, medians["post_processing"] / detection, step, medians["loss"] / step)


class _Stopwatch:
    """Measures a model."""

    def __init__(
        self,
        model: Detector,
        dtype: torch.dtype | None,
        images: Sequence[Tensor],
        targets: Sequence[dict[str, Tensor]],
    ) -> None:
        self.model = model
        self.autocast = partial(torch.autocast, model.device.type, dtype, enabled=dtype is not None)
        self.images = [image.to(model.device) for image in images]
        self.heads = getattr(model, "heads", None)
        model.eval()
        with torch.inference_mode():
            self.single = [model.prepare([image]) for image in self.images]
            if self.heads is not None:
                self.single_outputs = [self.heads(batch.pixels) for batch in self.single]
        model.train()
        self.batch = model.prepare(self.images, targets, model.device)
        if self.heads is not None:
            with self.autocast():
                outputs = self.heads(self.batch.pixels)
            self.leaves = type(outputs)(*([x.detach().requires_grad_() for x in levels] for levels in outputs))

    def measure(self) -> dict[str, float]:
        """Return seconds per image by name, those of post-processing and losses only for a one-stage detector."""
        seconds = {}
        self.model.eval()
        with torch.inference_mode():
            seconds["detection"] = self._seconds(self._detect_all)
            if self.heads is not None:
                seconds["post_processing"] = 0.0
                for batch, outputs in zip(self.single, self.single_outputs, strict=True):
                    with _fixed_outputs(self.model, outputs):
                        seconds["post_processing"] += self._seconds(partial(self._detect, batch))
        self.model.train()
        seconds["step"] = self._seconds(self._step)
        if self.heads is not None:
            with _fixed_outputs(self.model, self.leaves):
                seconds["loss"] = self._seconds(self._step)
        return {name: value / len(self.images) for name, value in seconds.items()}

    def _detect_all(self) -> None:
        for image in self.images:
            self._detect(self.model.prepare([image]))

    def _detect(self, batch: Batch) -> None:
        self.model.split(self.model.detections(batch.pixels, batch.size_tensor()), batch)

    def _step(self) -> None:
        assert self.batch.ground_truth is not None
        self.model.zero_grad()
        with self.autocast():
            losses = self.model.losses(self.batch.pixels, self.batch.ground_truth, self.batch.crowds)
        torch.stack(list(losses.values())).sum().backward()

    def _seconds(self, work: Callable[[], None]) -> float:
        self._wait()
        start = time.perf_counter()
        work()
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.model.device.type != "cpu":
            torch.accelerator.synchronize(self.model.device)


@contextmanager
def _fixed_outputs(model: Detector, outputs: object) -> Iterator[None]:
    """Let the network of a model return these outputs without computing anything."""
    model.__dict__["heads"] = lambda pixels: outputs
    try:
        yield
    finally:
        del model.__dict__["heads"]
