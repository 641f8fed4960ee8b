"""Parity with both RetinaNets of torchvision for the same weights: names, losses, gradients and detections."""

from __future__ import annotations

import copy
import re
from typing import NamedTuple

import pytest
import torch
from synthetic import random_boxes
from torch import Tensor, nn
from torchvision.models.detection import retinanet_resnet50_fpn, retinanet_resnet50_fpn_v2

from retinanet.model.config import RetinaNetConfig
from retinanet.model.heads import HeadOutputs
from retinanet.model.network import RetinaNet

NUM_CLASSES = 7
VERSIONS = {"v1": retinanet_resnet50_fpn, "v2": retinanet_resnet50_fpn_v2}
CONFIGS = {"v1": RetinaNetConfig, "v2": RetinaNetConfig.torchvision_v2}


class Pair(NamedTuple):
    theirs: nn.Module
    ours: RetinaNet


def random_images(generator: torch.Generator, count: int) -> list[Tensor]:
    sides = torch.randint(60, 160, (count, 2), generator=generator).tolist()
    return [torch.rand(3, height, width, generator=generator) for height, width in sides]


def random_targets(generator: torch.Generator, images: list[Tensor], most: int) -> list[dict[str, Tensor]]:
    counts = torch.randint(0, most + 1, (len(images),), generator=generator).tolist()
    return [
        {
            "boxes": random_boxes(count, *image.shape[-2:]),
            "labels": torch.randint(0, NUM_CLASSES, (count,), generator=generator),
        }
        for count, image in zip(counts, images, strict=True)
    ]


@pytest.fixture(scope="module", params=VERSIONS)
def pair(request: pytest.FixtureRequest) -> Pair:
    """Return two models with the same weights, many detections, and statistics of batch normalisation."""
    torch.manual_seed(0)
    size = {"min_size": 64, "max_size": 100}
    theirs = VERSIONS[request.param](weights=None, weights_backbone=None, num_classes=NUM_CLASSES, **size)
    generator = torch.Generator().manual_seed(1)
    images = random_images(generator, 3)
    with torch.no_grad():
        for module in theirs.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None  # cumulative: one pass in training mode sets the statistics
        theirs.train()(images, random_targets(generator, images, 20))
        # Initially every score is 0.01. Spread logits and deltas so that many scores pass the threshold.
        outputs = theirs.eval().head(list(theirs.backbone(torch.rand(1, 3, 96, 96)).values()))
        logits, deltas = theirs.head.classification_head.cls_logits, theirs.head.regression_head.bbox_reg
        logits.weight.div_(outputs["cls_logits"].std())
        logits.bias.fill_(-3.0)
        deltas.weight.div_(outputs["bbox_regression"].std() * 5)
    fields = {"backbone_norm": "batch", "trainable_backbone_layers": None, "min_size": (64,), "max_size": 100}
    ours = RetinaNet(CONFIGS[request.param](class_names=tuple("abcdefg"), **fields))
    ours.load_state_dict(theirs.state_dict())
    return Pair(theirs, ours)


def train_with_fixed_statistics(model: nn.Module) -> None:
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()


def test_loads_the_names_of_the_published_file() -> None:
    """In the published file of version 1, the heads are sequences of convolutions and activations."""
    theirs = retinanet_resnet50_fpn(weights=None, weights_backbone=None, num_classes=7)
    state = theirs.state_dict()
    old = {re.sub(r"(head\.conv)\.(\d)\.0\.", lambda m: f"{m[1]}.{2 * int(m[2])}.", k): v for k, v in state.items()}
    assert "head.regression_head.conv.6.bias" in old and len(old) == len(state)
    ours = RetinaNet(CONFIGS["v1"](class_names=tuple("abcdefg")))
    ours.load_state_dict(old)
    assert all(torch.equal(value, state[name]) for name, value in ours.state_dict().items())
    assert "head.regression_head.conv.6.bias" in old, "the caller's dict stays as it is"


@pytest.mark.parametrize(
    ("version", "parameters_of_91", "parameters_of_80"),
    [("v1", 34_014_999, 33_786_804), ("v2", 38_198_935, 37_970_740)],
)
def test_number_of_parameters(version: str, parameters_of_91: int, parameters_of_80: int) -> None:
    with torch.device("meta"):
        for classes, expected in ((91, parameters_of_91), (80, parameters_of_80)):
            model = RetinaNet(CONFIGS[version](class_names=tuple(map(str, range(classes)))))
            assert sum(p.numel() for p in model.parameters()) == expected


def test_state_dict(pair: Pair) -> None:
    expected, got = pair.theirs.state_dict(), pair.ours.state_dict()
    assert list(got) == list(expected)
    assert {k: v.shape for k, v in got.items()} == {k: v.shape for k, v in expected.items()}
    pair.theirs.load_state_dict(got, strict=True)
    pair.ours.load_state_dict(expected, strict=True)


