"""A recipe, a small model, and ways to stop and to compare the runs that the tests of training share."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from synthetic import CATEGORY_IDS, CLASS_NAMES, tiny_config

from retinanet.checkpoints.model_file import load_state
from retinanet.data import TrainTransform
from retinanet.model.architectures import build_model
from retinanet.model.detector import Detector
from retinanet.model.detector_config import CONFIG_CLASSES
from retinanet.model.network import RetinaNet
from retinanet.training.options import TrainOptions

TRANSFORM = TrainTransform(crop=64, scale=(0.8, 1.25), brightness=0.2)
OPTIONS = TrainOptions(
    epochs=3, batch_size=2, optimizer="adamw", lr=1e-3, log_every=2, device="cpu", transform=TRANSFORM
)
STEPS_PER_EPOCH = 3

SMALL_PYRAMID = {"backbone": "mobilenet_v3_small", "fpn_channels": 32, "min_size": None, "fpn_levels": (3, 4, 5)}
SMALL_PYRAMID |= {"backbone_norm": "batch", "trainable_backbone_layers": None}
#: Fields of small models, by architecture.
SMALL_FIELDS = {
    "ssd": {"network": "ssdlite320"},
    "fcos": {**SMALL_PYRAMID, "head_depth": 1},
    "fasterrcnn": {
        **SMALL_PYRAMID,
        "anchor_sizes": (16, 24, 40),
        "representation_size": 32,
        "proposals_training": 100,
        "roi_batch_size": 32,
    },
}


def new_model(**changes: object) -> RetinaNet:
    torch.manual_seed(7)
    # With several sizes, each step draws one.
    # The backbone is the one with the fewest weights, because most of these tests save and compare all of them.
    return RetinaNet(tiny_config(**{"min_size": (56, 64, 72), "backbone": "mobilenet_v3_small", **changes}))


def small_model(architecture: str, **fields: object) -> Detector:
    torch.manual_seed(7)
    names = {"class_names": CLASS_NAMES, "category_ids": CATEGORY_IDS}
    return build_model(CONFIG_CLASSES[architecture](**{**names, **SMALL_FIELDS[architecture], **fields}))


class Stop:
    """A progress bar that calls an action after a number of steps, counted over the whole run."""

    def __init__(self, at: int, action: Callable[[], None]) -> None:
        self.at = at
        self.action = action

    def __call__(self, *, total: int, initial: int, **_: Any) -> Stop:
        self.total, self.step = total, initial
        return self

    def update(self) -> None:
        self.step += 1
        if self.step == self.at:
            self.action()

    def set_postfix_str(self, *_: Any, **__: Any) -> None:
        pass

    def write(self, *_: Any, **__: Any) -> None:
        pass

    def close(self) -> None:
        pass


def interrupt() -> None:
    raise KeyboardInterrupt


def crash() -> None:
    raise RuntimeError("crash")


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl without the fields that depend on the clock."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if "second" not in k} for line in lines]


def assert_same_run(got: Path, expected: Path) -> None:
    one, two = load_state(got / "last.pt"), load_state(expected / "last.pt")
    assert one["model"].keys() == two["model"].keys()
    for name, value in two["model"].items():
        assert torch.equal(one["model"][name], value), name
    for index, state in two["optimizer"]["state"].items():
        for name, value in state.items():
            assert torch.equal(torch.as_tensor(one["optimizer"]["state"][index][name]), torch.as_tensor(value))
    assert torch.equal(one["rng"], two["rng"])
    assert metrics(got) == metrics(expected)
    for name in ("best.safetensors", "last.safetensors"):
        assert (got / name).read_bytes() == (expected / name).read_bytes()


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread, because more would make tiny networks slower and their sums differ."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
