"""Heads to detections of two COCO images: threshold, top k, decoding, clipping, NMS."""

import pytest
import torch
from harness import COCO_GRIDS, COCO_SIZE, coco_anchors, coco_heads, rows_of
from torch import Tensor

import retinanet_ops as ops
from retinanet_ops import reference

IMAGES = 2
CLASSES = 91  # torchvision's COCO models
#: Mean logit, and so how many of the 37 million logits pass the threshold of 0.05: thousands, 1.8 or 10.6 million.
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
    passing = sum(int((t > -2.944439).sum()) for t in logits)

    def torchvision_postprocess() -> tuple[Tensor, Tensor]:
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
        return torch.stack([image["boxes"] for image in images]), torch.stack([image["scores"] for image in images])

    def ours() -> tuple[Tensor, Tensor]:
        detections = ops.detect(logits, deltas, grid, sizes)
        return detections.boxes, detections.scores

    if row == "torchvision":
        pytest.importorskip("torchvision")
    compare(
        row,
        torchvision_postprocess if row == "torchvision" else ours,
        (expected.boxes, expected.scores),
        check=check_detections,
        bytes_moved=sum(t.numel() * t.element_size() for t in logits),
        group=f"detect, {IMAGES} x 800 x 1344, {CLASSES} classes, {passing / 1e6:.2f} M candidates, float32",
    )


def check_detections(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    """Same scores in order; boxes may swap where two scores round to one value."""
    torch.testing.assert_close(actual[1], expected[1], rtol=1e-5, atol=1e-6)
    same = (actual[0] - expected[0]).abs().amax(-1) < 1e-2
    assert same.float().mean() > 0.97, "detections differ from the oracle's"
