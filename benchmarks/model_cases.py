"""Shared code of the benchmarks of whole models: three models with the same weights, and parts of them."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
from harness import ground_truth
from torch import Tensor, nn

torchvision = pytest.importorskip("torchvision")

from torchvision.models.detection import RetinaNet as TorchvisionRetinaNet  # noqa: E402
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone  # noqa: E402
from torchvision.ops.feature_pyramid_network import LastLevelP6P7  # noqa: E402

from retinanet.model.config import RetinaNetConfig  # noqa: E402
from retinanet.model.network import RetinaNet  # noqa: E402
from retinanet_ops.integrations.torchvision import accelerate  # noqa: E402

CLASSES, OBJECTS = 91, 50
SIZES = {"resnet18": (512, 512), "resnet50": (800, 1344)}
NETWORKS = ("resnet18", pytest.param("resnet50", marks=pytest.mark.full))
#: Images per batch. A GPU needs larger batches to be busy.
BATCHES = (2, *(pytest.param(n, marks=[pytest.mark.full, pytest.mark.cuda]) for n in (1, 8, 16)))
OWNERS = ("ours", "torchvision", "accelerated")


class Models(NamedTuple):
    """The same network three times, with its images and targets."""

    ours: RetinaNet
    torchvision: nn.Module
    accelerated: nn.Module
    images: list[Tensor]  # [3, H, W]
    targets: list[dict[str, Tensor]]

    def of(self, row: str) -> nn.Module:
        """Return the model of a row."""
        return getattr(self, row.split()[0])


@functools.cache
def models(network: str, device: torch.device, count: int = 2) -> Models:
    """Return models with random weights and `count` images of one size.

    The weights are scaled so that scores spread as those of a trained model do. On a GPU, the models are channels_last,
    which is the fast layout for half precision.
    """
    torch.manual_seed(0)
    height, width = SIZES[network]
    images = [torch.rand(3, height, width, device=device) for _ in range(count)]
    targets = [
        {
            "boxes": ground_truth(OBJECTS, device).clamp(max=min(height, width) - 1.0),
            "labels": torch.randint(1, CLASSES, (OBJECTS,), device=device),
        }
        for _ in range(count)
    ]
    for target in targets:  # so that a box that was clamped at the edge keeps an area
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
    _set_momentum(theirs, None)  # one pass in training mode then sets the statistics
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
        _set_momentum(model, 0.0)
        if device.type == "cuda":
            model.to(memory_format=torch.channels_last)
    return Models(ours, theirs, accelerate(copy.deepcopy(theirs)), images, targets)


def _set_momentum(model: nn.Module, momentum: float | None) -> None:
    """Set the momentum of all batch-norm statistics. None takes the cumulative mean, 0 freezes them."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = momentum


def name_of(what: str, network: str, count: int = 2, dtype: torch.dtype = torch.float32) -> str:
    """Return the name of a group of rows."""
    height, width = SIZES[network]
    return f"{what}, {network}, {count} x {height} x {width}, {CLASSES} classes, {str(dtype).removeprefix('torch.')}"


def compiled(model: nn.Module, **options: Any) -> nn.Module:
    """Return a copy that is compiled by Inductor.

    Our losses and detections compile to one graph each. Of torchvision's model, only backbone and head are compiled,
    because the rest synchronises with the device.
    """
    model = copy.deepcopy(model)
    if isinstance(model, RetinaNet):
        model.losses = torch.compile(model.losses, fullgraph=True, **options)
        model.detections = torch.compile(model.detections, fullgraph=True, **options)
    else:
        model.backbone.compile(**options)
        model.head.compile(**options)
    return model


def check_detections(actual: list[dict[str, Tensor]], expected: list[dict[str, Tensor]]) -> None:
    """Assert that nearly every detection has a twin of the same class, box and score, in any order."""
    for a, e in zip(actual, expected, strict=True):
        assert len(e["scores"]) > 50
        torch.testing.assert_close(a["scores"], e["scores"], rtol=1e-3, atol=1e-4)
        apart = (a["boxes"][:, None] - e["boxes"]).abs().amax(-1)
        twin = (
            (a["labels"][:, None] == e["labels"]) & (apart < 0.1) & ((a["scores"][:, None] - e["scores"]).abs() < 1e-3)
        )
        # The last detections may differ where scores are nearly equal or where rounding changes a decision of NMS.
        assert twin.any(1).float().mean() > 0.99


class Replay(nn.Module):
    """Replaces a layer and returns stored results, one at each call, whatever the input."""

    def __init__(self, results: Sequence[Any]) -> None:
        """Store the results. After the last one, the first follows again."""
        super().__init__()
        self.results = itertools.cycle(results)

    def forward(self, _: Tensor) -> Any:
        """Return the next result."""
        return next(self.results)


def without_network(shared: Models, row: str) -> tuple[nn.Module, list[Tensor]]:
    """Return the model of a row with convolutions that return stored tensors, and those tensors.

    The tensors are the logits of all levels, followed by the deltas of all levels.
    """
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
