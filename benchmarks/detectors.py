"""torchvision's detectors beside the same models accelerated: matching and losses, post-processing, and whole steps.

In all but the whole steps, a model is called as a whole, but its transform, its backbone and the convolutions of its
heads return stored results. What is left is the work between the outputs of the convolutions and the losses with the
gradients of these outputs, or the detections. The heads of Faster R-CNN return stored results instead of pooling
proposals. Our rows take turns with torchvision's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from harness import COCO_GRIDS, COCO_SIZE, ground_truth
from model_cases import Replay, check_detections
from torch import Tensor, nn
from torchvision.models.detection import (
    FCOS,
    FasterRCNN,
    fasterrcnn_resnet50_fpn,
    fcos_resnet50_fpn,
    ssd300_vgg16,
    ssdlite320_mobilenet_v3_large,
)
from torchvision.models.detection.image_list import ImageList

from retinanet_ops.integrations.torchvision import accelerate

CLASSES, OBJECTS = 91, 50
#: Mean of the logits: after initialisation, and when many candidates exceed the threshold.
FEW, MANY = -4.6, -2.0
DTYPES = (torch.float32, torch.bfloat16)


class Detector(NamedTuple):
    """A model of torchvision without its network, and its input."""

    model: nn.Module
    size: tuple[int, int]  # height and width of an image
    leaves: list[Tensor]  # the outputs of the convolutions, all levels of one after those of another
    images: list[Tensor]  # [3, H, W]
    targets: list[dict[str, Tensor]]
    random: int = 0  # number of last leaves whose gradients depend on a random sample


class Prepared(nn.Module):
    """Replaces a transform, and returns images and targets as they are."""

    def forward(self, images: list[Tensor], targets: Any = None) -> tuple[ImageList, Any]:
        """Return the batch, without copying the images into it."""
        sizes = [(image.shape[-2], image.shape[-1]) for image in images]
        return ImageList(images[0].expand(len(images), *images[0].shape), sizes), targets

    def postprocess(self, result: Any, image_shapes: Any, original_image_sizes: Any) -> Any:
        """Return the detections."""
        return result


def fcos(device: torch.device, dtype: torch.dtype, bias: float) -> Detector:
    """Return an FCOS for two images of 800 x 1344 pixels."""
    count = 2
    maps = [torch.zeros(count, 256, h, w, dtype=dtype, device=device) for h, w in COCO_GRIDS]
    backbone = Replay([{str(i): level for i, level in enumerate(maps)}])
    backbone.out_channels = 256
    model = FCOS(backbone, CLASSES).to(device)
    leaves = []
    for head, last, channels, mean in (
        (model.head.classification_head, "cls_logits", CLASSES, bias),
        (model.head.regression_head, "bbox_reg", 4, 2.0),
        (model.head.regression_head, "bbox_ctrness", 1, 0.0),
    ):
        levels = [torch.randn(count, channels, h, w, device=device).add(mean).to(dtype) for h, w in COCO_GRIDS]
        leaves += [level.requires_grad_() for level in levels]
        head.conv = nn.Identity()
        setattr(head, last, Replay(levels))
    return with_input(model, COCO_SIZE, leaves, [ground_truth(OBJECTS, device) for _ in range(count)])


def ssd300(device: torch.device, dtype: torch.dtype, bias: float) -> Detector:
    """Return torchvision's SSD300 for eight images."""
    return ssd(ssd300_vgg16, 300, (38, 19, 10, 5, 3, 1), device, dtype, bias)


def ssdlite320(device: torch.device, dtype: torch.dtype, bias: float) -> Detector:
    """Return torchvision's SSDlite320 for eight images."""
    return ssd(ssdlite320_mobilenet_v3_large, 320, (20, 10, 5, 3, 2, 1), device, dtype, bias)


def ssd(
    build: Callable[..., Any],
    size: int,
    sides: tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype,
    bias: float,
) -> Detector:
    """Return an SSD for eight square images. The lower `bias` is, the higher are the logits of the background."""
    count = 8
    model = build(weights=None, weights_backbone=None, num_classes=CLASSES).to(device)
    per_cell = model.anchor_generator.num_anchors_per_location()
    logits = [torch.randn(count, a, CLASSES, n, n) * 1.5 for a, n in zip(per_cell, sides, strict=True)]
    for level in logits:
        level[:, :, 0] -= 2 * bias
    deltas = [torch.randn(count, 4 * a, n, n) * 0.5 for a, n in zip(per_cell, sides, strict=True)]
    leaves = [level.flatten(1, 2) if level.dim() == 5 else level for level in (*logits, *deltas)]
    leaves = [level.to(device, dtype).requires_grad_() for level in leaves]
    for i in range(len(sides)):
        model.head.classification_head.module_list[i] = Replay([leaves[i]])
        model.head.regression_head.module_list[i] = Replay([leaves[len(sides) + i]])
    maps = [torch.zeros(count, 1, n, n, dtype=dtype, device=device) for n in sides]
    model.backbone = Replay([{str(i): level for i, level in enumerate(maps)}])
    return with_input(model, (size, size), leaves, square_boxes(size, count, device))


