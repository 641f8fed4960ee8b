"""docs/other-code-bases.md: its losses equal plain ones with the rules of detectron2, mmdet and YOLO."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import retinanet_ops as ops
from retinanet_ops import reference

PAGE = Path(__file__).resolve().parents[2] / "docs" / "other-code-bases.md"
CLASSES, STRIDES, SIZE = 4, (8, 16), (96, 128)
GRID_SIZES = tuple((SIZE[0] // s, SIZE[1] // s) for s in STRIDES)
COUNTS = (7, 0, 30)


@pytest.fixture(scope="module")
def names() -> dict[str, Any]:
    """Run the code of the page, and return the names that it defines."""
    found: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL):
        exec(block, found)
    return found


def truth_of(counts: tuple[int, ...]) -> ops.GroundTruth:
    boxes, labels = [], []
    for count in counts:
        sides = 6 * 12 ** torch.rand(count, 2)
        corner = torch.rand(count, 2) * (torch.tensor([SIZE[1], SIZE[0]]) - sides)
        boxes.append(torch.cat((corner, corner + sides), dim=1))
        labels.append(torch.randint(0, CLASSES, (count,)))
    return ops.pad_ground_truth(boxes, labels)


def heads(anchors: ops.AnchorGrid) -> tuple[list[Tensor], list[Tensor]]:
    """Return random logits and deltas of each level, which require gradients."""
    per_cell = anchors.num_anchors // sum(h * w for h, w in GRID_SIZES)
    logits = [torch.randn(len(COUNTS), per_cell * CLASSES, h, w).sub_(2).requires_grad_() for h, w in GRID_SIZES]
    deltas = [torch.randn(len(COUNTS), per_cell * 4, h, w).mul_(0.3).requires_grad_() for h, w in GRID_SIZES]
    return logits, deltas


def rows_of(maps: list[Tensor], columns: int) -> Tensor:  # [N, R, columns]
    return torch.cat([m.unflatten(1, (-1, columns)).permute(0, 3, 4, 1, 2).flatten(1, 3) for m in maps], dim=1)


def plain_sums(
    logits: list[Tensor], deltas: list[Tensor], anchors: Tensor, truth: ops.GroundTruth, rule: ops.MatchRule
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sum of the focal loss, the differences of matched deltas, and the positives of each image."""
    matches, labels, positives = reference.assign_targets(anchors, truth.boxes, truth.labels, truth.count, rule=rule)[
        :3
    ]
    focal = reference.sigmoid_focal_loss(rows_of(logits, CLASSES), labels, reduction="sum")
    image, row = (matches >= 0).nonzero(as_tuple=True)
    wanted = reference.encode_boxes(truth.boxes[image, matches[image, row].long()], anchors[row])
    return focal, rows_of(deltas, 4)[image, row] - wanted, positives


def assert_same(ours: list[Tensor], theirs: list[Tensor], inputs: list[Tensor]) -> None:
    """Compare losses to 1e-5, and the gradients of each loss to 1e-4 of their norms."""
    for loss, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
        grads = (torch.autograd.grad(x, inputs, retain_graph=True, allow_unused=True) for x in (loss, expected))
        for got, want in zip(*grads, strict=True):
            assert (got is None) == (want is None)
            assert got is None or (got - want).norm() <= 1e-4 * want.norm()


class TestDetectron2:
    @pytest.fixture
    def anchors(self) -> ops.AnchorGrid:
        return ops.AnchorGrid.detectron2(GRID_SIZES, STRIDES, ((16, 24), (32, 48)))

    def test_losses_of_several_steps(self, names, anchors):
        losses, normalizer = names["Detectron2Losses"](CLASSES), 100.0
        for counts in (COUNTS, (0, 0, 0), COUNTS):
            truth, (logits, deltas) = truth_of(counts), heads(anchors)
            ours = losses(logits, deltas, anchors, truth)
            focal, difference, positives = plain_sums(logits, deltas, anchors.boxes(), truth, ops.MatchRule())
            normalizer = 0.9 * normalizer + 0.1 * max(int(positives.sum()), 1)
            box = F.smooth_l1_loss(difference, torch.zeros_like(difference), beta=0.1, reduction="sum")
            theirs = [focal / normalizer, box / normalizer]
            assert list(ours) == ["loss_cls", "loss_box_reg"]
            assert_same(list(ours.values()), theirs, [*logits, *deltas])

    def test_losses_of_two_batches_before_one_backward_pass(self, names, anchors):
        losses, (logits, deltas) = names["Detectron2Losses"](CLASSES), heads(anchors)
        first, second = (
            sum(losses(logits, deltas, anchors, truth_of(counts)).values()) for counts in ((7, 0, 0), COUNTS)
        )
        together = torch.autograd.grad(first + second, logits, retain_graph=True)
        apart = [torch.autograd.grad(loss, logits, retain_graph=True) for loss in (first, second)]
        for got, one, other in zip(together, *apart, strict=True):
            torch.testing.assert_close(got, one + other)

    def test_evaluation_leaves_the_average(self, names, anchors):
        losses = names["Detectron2Losses"](CLASSES).eval()
        losses(*heads(anchors), anchors, truth_of((7, 0, 0)))
        assert losses.normalizer == 100

    def test_the_average_is_a_part_of_the_state(self, names, anchors):
        losses = names["Detectron2Losses"](CLASSES)
        losses(*heads(anchors), anchors, truth_of((7, 0, 0)))
        other = names["Detectron2Losses"](CLASSES)
        other.load_state_dict(losses.state_dict())
        assert other.normalizer == losses.normalizer != 100


