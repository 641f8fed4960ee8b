"""Cases of SSD, YOLO and detection metrics that can be worked by hand, and the numbers of docs/detectors.md."""

from __future__ import annotations

import functools
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import retinanet_ops as ops

pytest.importorskip("torchvision")
import torchvision
from torchvision.models.detection import ssd300_vgg16
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.ssd import SSD, SSDHead

from retinanet.detection.coco_input import CocoInput
from retinanet.detection.score_curves import score_curves
from retinanet.training.anchor_fit import fit_shapes

PAGE = Path(__file__).parents[2] / "docs" / "detectors.md"
pytestmark = pytest.mark.skipif(not PAGE.exists(), reason="the documents are only in the source tree")

RATIOS_300 = [[2], [2, 3], [2, 3], [2, 3], [2], [2]]
SIDES_300 = (38, 19, 10, 5, 3, 1)
RATIOS_512 = [[2], [2, 3], [2, 3], [2, 3], [2, 3], [2], [2]]
SIDES_512 = (64, 32, 16, 8, 4, 2, 1)


def assert_page_says(*sentences: str) -> None:
    text = " ".join(PAGE.read_text(encoding="utf-8").split())
    assert [sentence for sentence in sentences if sentence not in text] == []


def default_boxes(generator: DefaultBoxGenerator, size: int, sides: tuple[int, ...]) -> Tensor:  # [A, 4]
    """Return the default boxes of an image with size x size pixels, for square feature maps with these sides."""
    images = ImageList(torch.zeros(1, 3, size, size), [(size, size)])
    return generator(images, [torch.zeros(1, 1, side, side) for side in sides])[0]


def corners(cx: float, cy: float, width: float, height: float) -> Tensor:  # [1, 4] float64
    box = (cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2)
    return torch.tensor([box], dtype=torch.float64)


@functools.cache
def ssd300() -> SSD:
    return ssd300_vgg16(weights=None, weights_backbone=None, num_classes=91).eval()


