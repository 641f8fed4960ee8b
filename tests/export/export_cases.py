"""Tiny detectors with real detections, and inputs for them, which the tests of the export share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from retinanet import FCOS, SSD, FCOSConfig, RetinaNet, RetinaNetConfig, SSDConfig
from retinanet.model.detector import Detector
from retinanet.model.pyramid_config import CUSTOM

CLASSES = ("a", "b", "c")
PYRAMID = {
    "class_names": CLASSES,
    "category_ids": (3, 5, 9),
    "fpn_levels": (4, 5),
    "min_size": (96,),
    "max_size": 128,
    "max_detections": 20,
}


class TinyBackbone(nn.Module):
    """Two levels, with strides 16 and 32."""

    def __init__(self, out_channels: int) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.p4 = nn.Conv2d(8, out_channels, 3, 4, 1)
        self.p5 = nn.Conv2d(out_channels, out_channels, 3, 2, 1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        p4 = self.p4(self.stem(images))
        return {"p4": p4, "p5": self.p5(p4.relu())}


def make_model(kind: str) -> Detector:
    """Return a network whose random weights give detections of every class, with distinct scores."""
    torch.manual_seed(0)
    model: Detector
    if kind == "retinanet":
        anchors = {"anchor_sizes": ((16,), (32,)), "aspect_ratios": (0.5, 1.0)}
        options = {"backbone": CUSTOM, "fpn_channels": 8, "head_depth": 1, "score_threshold": 0.1}
        model = RetinaNet(RetinaNetConfig(**PYRAMID, **anchors, **options), backbone=TinyBackbone(8))
    elif kind == "fcos":
        config = FCOSConfig(**PYRAMID, backbone=CUSTOM, fpn_channels=32, head_depth=1, score_threshold=0.3)
        model = FCOS(config, backbone=TinyBackbone(32))
    else:
        model = SSD(SSDConfig(class_names=CLASSES, network=kind, max_detections=20, score_threshold=0.982))
    model.eval()
    last_layers = {
        "retinanet": ("classification_head.cls_logits", "regression_head.bbox_reg"),
        "fcos": ("classification_head.cls_logits", "regression_head.bbox_reg"),
    }.get(kind, ("classification_head", "regression_head"))
    images = model.transform.normalize(make_inputs(1, *(model.config.fixed_size or (96, 128)))[0])
    with torch.no_grad():
        for number, (name, spread) in enumerate(zip(last_layers, (1.5, 0.5), strict=True)):
            # The values of each map get the same spread, whatever the network in front of the head does.
            maps = model.heads(images)[number]
            layers = [m for m in model.head.get_submodule(name).modules() if isinstance(m, nn.Conv2d)]
            for layer, level in zip(layers, maps, strict=False):
                layer.weight *= spread / level.std()
    return model


def make_inputs(number: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Return images [N, 3, H, W] whose padding is noise as well, and their sizes [N, 2]."""
    generator = torch.Generator().manual_seed(number)
    images = torch.rand(number, 3, height, width, generator=generator)
    return images, torch.tensor([[height - 7 * i, width - 11 * i] for i in range(number)])


def expected(model: Detector, images: Tensor, sizes: Tensor) -> tuple[Tensor, ...]:
    """Return the detections of the model itself in the images without their padding."""
    pixels = torch.zeros_like(images)
    for slot, image, (height, width) in zip(pixels, images, sizes.tolist(), strict=True):
        slot[:, :height, :width] = model.transform.normalize(image[:, :height, :width])
    with torch.no_grad():
        found = model.detections(pixels, sizes)
    return found.boxes, found.scores, found.labels, found.count


def assert_same(got: tuple[Tensor, ...], own: tuple[Tensor, ...]) -> None:
    for a, b in zip(got, own, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
    torch.testing.assert_close(got[0], own[0], rtol=0, atol=1e-3)
    torch.testing.assert_close(got[1], own[1], rtol=0, atol=1e-5)
    for a, b in zip(got[2:], own[2:], strict=True):
        assert torch.equal(a, b)