class TestMmdet:
    @pytest.mark.parametrize("kind", ("l1", "giou"))
    def test_losses(self, names, kind):
        anchors = ops.AnchorGrid.mmdet(GRID_SIZES, STRIDES, octave_base_scale=2, scales_per_octave=2)
        truth, (logits, deltas) = truth_of(COUNTS), heads(anchors)
        ours = names["retina_head_losses"](logits, deltas, anchors, truth, CLASSES, kind)
        rule = ops.MatchRule(low_quality="mmdet")
        focal, difference, positives = plain_sums(logits, deltas, anchors.boxes(), truth, rule)
        assert positives[1] == 0
        divisor = int(positives.sum()) + 1  # of which 1 is that of the image without boxes
        if kind == "l1":
            box = difference.abs().sum()
        else:
            matches = reference.assign_targets(anchors.boxes(), *truth[:3], rule=rule)[0]
            image, row = (matches >= 0).nonzero(as_tuple=True)
            decoded = reference.decode_boxes(rows_of(deltas, 4)[image, row], anchors.boxes()[row])
            wanted = truth.boxes[image, matches[image, row].long()]
            box = reference.generalized_box_iou_loss(decoded, wanted, "sum")
        assert_same(list(ours.values()), [focal / divisor, box / divisor], [*logits, *deltas])


class TestYolo:
    SHAPES = (torch.tensor([[10.0, 13], [16, 30], [33, 23]]), torch.tensor([[30.0, 61], [62, 45], [59, 80]]))

    @pytest.fixture
    def anchors(self) -> ops.AnchorGrid:
        base = [torch.cat((-s / 2, s / 2), dim=1) for s in self.SHAPES]
        return ops.AnchorGrid.from_base_anchors(base, GRID_SIZES, STRIDES, centre_offset=0.5)

    def maps(self, count: int) -> list[Tensor]:
        return [torch.randn(count, 3 * (5 + CLASSES), h, w).mul_(0.3).requires_grad_() for h, w in GRID_SIZES]

    @pytest.mark.parametrize("gamma", (0.0, 2.0))
    def test_losses(self, names, anchors, gamma):
        truth, maps = truth_of(COUNTS), self.maps(len(COUNTS))
        classes = torch.randint(0, 2, (*truth.labels.shape, CLASSES)).float()
        ours = names["yolo_losses"](maps, anchors, truth.boxes, classes, truth.count, gamma)
        rows, boxes = rows_of(maps, 5 + CLASSES), anchors.boxes()
        objectness, of_classes, of_boxes, positives = 0.0, 0.0, 0.0, 0
        for n, count in enumerate(COUNTS):
            iou = reference.box_iou(truth.boxes[n, :count], boxes)
            owner = torch.full((len(boxes),), -1)
            if count:
                owner[iou.max(0).values >= 0.5] = -2
                for i, best in enumerate(iou.max(1).indices.tolist()):  # a later object takes the anchor
                    owner[best] = i
            taken = owner >= 0
            objectness += (self.focal(rows[n, :, 4], taken.float(), gamma) * (owner != -2)).sum()
            of_classes += self.focal(rows[n, taken, 5:], classes[n][owner[taken]], gamma).sum()
            decoded = reference.decode_boxes(rows[n, taken, :4], boxes[taken])
            of_boxes += reference.generalized_box_iou_loss(decoded, truth.boxes[n][owner[taken]], "sum")
            positives += int(taken.sum())
        theirs = [x / positives for x in (objectness, of_classes, of_boxes)]
        assert list(ours) == ["objectness", "classes", "boxes"]
        assert_same(list(ours.values()), theirs, maps)

    @staticmethod
    def focal(logits: Tensor, targets: Tensor, gamma: float) -> Tensor:
        modulator = torch.where(targets == 1, -logits, logits).sigmoid() ** gamma
        return modulator * F.binary_cross_entropy_with_logits(logits, targets, reduction="none")

    def test_an_object_may_have_several_classes(self, names, anchors):
        torch.manual_seed(0)
        boxes, count = torch.tensor([[[20.0, 20, 50, 45]]]), torch.tensor([1])
        classes = torch.tensor([[[1.0, 0, 1, 0.5]]])
        maps = self.maps(1)
        optimizer = torch.optim.Adam(maps, lr=0.1)
        for _ in range(60):
            optimizer.zero_grad()
            sum(names["yolo_losses"](maps, anchors, boxes, classes, count).values()).backward()
            optimizer.step()
        rows = rows_of(maps, 5 + CLASSES)[0]
        best = rows[:, 4].argmax()
        assert rows[best, 4].sigmoid() > 0.9 and (rows[:, 4] > 0).sum() == 1
        torch.testing.assert_close(rows[best, 5:].sigmoid(), classes[0, 0], rtol=0, atol=0.1)
        decoded = ops.decode_boxes(rows[best, :4][None], anchors.boxes()[best][None])
        assert ops.box_iou(decoded, boxes[0]) > 0.9

    def test_a_batch_without_objects(self, names, anchors):
        maps, count = self.maps(2), torch.zeros(2, dtype=torch.int64)
        losses = names["yolo_losses"](maps, anchors, torch.zeros(2, 0, 4), torch.zeros(2, 0, CLASSES), count)
        assert losses["objectness"] > 0 == losses["classes"] == losses["boxes"]
