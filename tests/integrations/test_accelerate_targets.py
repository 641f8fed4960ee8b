"""Malformed targets raise torchvision's error where torchvision has a check, and elsewhere one that names the entry."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate_cases import CLASSES, Batch, pair, plain_model, random_batch

from retinanet_ops.integrations.torchvision import accelerate

Change = Callable[[list[dict[str, Any]]], Any]


def with_entry(index: int, **entries: Any) -> Change:
    """Return a function that replaces entries of one target; None removes an entry."""

    def change(targets: list[dict[str, Any]]) -> list[dict[str, Any]]:
        target = {**targets[index], **entries}
        targets[index] = {key: value for key, value in target.items() if value is not None}
        return targets

    return change


def batch_with(change: Change) -> Batch:
    images, targets = random_batch()  # 5, 0 and 30 boxes
    return images, change(targets)


def error_of(model: Any, batch: Batch) -> Exception:
    with pytest.raises(Exception) as caught:
        model(*batch)
    return caught.value


FLAT = torch.tensor([[1.0, 3, 1, 4]])
NO_BOXES = torch.empty(0, 4)


class TestErrorsOfTorchvision:
    CASES: dict[str, tuple[Change, str]] = {
        "none": (lambda targets: None, "targets should not be none"),
        "no tensor": (with_entry(1, boxes=[]), "Expected target boxes to be of type Tensor"),
        "shape": (with_entry(2, boxes=torch.rand(30, 3)), r"Expected target boxes to be a tensor of shape \[N, 4\]"),
        "no columns": (with_entry(1, boxes=torch.empty(0)), r"Expected target boxes to be a tensor of shape \[N, 4\]"),
        "flat": (with_entry(2, boxes=FLAT, labels=torch.tensor([1])), r"positive height and width.* at index 2"),
        "flat without labels": (with_entry(1, boxes=FLAT, labels=None), r"positive height and width.* at index 1"),
        "flat and labels": (with_entry(1, boxes=FLAT, labels=[]), r"positive height and width.* at index 1"),
        "flat, labels elsewhere": (
            lambda targets: with_entry(0, labels=None)(with_entry(2, boxes=FLAT)(targets)),
            r"positive height and width.* at index 2",
        ),
        "shape and number": (lambda targets: [{"boxes": torch.rand(1, 3)}], r"a tensor of shape \[N, 4\]"),
    }

    @pytest.mark.parametrize("name", CASES)
    def test_message_is_torchvisions(self, name: str) -> None:
        change, message = self.CASES[name]
        expected, got = (error_of(model, batch_with(change)) for model in pair(plain_model()))
        assert type(got) is type(expected) is AssertionError
        # The coordinates in the message depend on the random size of the image in the batch.
        assert str(got).split("[")[0] == str(expected).split("[")[0]
        with pytest.raises(AssertionError, match=message):
            raise got

    def test_degenerate_box_in_evaluation(self) -> None:
        batch = batch_with(with_entry(1, boxes=FLAT, labels=None))
        for model in pair(plain_model().eval()):
            with pytest.raises(AssertionError, match=r"positive height and width.* at index 1"):
                model(*batch)


class TestErrorsOfOurs:
    TRAINING: dict[str, tuple[Change, type[Exception], str]] = {
        "one dict": (
            lambda targets: targets[0],
            TypeError,
            "targets must be a list .* per image, got dict",
        ),
        "no dict": (
            lambda targets: [targets[0], None, targets[2]],
            TypeError,
            r"targets\[1\] must be a dict .*NoneType",
        ),
        "no boxes": (with_entry(1, boxes=None), ValueError, r"targets\[1\] must have an entry 'boxes', got .*'labels'"),
        "empty": (
            lambda targets: [*targets[:2], {}],
            ValueError,
            r"targets\[2\] .*'boxes', got an empty dict",
        ),
        "no labels": (
            with_entry(2, labels=None),
            ValueError,
            r"targets\[2\] must have .*'labels', got .*'boxes'",
        ),
        "no labels, no boxes": (with_entry(1, labels=None), ValueError, r"targets\[1\] must have an entry 'labels'"),
        "list": (with_entry(0, labels=[1] * 5), TypeError, r"targets\[0\]\['labels'\] must be a tensor .*, got list"),
        "floating": (
            with_entry(0, labels=torch.ones(5)),
            TypeError,
            r"targets\[0\]\['labels'\] must be a tensor of integers, got torch.float32; convert with labels.long\(\)",
        ),
        "column": (
            with_entry(0, labels=torch.ones(5, 1).long()),
            ValueError,
            r"targets\[0\]\['labels'\] must have shape \[5\], one label per box, got \[5, 1\]",
        ),
        "surplus": (
            with_entry(1, labels=torch.tensor([1])),
            ValueError,
            r"targets\[1\]\['labels'\] .* \[0\].*got \[1\]",
        ),
        "negative": (
            lambda targets: with_entry(0, labels=targets[0]["labels"].where(torch.arange(5) != 3, -1))(targets),
            ValueError,
            rf"targets\[0\]\['labels'\] must be class ids in 0..{CLASSES - 1}, got -1",
        ),
        "too large": (
            with_entry(2, labels=torch.full((30,), CLASSES)),
            ValueError,
            rf"targets\[2\]\['labels'\] must be class ids in 0..{CLASSES - 1}, got {CLASSES}",
        ),
        "not finite, no labels": (
            with_entry(0, boxes=torch.tensor([[0.0, 0, math.inf, 9]]), labels=None),
            ValueError,
            r"targets\[0\] must have an entry 'labels'",
        ),
        "more targets": (
            lambda targets: [*targets, targets[0]],
            ValueError,
            "targets must have one dict per image, got 4 targets for 3 images; pass the images and the targets of the",
        ),
        "fewer targets": (lambda targets: targets[:2], ValueError, "one dict per image, got 2 targets for 3 images"),
        "device": (
            with_entry(1, labels=torch.empty(0, dtype=torch.int64, device="meta")),
            ValueError,
            r"targets\[1\]\['labels'\] must be on the device of the image, cpu, got meta; move the targets",
        ),
    }
    EVALUATION: dict[str, tuple[Change, type[Exception], str]] = {
        "one dict": TRAINING["one dict"],
        "no boxes": TRAINING["no boxes"],
        "fewer targets": TRAINING["fewer targets"],
        "shape": (with_entry(2, boxes=torch.rand(30, 3)), ValueError, r"targets\[2\]\['boxes'\] .* got \[30, 3\]"),
        "no tensor": (with_entry(1, boxes=[]), ValueError, r"targets\[1\]\['boxes'\] must be a tensor .*, got list"),
    }

    @pytest.mark.parametrize("name", TRAINING)
    def test_malformed_targets_are_named(self, name: str) -> None:
        change, error, message = self.TRAINING[name]
        with pytest.raises(error, match=message):
            accelerate(plain_model())(*batch_with(change))

    @pytest.mark.parametrize("name", EVALUATION)
    def test_malformed_targets_are_named_in_evaluation(self, name: str) -> None:
        change, error, message = self.EVALUATION[name]
        with pytest.raises(error, match=message):
            accelerate(plain_model()).eval()(*batch_with(change))

    def test_evaluation_needs_no_labels_and_ignores_surplus_targets(self) -> None:
        images, targets = random_batch()
        accelerate(plain_model()).eval()(images, [{"boxes": t["boxes"]} for t in (*targets, targets[0])])