def square_boxes(size: int, count: int, device: torch.device) -> list[Tensor]:  # count tensors [OBJECTS, 4]
    """Return the objects of square images, with sides of 12 pixels to two thirds of the image."""
    boxes = []
    for _ in range(count):
        side = 12 * (size / 18) ** torch.rand(OBJECTS, 2)
        corner = torch.rand(OBJECTS, 2) * (size - side)
        boxes.append(torch.cat((corner, corner + side), dim=1).to(device))
    return boxes


class Pool(nn.Module):
    """Replaces the pooling of proposals."""

    def forward(self, features: Any, proposals: list[Tensor], image_sizes: Any) -> Tensor:
        """Return a row for each proposal."""
        return torch.cat(proposals)


class Predictor(nn.Module):
    """Replaces the predictor of a Faster R-CNN, and returns as many stored rows as there are proposals."""

    def __init__(self, logits: Tensor, deltas: Tensor) -> None:
        """Store rows for the largest number of proposals."""
        super().__init__()
        self.logits, self.deltas = logits, deltas

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits and deltas."""
        return self.logits[: len(rows)], self.deltas[: len(rows)]


def faster_rcnn(device: torch.device, dtype: torch.dtype, bias: float) -> Detector:
    """Return a Faster R-CNN for two images of 800 x 1344 pixels, with 268,569 anchors."""
    count, grids = 2, ((200, 336), *COCO_GRIDS[:4])
    maps = {str(i): torch.zeros(count, 1, h, w, dtype=dtype, device=device) for i, (h, w) in enumerate(grids)}
    backbone = Replay([maps])
    backbone.out_channels = 1
    model = FasterRCNN(backbone, CLASSES).to(device)
    objectness = [torch.randn(count, 3, h, w, device=device).mul(1.5).sub(2) for h, w in grids]
    deltas = [torch.randn(count, 12, h, w, device=device) * 0.2 for h, w in grids]
    logits = torch.randn(count * 1000, CLASSES, device=device) * 1.5
    logits[:, 0] -= 1.5 * bias  # class 0 is the background
    leaves = [*objectness, *deltas, logits, torch.randn(count * 1000, CLASSES * 4, device=device)]
    leaves = [leaf.to(dtype).requires_grad_() for leaf in leaves]
    model.rpn.head = Replay([(leaves[: len(grids)], leaves[len(grids) : -2])])
    heads = model.roi_heads
    heads.box_roi_pool, heads.box_head, heads.box_predictor = Pool(), nn.Identity(), Predictor(*leaves[-2:])
    boxes = [ground_truth(OBJECTS, device) for _ in range(count)]
    return with_input(model, COCO_SIZE, leaves, boxes)._replace(random=2)


def with_input(model: nn.Module, size: tuple[int, int], leaves: list[Tensor], boxes: list[Tensor]) -> Detector:
    """Return a detector of torchvision with images of one size, and with boxes of any class but 0."""
    model.transform = Prepared()
    images = [torch.zeros(3, *size, device=of_image.device) for of_image in boxes]
    labels = [torch.randint(1, CLASSES, (len(of_image),), device=of_image.device) for of_image in boxes]
    targets = [{"boxes": b, "labels": of_image} for b, of_image in zip(boxes, labels, strict=True)]
    return Detector(model, size, leaves, images, targets)


Build = Callable[[torch.device, torch.dtype, float], Detector]
FAMILIES: dict[str, Build] = {
    "FCOS": fcos,
    "SSD300": ssd300,
    "SSDlite320": ssdlite320,
    "Faster R-CNN": faster_rcnn,
}
NAMES = ("FCOS", "SSD300", "Faster R-CNN", pytest.param("SSDlite320", marks=pytest.mark.full))


def rows_of(detector: Detector) -> dict[str, nn.Module]:
    """Return the model of each row. The models share the outputs of their convolutions, but not the order of calls."""
    memo = {id(leaf): leaf for leaf in detector.leaves}
    return {"ours": accelerate(copy.deepcopy(detector.model, memo)), "torchvision": detector.model}


def name_of(what: str, family: str, detector: Detector, dtype: torch.dtype) -> str:
    """Return the name of a group of rows."""
    height, width = detector.size
    size = f"{len(detector.images)} x {height} x {width}, {CLASSES} classes, {OBJECTS} objects"
    return f"{what}, {family}, {size}, {str(dtype).removeprefix('torch.')}"


@pytest.mark.parametrize("row", ("ours", "torchvision"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", NAMES)
def test_matching_and_losses(compare, device, family, dtype, row):
    detector = FAMILIES[family](device, dtype, FEW)
    models = rows_of(detector)

    def step_of(row: str) -> Callable[[], tuple[Tensor, ...]]:
        model = models[row].train()

        def step() -> tuple[Tensor, ...]:
            torch.manual_seed(0)  # for the samplers of Faster R-CNN
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                losses = model(detector.images, detector.targets)
            values = torch.stack([loss.float() for loss in losses.values()])
            return (values.detach(), *torch.autograd.grad(values.sum(), detector.leaves))

        return step

    def check(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
        exact = dtype == torch.float32
        # torchvision's focal loss is wrong for negatives in bfloat16.
        torch.testing.assert_close(actual[0][0 if exact else 1 :], expected[0][0 if exact else 1 :], rtol=0.1, atol=0)
        for a, e in list(zip(actual[1:], expected[1:], strict=True))[: len(detector.leaves) - detector.random]:
            assert not exact or (a - e).norm() <= 1e-4 * e.norm()

    theirs = step_of("torchvision")
    group = name_of("matching and losses with gradients", family, detector, dtype)
    compare(row, step_of(row), theirs(), check=check, group=group, rival=theirs if row == "ours" else None)


@pytest.mark.parametrize("row", ("ours", "torchvision"))
@pytest.mark.parametrize("bias", (FEW, MANY), ids=("few", "many"))
@pytest.mark.parametrize("family", NAMES)
def test_post_processing(compare, device, family, bias, row):
    # torchvision's NMS takes no bfloat16 on the CPU.
    detector = FAMILIES[family](device, torch.float32, bias)
    models = rows_of(detector)

    def infer_of(row: str) -> Callable[[], Any]:
        model = models[row].eval()
        return torch.no_grad()(lambda: model(detector.images))

    theirs = infer_of("torchvision")
    what = f"post-processing, {'few' if bias == FEW else 'many'} candidates"
    group = name_of(what, family, detector, torch.float32)
    compare(row, infer_of(row), theirs(), check=check_detections, group=group, rival=theirs if row == "ours" else None)


#: By family: torchvision's function that makes the network, height and width of an image, and images in a batch.
NETWORKS: dict[str, tuple[Callable[..., nn.Module], tuple[int, int], int]] = {
    "FCOS": (fcos_resnet50_fpn, COCO_SIZE, 1),
    "SSD300": (ssd300_vgg16, (300, 300), 8),
    "SSDlite320": (ssdlite320_mobilenet_v3_large, (320, 320), 8),
    "Faster R-CNN": (fasterrcnn_resnet50_fpn, COCO_SIZE, 1),
}


@pytest.mark.full
@pytest.mark.parametrize("row", ("ours", "torchvision"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", tuple(NETWORKS))
def test_whole_step(compare, device, family, dtype, row):
    """Measure images to gradients of all weights, with the network and without the optimizer."""
    build, size, count = NETWORKS[family]
    torch.manual_seed(0)
    theirs = build(weights=None, weights_backbone=None, num_classes=CLASSES).to(device)
    boxes = (
        square_boxes(size[0], count, device) if family.startswith("SSD") else [ground_truth(OBJECTS, device)] * count
    )
    images = [torch.rand(3, *size, device=device) for _ in range(count)]
    targets = [{"boxes": b, "labels": torch.randint(1, CLASSES, (len(b),), device=device)} for b in boxes]
    models = {"ours": accelerate(copy.deepcopy(theirs)), "torchvision": theirs}

    def step_of(row: str) -> Callable[[], Tensor]:
        model = models[row].train()

        def step() -> Tensor:
            torch.manual_seed(0)  # for dropout and the samplers of Faster R-CNN
            model.zero_grad()
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                losses = model(images, targets)
            values = torch.stack([loss.float() for loss in losses.values()])
            values.sum().backward()
            return values.detach()

        return step

    def check(actual: Tensor, expected: Tensor) -> None:
        if dtype == torch.float32:
            torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)

    rival = step_of("torchvision")
    height, width = size
    group = (
        f"whole step, {family}, {count} x {height} x {width}, {CLASSES} classes, {str(dtype).removeprefix('torch.')}"
    )
    compare(row, step_of(row), rival(), check=check, group=group, rival=rival if row == "ours" else None)


@pytest.mark.parametrize("row", ("ours", "torchvision"))
@pytest.mark.parametrize("training", (True, False), ids=("training", "evaluation"))
def test_region_proposals(compare, device, training, row):
    """Measure the region proposal network: proposals, and in training also matching, sampling and losses."""
    detector = faster_rcnn(device, torch.float32, FEW)
    models = rows_of(detector)
    batch, targets = detector.model.transform(detector.images, detector.targets)

    def run_of(row: str) -> Callable[[], Any]:
        network, features = models[row].rpn.train(training), detector.model.backbone(batch.tensors)
        return torch.no_grad()(lambda: network(batch, features, targets))

    def check(actual: Any, expected: Any) -> None:
        for a, e in zip(actual[0], expected[0], strict=True):
            # Equal scores may be in another order, and rounding may change a decision of NMS.
            assert len(a) == len(e) and ((a - e).abs().amax(1) < 0.01).float().mean() > 0.9
        assert len(actual[1]) == (2 if training else 0)

    theirs = run_of("torchvision")
    what = "anchors to proposals and losses" if training else "anchors to proposals"
    group = name_of(what, "Faster R-CNN", detector, torch.float32)
    compare(row, run_of(row), theirs(), check=check, group=group, rival=theirs if row == "ours" else None)