class TestDefaultBoxes:
    GENERATOR = DefaultBoxGenerator(RATIOS_300, min_ratio=0.2, max_ratio=0.9, clip=False)

    def test_a_head_has_four_deltas_and_a_score_of_each_class_and_of_background(self):
        outputs = SSDHead([8], [6], num_classes=21)([torch.zeros(1, 8, 5, 7)])
        assert sum(output.numel() for output in outputs.values()) == (4 + 21) * 6 * 5 * 7
        assert_page_says("A feature map of m x n cells with k default boxes in each has (4 + c) k m n outputs.")

    def test_scales_are_evenly_spaced(self):
        scales = self.GENERATOR.scales[:6]
        assert scales == pytest.approx([0.2, 0.34, 0.48, 0.62, 0.76, 0.9], abs=1e-12)
        row = " | ".join(f"{scale:.2f}" for scale in scales)
        assert_page_says(f"| s_k for s_min = 0.2, s_max = 0.9 | {row} |")

    def test_the_second_square_box_lies_between_two_scales(self):
        sides = [float(pairs[1, 0]) for pairs in self.GENERATOR._wh_pairs]
        assert sides == pytest.approx([0.260768, 0.403980, 0.545527, 0.686440, 0.827043, 0.948683], abs=5e-7)
        # The paper's rule of the scales gives the scale after the last; torchvision takes 1.
        scale = 0.2 + (0.9 - 0.2) / 5 * 6
        of_paper = [*sides[:5], math.sqrt(0.9 * scale)]
        assert of_paper[-1] == pytest.approx(0.967471, abs=5e-7)
        row = " | ".join(f"{side:.6f}" for side in of_paper)
        assert_page_says(
            f"| side of the second square box | {row} |",
            f"The last column takes {scale:.2f} for s_7. torchvision takes 1, which gives a side of {sides[-1]:.6f}.",
        )

    def test_torchvision_states_the_scales_of_ssd300(self):
        scales = ssd300().anchor_generator.scales
        assert scales == [0.07, 0.15, 0.33, 0.51, 0.69, 0.87, 1.05]
        words = [str(scale) for scale in scales]
        assert_page_says(f"torchvision's SSD300 has the scales {', '.join(words[:-1])} and {words[-1]} instead.")

    def test_boxes_of_one_scale_have_one_area(self):
        pairs = DefaultBoxGenerator([[2, 3]], scales=[0.2, 0.34])._wh_pairs[0].double()
        expected = [0.2, 0.282843, 0.346410], [0.2, 0.141421, 0.115470]
        assert pairs[[0, 2, 4], 0].tolist() == pytest.approx(expected[0], abs=5e-7)
        assert pairs[[0, 2, 4], 1].tolist() == pytest.approx(expected[1], abs=5e-7)
        assert torch.equal(pairs[[3, 5]], pairs[[2, 4]].flip(1))
        assert pairs[[0, 2, 3, 4, 5]].prod(1).tolist() == pytest.approx([0.04] * 5, rel=1e-6)
        for name, column in (("width", 0), ("height", 1)):
            cells = (f"{value:.6f}" for value in pairs[[2, 4], column].tolist())
            assert_page_says(f"| {name} | 0.2 | {' | '.join(cells)} |")

    def test_centres_lie_in_the_middle_of_the_cells(self):
        boxes = default_boxes(DefaultBoxGenerator([[2]], scales=[0.2, 0.34]), 100, (4,))
        centres = (boxes[:, :2] + boxes[:, 2:]) / 2
        expected = [[100 * (j + 0.5) / 4, 100 * (i + 0.5) / 4] for i in range(4) for j in range(4) for _ in range(4)]
        torch.testing.assert_close(centres, torch.tensor(expected))

    def test_ssd300_has_8732_default_boxes(self):
        model = ssd300()
        with torch.inference_mode():
            features = list(model.backbone(torch.zeros(1, 3, 300, 300)).values())
        assert tuple(feature.shape[-1] for feature in features) == SIDES_300
        boxes = model.anchor_generator(ImageList(torch.zeros(1, 3, 300, 300), [(300, 300)]), features)[0]
        per_cell = model.anchor_generator.num_anchors_per_location()
        assert per_cell == [4, 6, 6, 6, 4, 4]
        counts = [number * side**2 for number, side in zip(per_cell, SIDES_300, strict=True)]
        assert counts == [5776, 2166, 600, 150, 36, 4] and len(boxes) == sum(counts) == 8732
        assert_page_says(
            "SSD300 has maps of 38, 19, 10, 5, 3 and 1 cells with 4, 6, 6, 6, 4 and 4 boxes in each cell: "
            f"{' + '.join(f'{count:,}' for count in counts)} = {len(boxes):,} default boxes.",
            f"All {len(boxes):,} default boxes count",
        )

    def test_ssd512_has_24564_default_boxes(self):
        scales = [0.07, 0.15, 0.3, 0.45, 0.6, 0.75, 0.9, 1.05]
        generator = DefaultBoxGenerator(RATIOS_512, scales=scales, steps=[8, 16, 32, 64, 128, 256, 512])
        boxes = default_boxes(generator, 512, SIDES_512)
        assert len(boxes) == 24_564
        sides = boxes[:, 2:] - boxes[:, :2]
        torch.testing.assert_close(sides[0], torch.full((2,), 0.07 * 512))
        torch.testing.assert_close(sides[-4], torch.full((2,), 0.9 * 512))
        assert_page_says(f"SSD512 has {len(boxes):,}.")

    def test_torchvisions_ssd300_has_35_641_826_parameters(self):
        count = sum(parameter.numel() for parameter in ssd300().parameters())
        assert count == 35_641_826
        assert_page_says(f"torchvision's SSD300 for 91 classes has {count:,} parameters.")


