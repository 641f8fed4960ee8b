"""The code of docs/use-in-your-detector.md runs, and its losses, gradients and assignments equal torchvision's."""

from __future__ import annotations

import copy
import functools
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import retinanet_ops as ops
from retinanet_ops.reference._rows import rows_of

pytest.importorskip("torchvision")
from torchvision.models.detection import FCOS
from torchvision.models.detection._utils import BoxCoder, Matcher, SSDMatcher
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.ssd import SSD
from torchvision.ops import box_iou
from torchvision.ops import sigmoid_focal_loss as torchvision_focal_loss

from retinanet_ops.integrations.torchvision import restore

PAGE = Path(__file__).parents[2] / "docs" / "use-in-your-detector.md"
pytestmark = pytest.mark.skipif(not PAGE.exists(), reason="the documents are only in the source tree")

DTYPES = (torch.float32, torch.float64)
CLASSES = 4
#: By batch: the number of objects in each of its images.
BATCHES = ((3, 0), (1, 6, 12), (0, 0), (9,))


@functools.cache
def example(title: str) -> dict[str, Any]:
    """Run the code of a section of the page and return the names that it defines."""
    section = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", PAGE.read_text(), flags=re.DOTALL | re.MULTILINE)
    assert section, f"no section {title!r}"
    (block,) = re.findall(r"```python\n(.*?)```", section[1], flags=re.DOTALL)
    names: dict[str, Any] = {}
    with torch.random.fork_rng(devices=[]):  # independent of the order of the tests
        torch.manual_seed(0)
        exec(block, names)
    return names


def fcos() -> dict[str, Any]:
    return example("torchvision's FCOS with our assignment and losses")


def ssd() -> dict[str, Any]:
    return example("torchvision's SSD with our matching and hard negatives")


def rcnn() -> dict[str, Any]:
    return example("torchvision's Faster R-CNN with classes of your own")


def loop() -> dict[str, Any]:
    return example("A plain loop")


def random_boxes(count: int, height: int, width: int, least: float = 6.0) -> Tensor:  # [count, 4]
    """Return boxes within an image, with sides spread evenly on a logarithmic scale."""
    size = torch.tensor([width, height])
    sides = least * (0.9 * size / least) ** torch.rand(count, 2)
    corner = torch.rand(count, 2) * (size - sides)
    return torch.cat((corner, corner + sides), dim=1)


def random_batch(
    counts: tuple[int, ...], height: int, width: int, dtype: torch.dtype, first_class: int = 0
) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    images = [torch.rand(3, height, width, dtype=dtype) for _ in counts]
    targets = [
        {
            "boxes": random_boxes(count, height, width).to(dtype),
            "labels": torch.randint(first_class, CLASSES, (count,)),
        }
        for count in counts
    ]
    return images, targets


class Pyramid(nn.Module):
    """A backbone with strides 8, 16, 32 ..., without normalisation, which would amplify rounding in gradients."""

    out_channels: Any

    def __init__(self, levels: int, channels: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 7, stride=8, padding=3)
        self.down = nn.ModuleList(nn.Conv2d(channels, channels, 3, stride=2, padding=1) for _ in range(levels - 1))

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        maps = [self.stem(images)]
        for layer in self.down:
            maps.append(layer(maps[-1].relu()))
        return OrderedDict((str(i), level) for i, level in enumerate(maps))


def assert_equal_gradients(model: nn.Module, expected: nn.Module) -> None:
    for (name, parameter), other in zip(model.named_parameters(), expected.parameters(), strict=True):
        zeros = torch.zeros_like(parameter)
        got, want = (zeros if p.grad is None else p.grad for p in (parameter, other))
        assert (got - want).norm() <= 1e-4 * want.norm(), name


def assert_equal_training(
    models: tuple[nn.Module, nn.Module], images: list[Tensor], targets: list[dict[str, Tensor]]
) -> None:
    """Compare the losses, and the gradients of each loss separately, so that no loss hides errors of another."""
    losses, expected = (model(images, targets) for model in models)
    assert (losses["bbox_regression"] > 0) == any(len(t["boxes"]) for t in targets)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=0)
    for name in losses:
        for model, values in zip(models, (losses, expected), strict=True):
            model.zero_grad()
            values[name].backward(retain_graph=True)
        assert_equal_gradients(*models)


