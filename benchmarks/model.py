"""A whole RetinaNet: ours, torchvision's, and torchvision's accelerated, with the same weights.

The row "network alone" runs backbone, pyramid and heads. In training, its loss is the sum of the heads' tensors. The
time of the network varies by more than the rest of a step takes. Separate groups, "beyond the network", therefore
measure the same models with convolutions that return stored results. "compiled" rows use Inductor, and "captured" rows
also use a CUDA graph. Compare only rows of one group, because they come from one run. `model_stages.py` measures the
stages one by one.

The time of the convolutions changes by a fifth from one minute to the next. Our steps and accelerated steps therefore
also take turns with torchvision's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from model_cases import (
    BATCHES,
    NETWORKS,
    OWNERS,
    Models,
    check_detections,
    compiled,
    models,
    name_of,
    without_network,
)
from torch import Tensor, nn

from retinanet.model.network import RetinaNet

DTYPES = (torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.full))
COMPILED = tuple(pytest.param(f"{owner} compiled", marks=pytest.mark.full) for owner in OWNERS)
CAPTURED = pytest.param("ours captured", marks=[pytest.mark.full, pytest.mark.cuda])
ROWS = (*OWNERS, "network alone", *COMPILED)


def network_alone(model: RetinaNet, images: list[Tensor], dtype: torch.dtype, train: bool) -> Tensor:
    """Run the network on images without preprocessing and return the sum of the heads' tensors."""
    batch = torch.stack(images)
    with torch.autocast(batch.device.type, dtype, enabled=dtype != torch.float32):
        outputs = model.heads(batch)
    total = torch.stack([level.float().sum() for level in (*outputs.cls_logits, *outputs.box_deltas)]).sum()
    if train:
        model.zero_grad()
        total.backward()
    return total.detach()


def model_of(shared: Models, row: str) -> nn.Module:
    """Return the model of a row, compiled if the row says so."""
    model = shared.of("ours" if row == "network alone" else row)
    if row.endswith("compiled"):
        return compiled(model)
    return compiled(model, mode="reduce-overhead") if row.endswith("captured") else model


def rival_of(row: str, function_of: Callable[[str], Callable[[], Any]]) -> Callable[[], Any] | None:
    """Return torchvision's function that takes turns with a row's, compiled if the row is compiled or captured."""
    owner, _, how = row.partition(" ")
    if owner not in ("ours", "accelerated"):
        return None
    return function_of(f"torchvision {how}".strip().replace("captured", "compiled"))


def sum_of_heads(model: nn.Module, images: list[Tensor]) -> Tensor:
    """Compute the result of `network_alone` with torchvision's model."""
    outputs = model.head(list(model.backbone(torch.stack(images)).values()))
    return outputs["cls_logits"].sum() + outputs["bbox_regression"].sum()


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("count", BATCHES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("network", NETWORKS)
def test_training_step(compare, device, network, dtype, count, row):
    shared = models(network, device, count)
    images, targets = shared.images, shared.targets

    def step_of(row: str) -> Callable[[], Tensor]:
        model = model_of(shared, row).train()
        if row == "network alone":
            return lambda: network_alone(model, images, dtype, train=True)

        def step() -> Tensor:
            model.zero_grad()
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                losses = model(images, targets)
            sum(losses.values()).backward()
            return torch.stack([loss.detach().float() for loss in losses.values()])

        return step

    with torch.no_grad():
        if row == "network alone":
            expected = sum_of_heads(shared.torchvision.train(), images)
        else:
            expected = torch.stack(list(shared.torchvision.train()(images, targets).values()))
    tolerance = 1e-3 if dtype == torch.float32 else 0.1

    def check(actual: Tensor, expected: Tensor) -> None:
        if row.startswith("torchvision") and dtype != torch.float32:  # its focal loss is wrong for negatives
            actual, expected = actual[1:], expected[1:]
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=0)

    group = name_of("training step", network, count, dtype)
    compare(row, step_of(row), expected, check=check, group=group, rival=rival_of(row, step_of))


@pytest.mark.parametrize("row", (*ROWS, CAPTURED))
@pytest.mark.parametrize("count", BATCHES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("network", NETWORKS)
def test_inference(compare, device, network, dtype, count, row):
    shared = models(network, device, count)
    images = shared.images

    def infer_of(row: str) -> Callable[[], Any]:
        model = model_of(shared, row).eval()

        @torch.no_grad()
        def infer() -> Any:
            if row == "network alone":
                return network_alone(model, images, dtype, train=False)
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                return model(images)

        return infer

    theirs = shared.torchvision.eval()
    with torch.no_grad():
        expected = sum_of_heads(theirs, images) if row == "network alone" else theirs(images)

    def check(actual: Any, expected: Any) -> None:
        if row == "network alone":
            torch.testing.assert_close(actual, expected, rtol=1e-3 if dtype == torch.float32 else 0.1, atol=0)
        elif dtype == torch.float32:
            check_detections(actual, expected)

    group = name_of("inference", network, count, dtype)
    compare(row, infer_of(row), expected, check=check, group=group, rival=rival_of(row, infer_of))


@pytest.mark.parametrize("row", OWNERS)
@pytest.mark.parametrize("network", NETWORKS)
def test_training_step_beyond_the_network(compare, device, network, row):
    """Measure preparing images, matching, the losses, and their gradients for the heads' outputs."""
    shared = models(network, device)

    def step_of(row: str) -> Callable[[], tuple[Tensor, ...]]:
        model, leaves = without_network(shared, row)

        def step() -> tuple[Tensor, ...]:
            losses = model.train()(shared.images, shared.targets)
            return (*losses.values(), *torch.autograd.grad(sum(losses.values()), leaves))

        return step

    compare(
        row,
        step_of(row),
        step_of("torchvision")(),
        check=lambda actual, expected: torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-6),
        group=name_of("training step beyond the network", network),
    )


@pytest.mark.parametrize("row", OWNERS)
@pytest.mark.parametrize("network", NETWORKS)
def test_inference_beyond_the_network(compare, device, network, row):
    """Measure preparing images, post-processing, and scaling boxes back to the images."""
    shared = models(network, device)

    def infer_of(row: str) -> Callable[[], Any]:
        model, _ = without_network(shared, row)
        return torch.no_grad()(lambda: model.eval()(shared.images))

    compare(
        row,
        infer_of(row),
        infer_of("torchvision")(),
        check=check_detections,
        group=name_of("inference beyond the network", network),
    )
