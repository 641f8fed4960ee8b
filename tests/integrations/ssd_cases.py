"""torchvision SSDs and batches for the tests of accelerated ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate_cases import CLASSES, Batch, random_batch
from torch import Tensor, nn
from torchvision.models.detection import ssd300_vgg16, ssdlite320_mobilenet_v3_large
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.ssd import SSD

SIZE = (96, 96)
RATIOS = [[2], [2, 3], [2]]


class Pyramid(nn.Module):
    """A backbone of three small levels, for tests that do not depend on the backbone."""

    out_channels = [16, 16, 16]

    def __init__(self) -> None:
        super().__init__()
        self.levels = nn.ModuleList([nn.Conv2d(3, 16, 3, stride, 1) for stride in (4, 12, 48)])

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps: dict[str, Tensor] = {}
        for i, level in enumerate(self.levels):
            maps[str(i)] = level(x).relu()
        return maps


class Single(nn.Module):
    """A backbone of one level, which it returns as a tensor."""

    out_channels = [16]

    def __init__(self) -> None:
        super().__init__()
        self.level = nn.Conv2d(3, 16, 3, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.level(x).relu()


def plain_ssd(cls: type[SSD] = SSD, **options: Any) -> SSD:
    """Return a small model as it is after initialisation, for tests that compare no numbers."""
    return cls(Pyramid(), DefaultBoxGenerator(RATIOS), SIZE, CLASSES, **options)


def small_ssd(cls: type[SSD] = SSD, **options: Any) -> SSD:
    return spread(plain_ssd(cls, **options))


def single_map_ssd() -> SSD:
    return spread(SSD(Single(), DefaultBoxGenerator([[2, 3]], steps=[8], clip=False), SIZE, CLASSES))


def ssd_of_torchvision(build: Callable[..., SSD]) -> Callable[[], SSD]:
    return lambda: spread(build(weights=None, weights_backbone=None, num_classes=CLASSES))


SSDS = {
    "ssd300": ssd_of_torchvision(ssd300_vgg16),
    "ssdlite320": ssd_of_torchvision(ssdlite320_mobilenet_v3_large),
    "single map": single_map_ssd,
    "small": small_ssd,
}


def spread(model: SSD) -> SSD:
    """Spread logits and deltas, because after initialisation all scores are nearly equal."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # cumulative mean: one pass in training mode sets the statistics
    with torch.no_grad():
        model(*ssd_batch())
        images, _ = model.eval().transform(ssd_batch()[0])
        features = model.backbone(images.tensors)
        features = [features] if isinstance(features, Tensor) else list(features.values())
        outputs = model.head(features)
        heads = (("cls_logits", model.head.classification_head), ("bbox_regression", model.head.regression_head))
        for name, head in heads:
            scale = outputs[name].std() / (2 if name == "cls_logits" else 0.5)
            for module in head.module_list:
                last = module[-1] if isinstance(module, nn.Sequential) else module
                last.weight.div_(scale)
                last.bias.zero_()
    return model.train()


def ssd_batch(counts: tuple[int, ...] = (5, 0, 30)) -> Batch:
    """Return a batch whose labels leave out class 0, SSD's background."""
    return random_batch(counts, first_class=1)