class TestPage:
    @pytest.mark.parametrize("names", (fcos, ssd))
    def test_the_detectors_of_the_page_train(self, names):
        model, losses = names()["model"], names()["losses"]
        assert all(loss.isfinite() and loss > 0 for loss in losses.values())
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)

    def test_the_loop_of_the_page_trains(self):
        history = loop()["history"]
        assert history.isfinite().all() and (history[-1] < history[0]).all()

    def test_every_block_of_code_is_one_of_these(self):
        assert PAGE.read_text().count("```python\n") == 4


class TestFCOS:
    @staticmethod
    def models(dtype: torch.dtype, spread: bool) -> tuple[FCOS, FCOS]:
        backbone = Pyramid(
            5, channels=64
        )  # two channels per group of the heads' GroupNorm, which would turn a single value into 0
        backbone.out_channels = 64
        expected = FCOS(backbone, CLASSES, min_size=160, max_size=256).to(dtype)
        if spread:
            # After initialisation, half of the distances are 0, and most of the others are small.
            head = expected.head.regression_head
            nn.init.normal_(head.bbox_reg.weight, std=0.3)
            nn.init.normal_(head.bbox_ctrness.weight, std=0.3)
            nn.init.constant_(head.bbox_reg.bias, 2.0)
            nn.init.normal_(expected.head.classification_head.cls_logits.weight, std=0.3)
        model = copy.deepcopy(expected)
        model.__class__ = fcos()["OpsFCOS"]
        return model, expected

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("spread", (False, True))
    @pytest.mark.parametrize("counts", BATCHES)
    def test_losses_and_gradients_are_torchvisions(self, counts, spread, dtype):
        assert_equal_training(self.models(dtype, spread), *random_batch(counts, 160, 224, dtype))

    def test_gradients_at_boxes_without_width(self):
        """Compare gradients of the distances themselves, because the heads' ReLU hides them at a distance of 0."""
        model, expected = self.models(torch.float32, spread=False)
        images, targets = random_batch((6, 2), 160, 224, torch.float32)
        outputs = []
        for detector in (model, expected):
            detector.head.register_forward_hook(lambda module, inputs, output: outputs.append(output))
            losses = detector(images, targets)
            outputs[-1]["bbox_regression"].retain_grad()
            losses["bbox_regression"].backward()
        left, top, right, bottom = outputs[0]["bbox_regression"].unbind(-1)
        narrow = (left + right == 0) | (top + bottom == 0)
        got, wanted = (output["bbox_regression"].grad for output in outputs)
        assert (wanted[narrow] != 0).any() and (wanted[~narrow] != 0).any()
        assert got.isfinite().all()
        assert (got - wanted)[~narrow].norm() <= 1e-4 * wanted[~narrow].norm()


