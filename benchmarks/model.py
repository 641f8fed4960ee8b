"""A whole RetinaNet, stage by stage: ours, torchvision's, and torchvision's accelerated, with the same weights.

The row "network alone" is backbone, pyramid and heads, in training with the sum of the heads' tensors as the loss. What
a step does beyond it is far less than what a step varies by, so it has a group of its own: the same models, whose
convolutions give what is stored. Rows of one group come from one run.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from harness import ground_truth, rows_of
from torch import Tensor, nn

import retinanet_ops as ops

torchvision = pytest.importorskip("torchvision")

from torchvision.models.detection import RetinaNet as TorchvisionRetinaNet  # noqa: E402
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone  # noqa: E402
from torchvision.ops.feature_pyramid_network import LastLevelP6P7  # noqa: E402

from retinanet.config import RetinaNetConfig  # noqa: E402
from retinanet.criterion import retinanet_losses  # noqa: E402
from retinanet.model import RetinaNet, pack_targets, unpack_detections  # noqa: E402
from retinanet_ops.integrations.torchvision import accelerate  # noqa: E402

CLASSES, IMAGES, OBJECTS = 91, 2, 50
SIZES = {"resnet18": (512, 512), "resnet50": (800, 1344)}
NETWORKS = ("resnet18", pytest.param("resnet50", marks=pytest.mark.full))
DTYPES = (torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.full))
OWNERS = ("ours", "torchvision", "accelerated")
COMPILED = pytest.param("ours compiled", marks=pytest.mark.full)


class Models(NamedTuple):
    """The same network three times, and what it is shown."""

    ours: RetinaNet
    torchvision: nn.Module
    accelerated: nn.Module
    images: list[Tensor]  # [3, H, W]
    targets: list[dict[str, Tensor]]

    def of(self, row: str) -> nn.Module:
        """The model of a row."""
        return getattr(self, row.removesuffix(" compiled"))


@functools.cache
def models(network: str, device: torch.device) -> Models:
    """Random weights, whose scores are spread as those of a trained model are."""
    torch.manual_seed(0)
    height, width = SIZES[network]
    images = [torch.rand(3, height, width, device=device) for _ in range(IMAGES)]
    targets = [
        {
            "boxes": ground_truth(OBJECTS, device).clamp(max=min(height, width) - 1.0),
            "labels": torch.randint(1, CLASSES, (OBJECTS,), device=device),
        }
        for _ in range(IMAGES)
    ]
    for target in targets:  # what is left of a box at the edge has an area
        target["boxes"][:, :2] = target["boxes"][:, :2].minimum(target["boxes"][:, 2:] - 8)
    top = LastLevelP6P7(256, 256)
    backbone = resnet_fpn_backbone(
        backbone_name=network,
        weights=None,
        norm_layer=nn.BatchNorm2d,
        trainable_layers=5,
        returned_layers=[2, 3, 4],
        extra_blocks=top,
    )
    size = {"min_size": height, "max_size": width}
    theirs = TorchvisionRetinaNet(backbone, CLASSES, **size).to(device)
    set_momentum(theirs, None)  # one pass in training mode sets the statistics
    with torch.no_grad():
        theirs.train()(images, targets)
        head = theirs.eval().head.classification_head
        prepared = theirs.transform(images)[0].tensors
        logits = theirs.head(list(theirs.backbone(prepared).values()))["cls_logits"]
        head.cls_logits.weight.mul_(1.2 / logits.std())
    fields = {"backbone_norm": "batch", "trainable_backbone_layers": None}
    ours = RetinaNet(RetinaNetConfig(backbone=network, min_size=(height,), max_size=width, **fields)).to(device)
    ours.load_state_dict(theirs.state_dict())
    for model in (theirs, ours):
        set_momentum(model, 0.0)
    return Models(ours, theirs, accelerate(copy.deepcopy(theirs)), images, targets)


def set_momentum(model: nn.Module, momentum: float | None) -> None:
    """Of the statistics of all batch normalisation: None is the plain mean, 0 leaves them as they are."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = momentum


def name_of(what: str, network: str, dtype: torch.dtype = torch.float32) -> str:
    """A group of rows."""
    height, width = SIZES[network]
    return f"{what}, {network}, {IMAGES} x {height} x {width}, {CLASSES} classes, {str(dtype).removeprefix('torch.')}"


def network_alone(model: RetinaNet, images: list[Tensor], dtype: torch.dtype, train: bool) -> Tensor:
    """The heads' tensors of prepared images, summed."""
    batch = torch.stack(images)
    with torch.autocast(batch.device.type, dtype, enabled=dtype != torch.float32):
        outputs = model.heads(batch)
    total = torch.stack([level.float().sum() for level in (*outputs.cls_logits, *outputs.box_deltas)]).sum()
    if train:
        model.zero_grad()
        total.backward()
    return total.detach()


def sum_of_heads(model: nn.Module, images: list[Tensor]) -> Tensor:
    """What `network_alone` gives, by torchvision's model."""
    outputs = model.head(list(model.backbone(torch.stack(images)).values()))
    return outputs["cls_logits"].sum() + outputs["bbox_regression"].sum()