class TestLoss:
    WEIGHTS = (10.0, 10.0, 5.0, 5.0)

    def test_deltas_are_relative_to_the_default_box(self):
        default, target = corners(0.5, 0.5, 0.2, 0.4), corners(0.55, 0.45, 0.3, 0.3)
        deltas = ops.encode_boxes(target, default)
        assert deltas[0].tolist() == pytest.approx([0.25, -0.125, 0.40546511, -0.28768207], abs=5e-9)
        scaled = ops.encode_boxes(target, default, coder_weights=self.WEIGHTS)
        assert scaled[0].tolist() == pytest.approx([2.5, -1.25, 2.02732554, -1.43841036], abs=5e-9)
        theirs = ssd300().box_coder.encode_single(target, default)
        torch.testing.assert_close(scaled, theirs, rtol=1e-6, atol=0)
        plain, multiplied = (
            f"({', '.join(f'{value:.8f}'.rstrip('0') for value in values[0].tolist())})" for values in (deltas, scaled)
        )
        assert_page_says(
            "the default box with centre (0.5, 0.5), width 0.2 and height 0.4, and the object with centre (0.55, "
            f"0.45), width 0.3 and height 0.3, the deltas are {plain}.",
            f"SSD multiplies them by the coder weights (10, 10, 5, 5): {multiplied}.",
            "variances 0.1, 0.1, 0.2, 0.2 (SSD) | their reciprocals, `coder_weights=(10, 10, 5, 5)`",
        )

    def test_smooth_l1_of_the_deltas(self):
        default, target = corners(0.5, 0.5, 0.2, 0.4), corners(0.55, 0.45, 0.3, 0.3)
        zeros = torch.zeros(1, 4, 1, 1, dtype=torch.float64)
        matches = torch.zeros(1, 1, dtype=torch.int64)
        loss = ops.dense_box_loss([zeros], default, target[None], matches, kind="smooth_l1", beta=1.0)
        assert loss.item() == pytest.approx(0.16264396, abs=5e-9)
        assert_page_says(f"the smooth L1 loss of the former is {loss.item():.8f}.")

    @staticmethod
    def ssd_loss(logits: Tensor, deltas: Tensor, anchors: Tensor, boxes: Tensor, labels: Tensor, matches: Tensor):
        """Return both terms of SSD's loss with the ops, for images [N] with one object each."""
        box = ops.dense_box_loss(
            [deltas.transpose(1, 2)[..., None]],
            anchors,
            boxes,
            matches,
            kind="smooth_l1",
            beta=1.0,
            coder_weights=TestLoss.WEIGHTS,
        )
        classes = torch.where(matches >= 0, labels[:, None], 0)
        entropy = F.cross_entropy(logits.transpose(1, 2), classes, reduction="none")
        counted = (matches >= 0) | ops.hard_negative_mask(entropy, matches)
        number = (matches >= 0).sum().clamp(min=1)
        return box.sum() / number, (entropy * counted).sum() / number

    def test_the_loss_is_divided_by_the_number_of_matched_default_boxes(self):
        torch.manual_seed(0)
        anchors = torch.rand(40, 2).repeat(1, 2) * 50 + torch.tensor([0.0, 0, 20, 20])
        boxes, labels = anchors[:2, None] + 3, torch.tensor([2, 1])
        matches = torch.full((2, 40), -1)
        matches[0, [0, 7, 9]], matches[1, [1, 4]] = 0, 0
        logits, deltas = torch.randn(2, 40, 4), torch.randn(2, 40, 4)
        box, classification = self.ssd_loss(logits, deltas, anchors, boxes, labels, matches)

        probabilities = logits.double().softmax(dim=2)
        expected = torch.zeros((), dtype=torch.float64)
        for image, matched in enumerate(([0, 7, 9], [1, 4])):
            expected -= probabilities[image, matched, labels[image]].log().sum()
            background = -probabilities[image, :, 0].log()
            background[matched] = -math.inf
            expected += background.topk(3 * len(matched)).values.sum()
        torch.testing.assert_close(classification.double(), expected / 5, rtol=1e-5, atol=0)  # not by 80

        targets = [{"boxes": boxes[i], "labels": labels[i : i + 1]} for i in range(2)]
        outputs = {"bbox_regression": deltas, "cls_logits": logits}
        theirs = ssd300().compute_loss(targets, outputs, [anchors] * 2, list(matches))
        torch.testing.assert_close(box, theirs["bbox_regression"], rtol=1e-5, atol=0)
        torch.testing.assert_close(classification, theirs["classification"], rtol=1e-5, atol=0)
        assert_page_says("L = (L_conf + L_loc) / N, where N is the number of matched default boxes.")

    def test_an_image_without_matched_default_boxes_has_no_loss(self):
        anchors, boxes = torch.tensor([[0.0, 0, 10, 10]] * 5), torch.zeros(1, 1, 4)
        outputs = torch.randn(1, 5, 4)
        loss = self.ssd_loss(outputs, outputs, anchors, boxes, torch.tensor([1]), torch.full((1, 5), -1))
        assert torch.stack(loss).tolist() == [0, 0]
        assert_page_says("If there are none, the loss is 0.")

    def test_two_matched_boxes_take_the_six_negatives_with_the_highest_loss(self):
        loss = torch.tensor([[9.0, 1, 5, 5, 5, 3, 8, 7, 5, 5, 2]])
        matches = torch.full((1, 11), -1)
        matches[0, [0, 10]] = 0
        # Five losses are 5. The four of them with the lowest indices are taken.
        assert ops.hard_negative_mask(loss, matches)[0].nonzero()[:, 0].tolist() == [2, 3, 4, 6, 7, 8]
        assert_page_says("so 2 matched boxes go with 6 hard negatives")

    def test_an_image_without_objects_has_hard_negatives_only_on_request(self):
        loss, matches = torch.rand(1, 20), torch.full((1, 20), -1)
        assert not ops.hard_negative_mask(loss, matches).any()
        mask = ops.hard_negative_mask(loss, matches, min_negatives=4)
        assert set(mask[0].nonzero()[:, 0].tolist()) == set(loss[0].topk(4).indices.tolist())