class TestSSD:
    SIZE = (160, 160)

    def models(self, dtype: torch.dtype) -> tuple[SSD, SSD]:
        backbone = Pyramid(4, channels=16)
        backbone.out_channels = [16] * 4
        parts = backbone, DefaultBoxGenerator([[2], [2, 3], [2, 3], [2]]), self.SIZE, CLASSES
        expected = SSD(*parts).to(dtype)
        model = ssd()["OpsSSD"](*parts).to(dtype)
        model.load_state_dict(expected.state_dict())
        return model, copy.deepcopy(expected)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("counts", BATCHES)
    def test_losses_and_gradients_are_torchvisions(self, counts, dtype):
        assert_equal_training(self.models(dtype), *random_batch(counts, 160, 200, dtype, first_class=1))

    def test_detections_are_torchvisions(self):
        model, expected = (m.eval() for m in self.models(torch.float32))
        images = [torch.rand(3, 160, 200)]
        for name, value in expected(images)[0].items():
            assert torch.equal(model(images)[0][name], value), name

    @staticmethod
    def default_boxes(name: str) -> Tensor:  # [A, 4]
        """Return the default boxes of torchvision's ssd300_vgg16 or ssdlite320_mobilenet_v3_large."""
        if name == "ssd300":
            scales = [0.07, 0.15, 0.33, 0.51, 0.69, 0.87, 1.05]
            steps = [8, 16, 32, 64, 100, 300]
            generator = DefaultBoxGenerator([[2], [2, 3], [2, 3], [2, 3], [2], [2]], scales=scales, steps=steps)
            size, maps = 300, (38, 19, 10, 5, 3, 1)
        else:
            generator = DefaultBoxGenerator([[2, 3]] * 6, min_ratio=0.2, max_ratio=0.95)
            size, maps = 320, (20, 10, 5, 3, 2, 1)
        images = ImageList(torch.empty(1, 3, size, size), [(size, size)])
        return generator(images, [torch.empty(1, 1, side, side) for side in maps])[0]

    @pytest.mark.parametrize("whole_pixels", (False, True))
    @pytest.mark.parametrize("name", ("ssd300", "ssdlite"))
    def test_assignments_are_torchvisions(self, name, whole_pixels):
        anchors = self.default_boxes(name)
        model = ssd()["model"]
        ties = shared = 0
        for _ in range(10):
            boxes = [random_boxes(count, 300, 300) for count in (1, 0, 17, 60)]
            boxes[3][:5] = boxes[3][5:10] + 0.1  # objects that share a default box
            if whole_pixels:
                boxes = [torch.cat((b[:, :2].floor(), b[:, 2:].ceil()), dim=1) for b in boxes]
            matches = model.match(ops.pad_boxes(boxes), anchors)
            for image_boxes, row in zip(boxes, matches, strict=True):
                if not len(image_boxes):
                    assert (row == -1).all()
                    continue
                iou = box_iou(image_boxes, anchors)
                assert torch.equal(row, SSDMatcher(0.5)(iou))
                best = iou.max(1)
                ties += int(((iou == best.values[:, None]).sum(1) > 1).sum())
                shared += len(image_boxes) - len(best.indices.unique())
        assert ties > 50 and shared > 5

    def test_objects_that_overlap_nothing_or_have_no_area_take_no_default_box(self):
        anchors = self.default_boxes("ssdlite")
        boxes = torch.tensor([[500.0, 500, 600, 600], [50, 50, 50, 80], [50, 80, 90, 50]])
        assert (ssd()["model"].match(ops.pad_boxes([boxes]), anchors) == -1).all()
        expected = SSDMatcher(0.5)(box_iou(boxes[:1], anchors))
        assert expected[0] == 0 and (expected[1:] == -1).all()

    def test_mmdets_rule_promotes_ties(self):
        anchors = self.default_boxes("ssdlite")
        truth = ops.pad_boxes([torch.tensor([[150.0, 150, 160, 160]])])
        matches = ops.match_anchors(anchors, *truth, rule=ops.MatchRule(0.5, 0.5, low_quality="mmdet"))
        assert (matches == 0).sum() > 1
        assert (ssd()["model"].match(truth, anchors) == 0).sum() == 1

    def test_torchvision_counts_positives_twice_when_negatives_are_few(self):
        truth = [{"boxes": torch.tensor([[10.0, 10, 50, 50]]), "labels": torch.tensor([1])}]
        anchors = truth[0]["boxes"].repeat(2, 1)
        outputs = {"bbox_regression": torch.randn(1, 2, 4), "cls_logits": torch.randn(1, 2, CLASSES)}
        matches = torch.tensor([[0, -1]])
        model, expected = self.models(torch.float32)
        packed = ops.pad_ground_truth([t["boxes"] for t in truth], [t["labels"] for t in truth])
        got = model.compute_loss(packed, outputs, anchors, matches)["classification"]
        entropy = F.cross_entropy(outputs["cls_logits"][0], torch.tensor([1, 0]), reduction="none")
        torch.testing.assert_close(got, entropy.sum())
        doubled = expected.compute_loss(truth, outputs, [anchors], list(matches))["classification"]
        torch.testing.assert_close(doubled, entropy.sum() + entropy[0])