@pytest.mark.parametrize("row", (*OWNERS, "network alone", COMPILED))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("network", NETWORKS)
def test_training_step(compare, device, network, dtype, row):
    shared = models(network, device)
    images, targets = shared.images, shared.targets
    model = shared.of("ours" if row == "network alone" else row).train()
    if row == "ours compiled":
        model = compiled_training(model)

    def step() -> Tensor:
        if row == "network alone":
            return network_alone(model, images, dtype, train=True)
        model.zero_grad()
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            losses = model(images, targets)
        sum(losses.values()).backward()
        return torch.stack([loss.detach().float() for loss in losses.values()])

    with torch.no_grad():
        if row == "network alone":
            expected = sum_of_heads(shared.torchvision.train(), images)
        else:
            expected = torch.stack(list(shared.torchvision.train()(images, targets).values()))
    tolerance = 1e-3 if dtype == torch.float32 else 0.1

    def check(actual: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=0)

    compare(row, step, expected, check=check, group=name_of("training step", network, dtype))


@pytest.mark.parametrize("row", (*OWNERS, "network alone", COMPILED))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("network", NETWORKS)
def test_inference(compare, device, network, dtype, row):
    shared = models(network, device)
    model = shared.of("ours" if row == "network alone" else row).eval()
    images = shared.images
    if row == "ours compiled":
        model = compiled_inference(model)

    @torch.no_grad()
    def infer() -> Any:
        if row == "network alone":
            return network_alone(model, images, dtype, train=False)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return model(images)

    theirs = shared.torchvision.eval()
    with torch.no_grad():
        expected = sum_of_heads(theirs, images) if row == "network alone" else theirs(images)

    def check(actual: Any, expected: Any) -> None:
        if row == "network alone":
            torch.testing.assert_close(actual, expected, rtol=1e-3 if dtype == torch.float32 else 0.1, atol=0)
        elif dtype == torch.float32:
            check_detections(actual, expected)

    compare(row, infer, expected, check=check, group=name_of("inference", network, dtype))


def check_detections(actual: list[dict[str, Tensor]], expected: list[dict[str, Tensor]]) -> None:
    """As many of them; each has a twin of the same class, box and score, in whatever order close scores are."""
    for a, e in zip(actual, expected, strict=True):
        assert len(e["scores"]) > 50
        torch.testing.assert_close(a["scores"], e["scores"], rtol=1e-3, atol=1e-4)
        apart = (a["boxes"][:, None] - e["boxes"]).abs().amax(-1)
        twin = (
            (a["labels"][:, None] == e["labels"]) & (apart < 0.1) & ((a["scores"][:, None] - e["scores"]).abs() < 1e-3)
        )
        # One at the end may be another of nearly the same score, or what NMS decides otherwise for a rounding.
        assert twin.any(1).float().mean() > 0.99


class Replay(nn.Module):
    """Stands for a layer: gives what is stored, one thing at each call, whatever it is given."""

    def __init__(self, results: Sequence[Any]) -> None:
        """It begins again after the last."""
        super().__init__()
        self.results = itertools.cycle(results)

    def forward(self, _: Tensor) -> Any:
        """The next one."""
        return next(self.results)


def without_network(shared: Models, row: str) -> tuple[nn.Module, list[Tensor]]:
    """The model of a row whose convolutions give stored tensors, and these: the logits and deltas of each level."""
    with torch.no_grad():
        batch = shared.torchvision.transform(shared.images)[0].tensors
        features = shared.ours.eval().backbone(batch)
        outputs = shared.ours.head(list(features.values()))
    model = copy.copy(shared.of(row))
    model._modules = dict(model._modules)
    model.backbone, model.head = Replay([features]), copy.deepcopy(model.head)
    leaves = []
    for head, last, levels in (
        (model.head.classification_head, "cls_logits", outputs.cls_logits),
        (model.head.regression_head, "bbox_reg", outputs.box_deltas),
    ):
        leaves += [level.detach().requires_grad_() for level in levels]
        head.conv = nn.Identity()
        setattr(head, last, Replay(leaves[-len(levels) :]))
    return model, leaves


@pytest.mark.parametrize("row", OWNERS)
@pytest.mark.parametrize("network", NETWORKS)
def test_training_step_beyond_the_network(compare, device, network, row):
    """Preparing images, matching, losses and their gradients, back to what the network's last layers gave."""
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
    """Preparing images, post-processing, and boxes scaled back to the images."""
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


@pytest.mark.parametrize("row", ("ours", "torchvision"))
@pytest.mark.parametrize("network", NETWORKS)
def test_preparing_images(compare, device, network, row):
    shared = models(network, device)
    model = shared.of(row).train()
    compare(
        row,
        lambda: model.transform(shared.images, shared.targets)[0].tensors,
        shared.torchvision.transform(shared.images, shared.targets)[0].tensors,
        group=name_of("preparing images", network),
    )