class TestFocalLossOfSSD:
    BOXES, CLASSES, MATCHED = 8732, 5, 7

    def targets(self) -> Tensor:  # [A], 0 is the background
        torch.manual_seed(0)
        classes = torch.zeros(self.BOXES, dtype=torch.int64)
        classes[torch.randperm(self.BOXES)[: self.MATCHED]] = torch.randint(1, 1 + self.CLASSES, (self.MATCHED,))
        return classes

    def test_sigmoid_form_counts_all_default_boxes_and_is_divided_by_the_matched_ones(self):
        classes = self.targets()
        bias = -math.log(0.99 / 0.01)
        logits = (torch.randn(self.BOXES, self.CLASSES) + bias).requires_grad_()
        loss = ops.sigmoid_focal_loss(logits, classes - 1, reduction="sum") / (classes > 0).sum()
        loss.backward()
        assert logits.grad is not None and (logits.grad != 0).all()
        one_hot = F.one_hot(classes, 1 + self.CLASSES)[:, 1:].double()
        theirs = torchvision.ops.sigmoid_focal_loss(logits.double(), one_hot, reduction="sum") / self.MATCHED
        torch.testing.assert_close(loss.double(), theirs, rtol=1e-5, atol=0)
        assert_page_says(f"Its bias starts at {bias:.6f}, which makes each class start with a probability of 0.01")

    def test_softmax_form_is_the_sigmoid_of_a_difference(self):
        (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
        names: dict[str, Any] = {}
        exec(block, names)
        classes = self.targets()
        logits = torch.randn(self.BOXES, 1 + self.CLASSES, dtype=torch.float64, requires_grad=True)
        loss = names["softmax_focal_loss"](logits, classes).sum() / self.MATCHED

        truth = logits.softmax(dim=1).gather(1, classes[:, None])[:, 0]
        weight = torch.where(classes > 0, 0.25, 0.75)
        expected = -(weight * (1 - truth) ** 2 * truth.log()).sum() / self.MATCHED
        torch.testing.assert_close(loss, expected)
        (gradient,) = torch.autograd.grad(loss, logits)
        torch.testing.assert_close(gradient, torch.autograd.grad(expected, logits)[0])


class TestYOLO:
    SHAPES = ((10, 13), (16, 30), (33, 23), (30, 61), (62, 45), (59, 119), (116, 90), (156, 198), (373, 326))

    def test_k_means_finds_the_nine_shapes_by_area(self):
        shapes = torch.tensor(self.SHAPES, dtype=torch.float32)
        spread = torch.tensor([0.95, 1.0, 1.05])
        factors = torch.cartesian_prod(spread, spread)
        boxes = (shapes[:, None] * factors).reshape(-1, 2)
        boxes = boxes[torch.randperm(len(boxes), generator=torch.Generator().manual_seed(0))]
        assert fit_shapes(boxes, 9).tolist() == shapes.tolist()
        words = [f"{width} x {height}" for width, height in self.SHAPES]
        assert_page_says(f"{', '.join(words[:-1])} and {words[-1]} pixels")

    def test_classes_are_independent(self):
        logits = torch.tensor([[2.0, 1.0, -3.0]], dtype=torch.float64, requires_grad=True)
        targets = torch.tensor([[1.0, 1.0, 0.0]], dtype=torch.float64)  # two classes of one box
        loss = ops.sigmoid_focal_loss(logits, targets, alpha=-1, gamma=0)
        expected = [math.log1p(math.exp(-2)), math.log1p(math.exp(-1)), math.log1p(math.exp(-3))]
        assert loss[0].tolist() == pytest.approx(expected, rel=1e-12)
        loss.sum().backward()
        assert logits.grad is not None
        torch.testing.assert_close(logits.grad, logits.detach().sigmoid() - targets)
        # With a softmax, the two classes would compete.
        assert logits.detach().sigmoid()[0, :2].sum() > 1

    def test_yolov3_has_255_channels_and_10647_boxes(self):
        sizes = ((16.0, 32.0, 64.0),) * 3
        grid = ops.AnchorGrid.torchvision([(52, 52), (26, 26), (13, 13)], (416, 416), sizes, ((1.0,),) * 3)
        assert len(grid.boxes()) == 10_647
        assert_page_says(
            "YOLOv3 predicts 4 deltas, an objectness and a logit for each of 80 classes, which makes 3 x (4 + 1 + 80) "
            f"= {3 * (4 + 1 + 80)} channels for 3 anchors.",
            "An image of 416 x 416 pixels has maps of 52 x 52, 26 x 26 and 13 x 13 cells, and so "
            f"{len(grid.boxes()):,} boxes.",
        )


def row(place: int, category: int, **more: float) -> dict[str, Any]:
    """Return a box of 8 x 8 pixels; boxes of different places do not overlap."""
    return {"image_id": 1, "category_id": category, "bbox": [10 * place, 0, 8, 8], **more}


def content(categories: list[int], crowds: tuple[int, ...] = ()) -> dict[str, Any]:
    """Return an image with an object of each category in this list, at places 0, 1, 2 ..."""
    annotations = [
        row(place, category, id=place + 1, area=64, iscrowd=int(place in crowds))
        for place, category in enumerate(categories)
    ]
    return {
        "images": [{"id": 1}],
        "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}],
        "annotations": annotations,
    }


class TestPrecisionAndRecall:
    def test_each_object_is_found_once_and_only_by_its_class(self):
        right = [row(place, 1 + place % 2, score=0.9 - 0.01 * place) for place in range(8)]
        wrong_class, duplicate = row(9, 1, score=0.95), row(0, 1, score=0.5)
        curves = score_curves(CocoInput.from_coco(content([1, 2] * 6), [*right, wrong_class, duplicate]))
        counts = curves.overall.at(0.1)
        assert (counts.true_positives, counts.false_positives, counts.false_negatives) == (8, 2, 4)
        assert counts.precision == pytest.approx(0.8, abs=1e-12)
        assert counts.recall == pytest.approx(0.666667, abs=5e-7)
        assert counts.f1 == pytest.approx(0.727273, abs=5e-7)
        decided = counts.true_positives + counts.false_positives + counts.false_negatives
        assert counts.true_positives / decided == pytest.approx(0.571429, abs=5e-7)  # some call this the accuracy

    def test_each_class_has_its_own_best_threshold_and_crowds_count_nothing(self):
        found = [row(place, 1, score=score) for place, score in enumerate((0.9, 0.8, 0.7))]
        found += [row(place, 2, score=score) for place, score in ((3, 0.5), (4, 0.4))]
        wrong = [row(20, 1, score=0.6), row(21, 2, score=0.3)]
        in_crowd = row(5, 1, score=0.99)
        case = content([1, 1, 1, 2, 2, 1], crowds=(5,))
        curves = score_curves(CocoInput.from_coco(case, [*found, *wrong, in_crowd]))
        assert [curve.best_threshold() for curve in curves.by_class] == pytest.approx([0.65, 0.35])
        assert [curve.at(t).f1 for curve, t in zip(curves.by_class, (0.65, 0.35), strict=True)] == [1, 1]
        # One threshold for both classes keeps a wrong detection.
        assert curves.overall.best_threshold() == pytest.approx(0.35)
        assert curves.overall.at(0.35).f1 == pytest.approx(10 / 11)
