"""Decoding and encoding of the boxes of two COCO images, 201,600 for each image."""

import pytest
import torch
from harness import coco_anchors

import retinanet_ops as ops
from retinanet_ops import reference

IMAGES = 2


@pytest.mark.parametrize("row", ("ours", "ours, explicit anchors", "torchvision", "torch.compile"))
@pytest.mark.parametrize("direction", ("decode", "encode"))
def test_box_coding(compare, device, direction, row):
    grid = coco_anchors(device)
    anchors = grid.boxes()
    deltas = torch.randn(IMAGES, grid.num_anchors, 4).mul_(0.3).to(device)
    source = deltas if direction == "decode" else reference.decode_boxes(deltas, anchors)
    plain = reference.decode_boxes if direction == "decode" else reference.encode_boxes
    op = ops.decode_boxes if direction == "decode" else ops.encode_boxes

    def torchvision_coding() -> torch.Tensor:
        from torchvision.models.detection._utils import BoxCoder

        coder = BoxCoder((1.0, 1.0, 1.0, 1.0))
        code = coder.decode_single if direction == "decode" else coder.encode_single
        return torch.stack([code(image, anchors) for image in source])

    if row == "torchvision":
        pytest.importorskip("torchvision")
    compiled = torch.compile(plain) if row == "torch.compile" else None
    function = {
        "ours": lambda: op(source, grid),
        "ours, explicit anchors": lambda: op(source, anchors),
        "torchvision": torchvision_coding,
        "torch.compile": lambda: compiled(source, anchors),
    }[row]
    floor = 2 * source.numel() * 4 + (0 if row == "ours" else anchors.numel() * 4)
    compare(
        row,
        function,
        plain(source, anchors),
        check=lambda actual, expected: torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-3),
        bytes_moved=floor,
        group=f"{direction} boxes, {IMAGES} x {grid.num_anchors:,}, float32",
    )
