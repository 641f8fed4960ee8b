"""torchvision FCOS models, batches for them, and comparisons of an accelerated model with torchvision's own."""

from __future__ import annotations

import torch
from accelerate_cases import CLASSES, Batch
from torch import Tensor, nn
from torchvision.models.detection import FCOS, fcos_resnet50_fpn
from torchvision.models.detection.anchor_utils import AnchorGenerator

LOSSES = ["classification", "bbox_regression", "bbox_ctrness"]
SIZES = dict(min_size=120, max_size=200)
POINTS = ((8,), (16,), (32,)), ((1.0,),) * 3


class Pyramid(nn.Module):
    """A backbone of small levels without normalisation, which would amplify rounding in gradients."""

    out_channels = 64  # two channels in each group of the heads' GroupNorm, which would turn a single value into 0

    def __init__(self, levels: int) -> None:
        super().__init__()
        self.levels = nn.ModuleList([nn.Conv2d(3, 64, 7, 8 * 2**i, 3) for i in range(levels)])

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps: dict[str, Tensor] = {}
        for i, level in enumerate(self.levels):
            maps[str(i)] = level(x).relu()
        return maps


def spread(model: FCOS) -> FCOS:
    """Spread the outputs of the head, because after initialisation nothing is detected and most distances are 0."""
    head = model.head
    for conv, bias in (
        (head.classification_head.cls_logits, -3.0),
        (head.regression_head.bbox_reg, 2.0),
        (head.regression_head.bbox_ctrness, 0.0),
    ):
        nn.init.normal_(conv.weight, std=0.06)
        nn.init.constant_(conv.bias, bias)
    return model


def small_model(cls: type[FCOS] = FCOS, **options: object) -> FCOS:
    """Return a model of three levels."""
    options = {"anchor_generator": AnchorGenerator(*POINTS), **SIZES, **options}
    return spread(cls(Pyramid(3), CLASSES, **options))


def default_model() -> FCOS:
    """Return a model with the five levels that torchvision's anchors have by default."""
    return spread(FCOS(Pyramid(5), CLASSES, **SIZES))


def resnet50_model() -> FCOS:
    model = fcos_resnet50_fpn(weights=None, weights_backbone=None, num_classes=CLASSES, **SIZES)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # cumulative mean: one pass in training mode sets the statistics
    with torch.no_grad():
        model(*random_batch((1, 1)))
    return spread(model)


MODELS = {"resnet50": resnet50_model, "five levels": default_model, "small": small_model}


def random_batch(counts: tuple[int, ...] = (5, 0, 30)) -> Batch:
    """Return images and targets, whose boxes have sides spread evenly on a logarithmic scale."""
    sizes = [(110, 150), (120, 90), (140, 140)][: len(counts)]
    images = [torch.rand(3, *size) for size in sizes]
    targets = []
    for count, (height, width) in zip(counts, sizes, strict=True):
        size = torch.tensor([width, height])
        sides = 4 * (0.95 * size / 4) ** torch.rand(count, 2)
        corner = torch.rand(count, 2) * (size - sides)
        targets.append({"boxes": torch.cat((corner, corner + sides), 1), "labels": torch.randint(0, CLASSES, (count,))})
    return images, targets


def assert_same_losses(theirs: FCOS, ours: FCOS, batch: Batch) -> None:
    expected, got = theirs(*batch), ours(*batch)
    assert list(got) == list(expected) == LOSSES
    assert all(value > 0 for value in expected.values()) or not any(len(t["boxes"]) for t in batch[1])
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)