def test_losses_and_detections(pair: Pair) -> None:
    theirs, ours = pair
    batches = 20
    generator = torch.Generator().manual_seed(2)
    detections = most_boxes = 0
    for batch in range(batches):
        images = random_images(generator, int(torch.randint(1, 4, (), generator=generator)))
        targets = random_targets(generator, images, most=0 if batch % 5 == 0 else 300)
        most_boxes = max(most_boxes, *(len(t["boxes"]) for t in targets))
        for model in (theirs, ours):
            train_with_fixed_statistics(model)
        with torch.no_grad():
            expected, got = theirs(images, targets), ours(images, targets)
            assert list(got) == list(expected)
            for name in expected:
                torch.testing.assert_close(got[name], expected[name], rtol=1e-5, atol=0)
            detected = zip(theirs.eval()(images), ours.eval()(images), strict=True)
        for e, g in detected:
            assert set(g) == set(e)
            detections += len(e["scores"])
            assert_same_detections(g, e)
    assert detections > batches * 20 and most_boxes > 250


def assert_same_detections(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Assert the same boxes in the same order, up to the order of scores that differ by at most 2e-6."""
    assert len(got["scores"]) == len(expected["scores"])
    torch.testing.assert_close(got["scores"], expected["scores"], rtol=1e-5, atol=1e-6)
    near = (got["scores"][:, None] - expected["scores"]).abs() <= 2e-6
    same = (got["boxes"][:, None] - expected["boxes"]).abs().amax(-1) <= 1e-3
    assert (near & same & (got["labels"][:, None] == expected["labels"])).any(0).all()


def gradients(model: nn.Module, images: list[Tensor], targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the gradient of the sum of the losses with respect to each parameter, in the dtype of the model."""
    dtype = next(model.parameters()).dtype
    model.zero_grad()
    targets = [{**target, "boxes": target["boxes"].to(dtype)} for target in targets]
    sum(model([image.to(dtype) for image in images], targets).values()).backward()
    result = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.norm() > 0, name
        result[name] = parameter.grad
    return result


def deviations(got: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    return {name: ((got[name] - exact).norm() / exact.norm()).item() for name, exact in expected.items()}


@pytest.mark.parametrize("most", [40, 300])
def test_gradients_equal_torchvisions(pair: Pair, most: int) -> None:
    generator = torch.Generator().manual_seed(most)
    images = random_images(generator, 3)
    targets = random_targets(generator, images, most)
    theirs, ours = (copy.deepcopy(model).train() for model in pair)
    single = deviations(gradients(ours, images, targets), gradients(theirs, images, targets))
    assert max(single.values()) < 1e-4
    # In float32, a network with random weights amplifies rounding errors up to a thousandth of its gradients.
    exact = gradients(theirs.double(), images, targets)
    assert max(deviations(gradients(ours.double(), images, targets), exact).values()) < 1e-7


def test_gradients_in_float32_deviate_no_more_than_torchvisions(pair: Pair) -> None:
    generator = torch.Generator().manual_seed(3)
    images = random_images(generator, 3)
    targets = random_targets(generator, images, 40)
    exact = gradients(copy.deepcopy(pair.theirs).train().double(), images, targets)
    theirs, ours = (deviations(gradients(copy.deepcopy(m).train(), images, targets), exact) for m in pair)
    assert all(ours[name] < 1.01 * theirs[name] + 1e-6 for name in exact)


def assert_close_heads(got: HeadOutputs, expected: HeadOutputs) -> None:
    for a, b in zip([*got.cls_logits, *got.box_deltas], [*expected.cls_logits, *expected.box_deltas], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_images_one_by_one_and_together(pair: Pair) -> None:
    ours = pair.ours.eval()
    # Both images have one size, because padding would change the anchors of the smaller one.
    images = torch.rand(2, 3, 128, 96, generator=torch.Generator().manual_seed(4))
    sizes = torch.tensor([[128, 96], [120, 90]])
    with torch.no_grad():
        alone = [ours.heads(image[None]) for image in images]
        assert_close_heads(
            HeadOutputs(*([torch.cat(t) for t in zip(*h, strict=True)] for h in zip(*alone, strict=True))),
            ours.heads(images),
        )
        # Compare detections of the same outputs, because the rounding of a convolution depends on the batch size.
        ours.heads = lambda batch: HeadOutputs(*([t[:1].expand(len(batch), -1, -1, -1) for t in h] for h in alone[0]))
        try:
            single, pairwise = ours.detections(images[:1], sizes[:1]), ours.detections(images, sizes[:1].expand(2, 2))
        finally:
            del ours.heads
    assert single.count > 20
    for a, b in zip(single, pairwise, strict=True):
        assert torch.equal(a[0], b[0]) and torch.equal(a[0], b[1])


def test_channels_last(pair: Pair) -> None:
    ours = pair.ours.eval()
    other = copy.deepcopy(ours).to(memory_format=torch.channels_last)
    batch = torch.rand(2, 3, 96, 64, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        got = other.heads(batch)
        assert all(
            level.is_contiguous(memory_format=torch.channels_last) for level in (*got.cls_logits, *got.box_deltas)
        )
        assert_close_heads(got, ours.heads(batch))
