"""Detections of two COCO images from the heads' outputs: threshold, top k, decoding, clipping, NMS."""

from collections.abc import Sequence

import pytest
import torch
from harness import COCO_GRIDS, COCO_SIZE, coco_anchors, coco_heads
from torch import Tensor

import retinanet_ops as ops
from retinanet_ops import reference
from retinanet_ops.reference._rows import rows_of

IMAGES = 2
CLASSES = 91  # torchvision's COCO models
#: Mean logit of each case. Of the 37 million logits, thousands pass the score threshold of 0.05 in the first case,
#: 1.8 million in the second and 10.6 million in the third.
BIASES = {"few candidates": -7.0, "candidates of a first epoch": -4.93, "a flood of candidates": -3.61}


@pytest.mark.parametrize("row", ("ours", "ours, channels_last", "torchvision"))
@pytest.mark.parametrize("case", tuple(BIASES))
def test_detect(compare, device, case, row):
    logits, deltas = coco_heads(IMAGES, CLASSES, device, BIASES[case])
    grid, sizes = coco_anchors(device), torch.tensor([COCO_SIZE] * IMAGES, device=device)
    expected = reference.detect(logits, deltas, grid, sizes)
    if row == "ours, channels_last":
        logits, deltas = (
            [t.contiguous(memory_format=torch.channels_last) for t in levels] for levels in (logits, deltas)
        )
    passing = sum(int((t > -2.944439).sum()) for t in logits)  # the logit of a score of 0.05

    def torchvision_postprocess() -> tuple[Tensor, Tensor, Tensor]:
        from torchvision.models.detection._utils import BoxCoder
        from torchvision.models.detection.retinanet import RetinaNet

        class Settings:
            box_coder = BoxCoder((1.0, 1.0, 1.0, 1.0))
            score_thresh, topk_candidates, nms_thresh, detections_per_img = 0.05, 1000, 0.5, 100

        split = [9 * h * w for h, w in COCO_GRIDS]
        levels = {
            "cls_logits": rows_of(logits, CLASSES).split(split, 1),
            "bbox_regression": rows_of(deltas, 4).split(split, 1),
        }
        anchors = [list(grid.boxes().split(split))] * IMAGES
        images = RetinaNet.postprocess_detections(Settings(), levels, anchors, [COCO_SIZE] * IMAGES)
        boxes, scores, labels = (torch.stack([i[name] for i in images]) for name in ("boxes", "scores", "labels"))
        return boxes, scores, labels

    def ours() -> Sequence[Tensor]:
        return ops.detect(logits, deltas, grid, sizes)[:3]

    if row == "torchvision":
        pytest.importorskip("torchvision")
    compare(
        row,
        torchvision_postprocess if row == "torchvision" else ours,
        expected[:3],
        check=check_detections if row == "torchvision" else check_same_detections,
        bytes_moved=sum(t.numel() * t.element_size() for t in logits),
        group=f"detect, {IMAGES} x 800 x 1344, {CLASSES} classes, {passing / 1e6:.2f} M candidates, float32",
    )


def check_same_detections(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Assert that boxes, scores and labels equal the reference's, slot by slot."""
    for a, e, atol in zip(actual, expected, (1e-3, 0.0, 0.0), strict=True):
        torch.testing.assert_close(a.cpu(), e.cpu(), rtol=1e-6, atol=atol)


def check_detections(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Assert that scores are equal in order, and boxes with labels in any order.

    torchvision's sigmoid rounds some pairs of scores to one value, so their boxes may swap.
    """
    torch.testing.assert_close(actual[1], expected[1], rtol=1e-5, atol=1e-6)
    for boxes, labels, expected_boxes, expected_labels in zip(
        actual[0], actual[2], expected[0], expected[2], strict=True
    ):
        apart = (boxes[:, None] - expected_boxes).abs().amax(-1)
        twin = (apart < 1e-2) & (labels[:, None] == expected_labels)
        assert twin.any(1).float().mean() > 0.98, "more than 2 % of the detections are not among the reference's"