@pytest.mark.parametrize("row", ("ours", "torchvision"))
@pytest.mark.parametrize("network", NETWORKS)
def test_backbone_and_pyramid(compare, device, network, row):
    shared = models(network, device)
    model, batch = shared.of(row).eval(), torch.stack(shared.images)

    @torch.no_grad()
    def run() -> list[Tensor]:
        return list(model.backbone(batch).values())

    compare(row, run, run(), group=name_of("backbone and pyramid, forward", network))


@pytest.mark.parametrize("row", ("ours", "torchvision"))
@pytest.mark.parametrize("network", NETWORKS)
def test_heads(compare, device, network, row):
    shared = models(network, device)
    model = shared.of(row).eval()
    with torch.no_grad():
        features = list(shared.ours.eval().backbone(torch.stack(shared.images)).values())

    @torch.no_grad()
    def run() -> Any:
        return model.head(features)

    def rows(outputs: Any) -> Tensor:
        if isinstance(outputs, dict):
            return outputs["cls_logits"]
        return rows_of(outputs.cls_logits, CLASSES)

    compare(
        row,
        run,
        rows(run()),
        check=lambda actual, expected: torch.testing.assert_close(rows(actual), expected),
        group=name_of("heads, forward", network),
    )


@pytest.mark.parametrize("row", ("ours", "torchvision"))
@pytest.mark.parametrize("network", NETWORKS)
def test_losses(compare, device, network, row):
    """Matching and both losses, from the heads' convolutions to the gradients that they get back."""
    shared = models(network, device)
    ours, theirs = shared.ours.train(), shared.torchvision.train()
    batch, scaled = theirs.transform(shared.images, shared.targets)
    with torch.no_grad():
        outputs = ours.heads(batch.tensors)
    leaves = [level.detach().requires_grad_() for level in (*outputs.cls_logits, *outputs.box_deltas)]
    levels = len(outputs.cls_logits)

    def our_losses() -> Tensor:
        grouped = type(outputs)(leaves[:levels], leaves[levels:])
        truth, _ = pack_targets(scaled)
        losses = retinanet_losses(
            grouped, ours.anchor_grid(batch.tensors, outputs), truth, ours.config, ours.normaliser
        )
        return torch.stack(list(losses.values()))

    def their_losses() -> Tensor:
        rows = {
            "cls_logits": rows_of(leaves[:levels], CLASSES),
            "bbox_regression": rows_of(leaves[levels:], 4),
        }
        anchors = theirs.anchor_generator(batch, leaves[:levels])
        return torch.stack(list(theirs.compute_loss(scaled, rows, anchors).values()))

    def with_gradients(losses: Callable[[], Tensor]) -> tuple[Tensor, ...]:
        values = losses()
        return (values.detach(), *torch.autograd.grad(values.sum(), leaves))

    compare(
        row,
        lambda: with_gradients(our_losses if row == "ours" else their_losses),
        with_gradients(their_losses),
        check=lambda actual, expected: torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-6),
        group=name_of("matching and losses, forward + backward", network),
    )


@pytest.mark.parametrize("row", ("ours", "torchvision"))
@pytest.mark.parametrize("network", NETWORKS)
def test_post_processing(compare, device, network, row):
    """From the heads' convolutions to detections in each image."""
    shared = models(network, device)
    ours, theirs = shared.ours.eval(), shared.torchvision.eval()
    batch = theirs.transform(shared.images)[0]
    sizes = torch.tensor(batch.image_sizes, device=device)
    with torch.no_grad():
        outputs = ours.heads(batch.tensors)

    @torch.no_grad()
    def ours_from_heads() -> Any:
        found = ops.detect(
            outputs.cls_logits, outputs.box_deltas, ours.anchor_grid(batch.tensors, outputs), sizes, max_detections=300
        )
        return unpack_detections(found)

    @torch.no_grad()
    def theirs_from_heads() -> Any:
        rows = {
            "cls_logits": rows_of(outputs.cls_logits, CLASSES),
            "bbox_regression": rows_of(outputs.box_deltas, 4),
        }
        anchors = theirs.anchor_generator(batch, outputs.cls_logits)
        cells = [level.shape[2] * level.shape[3] for level in outputs.cls_logits]
        per_cell = rows["cls_logits"].shape[1] // sum(cells)
        counts = [cell * per_cell for cell in cells]
        split = {name: list(value.split(counts, dim=1)) for name, value in rows.items()}
        return theirs.postprocess_detections(split, [list(a.split(counts)) for a in anchors], batch.image_sizes)

    compare(
        row,
        ours_from_heads if row == "ours" else theirs_from_heads,
        theirs_from_heads(),
        check=check_detections,
        group=name_of("post-processing", network),
    )


def compiled_training(model: RetinaNet) -> Any:
    """Our model, whose network and losses are one graph of Inductor's."""
    model = copy.deepcopy(model)
    model.losses = torch.compile(model.losses, fullgraph=True)
    return model


def compiled_inference(model: RetinaNet) -> Any:
    """Our model, whose network and post-processing are one graph of Inductor's."""
    model = copy.deepcopy(model)
    model.detections = torch.compile(model.detections, fullgraph=True)
    return model