def plain_losses(
    logits: list[Tensor], deltas: list[Tensor], anchors: Tensor, boxes: list[Tensor], labels: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the focal loss, L1 loss and matches [N, A], computed image by image with torchvision."""
    coder, matcher = BoxCoder((1.0, 1.0, 1.0, 1.0)), Matcher(0.5, 0.4, allow_low_quality_matches=True)
    focal, box, all_matches = torch.zeros(()), torch.zeros(()), []
    for row_logits, row_deltas, image_boxes, image_labels in zip(
        rows_of(logits, loop()["CLASSES"]), rows_of(deltas, 4), boxes, labels, strict=True
    ):
        if len(image_boxes):
            matches = matcher(box_iou(image_boxes, anchors))
        else:
            matches = torch.full((len(anchors),), -1)
        positive, counted = matches >= 0, matches != -2
        one_hot = torch.zeros_like(row_logits)
        one_hot[positive, image_labels[matches[positive]]] = 1.0
        focal = focal + torchvision_focal_loss(row_logits[counted], one_hot[counted], reduction="sum")
        wanted = coder.encode_single(image_boxes[matches[positive]], anchors[positive])
        box = box + F.l1_loss(row_deltas[positive], wanted, reduction="sum")
        all_matches.append(matches)
    matches = torch.stack(all_matches)
    num_positive = max(1, int((matches >= 0).sum()))
    return focal / num_positive, box / num_positive, matches


class TestLoop:
    HEIGHT, WIDTH = 96, 128

    def anchors(self, logits: list[Tensor]) -> Tensor:  # [A, 4]
        """Return the anchors by their definition: rounded boxes around the corner of each cell, ratio by ratio."""
        rows = []
        for level, sizes, ratios in zip(logits, loop()["SIZES"], loop()["RATIOS"], strict=True):
            height, width = level.shape[-2:]
            for y in range(height):
                for x in range(width):
                    centre = torch.tensor([x * (self.WIDTH // width), y * (self.HEIGHT // height)])
                    for ratio in ratios:
                        for size in sizes:
                            half = torch.tensor([size / ratio**0.5, size * ratio**0.5]) / 2
                            rows.append(torch.cat((centre - half.round(), centre + half.round())))
        return torch.stack(rows)

    def batch(self, counts: tuple[int, ...]) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        images = torch.rand(len(counts), 3, self.HEIGHT, self.WIDTH)
        boxes = [random_boxes(count, self.HEIGHT, self.WIDTH) for count in counts]
        return images, boxes, [torch.randint(0, loop()["CLASSES"], (count,)) for count in counts]

    @pytest.mark.parametrize("counts", BATCHES)
    def test_losses_gradients_and_assignments(self, counts):
        network = loop()["Network"]()
        expected = copy.deepcopy(network)
        images, boxes, labels = self.batch(counts)
        truth = ops.pad_ground_truth(boxes, labels)
        focal, box, targets = loop()["compute_losses"](*network(images), images.shape[-2:], truth)
        logits, deltas = expected(images)
        expected_focal, expected_box, matches = plain_losses(logits, deltas, self.anchors(logits), boxes, labels)
        assert torch.equal(targets.matches.long(), matches)
        assert sum(counts) == 0 or ((matches == -2).any() and (matches >= 0).any())
        torch.testing.assert_close((focal, box), (expected_focal, expected_box), rtol=1e-5, atol=0)
        for loss, plain_loss in ((focal, expected_focal), (box, expected_box)):
            network.zero_grad()
            expected.zero_grad()
            loss.backward(retain_graph=True)
            if plain_loss.requires_grad:
                plain_loss.backward(retain_graph=True)
            assert_equal_gradients(network, expected)

    def test_training_takes_the_same_steps(self):
        network = loop()["Network"]()
        expected = copy.deepcopy(network)
        batches = [self.batch(counts) for counts in BATCHES]
        history = loop()["train"](network, batches)
        optimizer = torch.optim.SGD(expected.parameters(), lr=0.01, momentum=0.9)
        for (images, boxes, labels), losses in zip(batches, history, strict=True):
            logits, deltas = expected(images)
            focal, box, _ = plain_losses(logits, deltas, self.anchors(logits), boxes, labels)
            torch.testing.assert_close(losses, torch.stack((focal, box)).detach(), rtol=1e-5, atol=0)
            optimizer.zero_grad()
            (focal + box).backward()
            optimizer.step()


def test_faster_rcnn_has_torchvisions_losses() -> None:
    names = rcnn()
    model, losses = names["model"], []
    assert model.roi_heads.box_predictor.cls_score.weight.grad.shape[0] == 3
    for each in (model, restore(copy.deepcopy(model))):
        torch.manual_seed(0)
        losses.append(each(names["images"], names["targets"]))
    assert sum(losses[0].values()) > 0
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-7)
