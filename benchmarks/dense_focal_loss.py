"""Focal loss of one COCO image from the heads' own tensors, forward and backward: 201,600 anchors x 80 classes.

The alternatives must permute the levels to rows and concatenate them. The row "floor" computes no loss. It runs
`x.sum(); x * 2` on each level, which reads the logits twice and writes as many bytes as their gradients have.
"""

import pytest
import torch
from focal_loss import ROWS, check_focal, labels_of, loss_of, reference_loss, torchvision_loss, with_gradients
from harness import COCO_CLASSES, COCO_GRIDS, keep_freed_memory, one_thread
from torch import Tensor

import retinanet_ops as ops
from retinanet_ops.reference._rows import rows_of

PER_CELL = 9
ANCHORS = sum(PER_CELL * h * w for h, w in COCO_GRIDS)
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = (
    torch.float32,
    torch.bfloat16,
    pytest.param(torch.float16, marks=pytest.mark.full),
)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_backward(compare, device, dtype, layout, row):
    if row.startswith("torchvision"):
        pytest.importorskip("torchvision")
    if row.startswith("ours, ") and device.type != "cpu":
        pytest.skip("the number of threads and malloc matter on the CPU only")
    levels = [
        torch.randn(1, PER_CELL * COCO_CLASSES, h, w).sub_(4).to(device, dtype, memory_format=LAYOUTS[layout])
        for h, w in COCO_GRIDS
    ]
    labels = labels_of(ANCHORS, device)[None].to(torch.int32)

    def torchvision_rows(*levels: Tensor) -> Tensor:
        return torchvision_loss(rows_of(levels, COCO_CLASSES), labels)

    def reference_rows(*levels: Tensor) -> Tensor:
        return reference_loss(rows_of(levels, COCO_CLASSES), labels)

    def ours(*levels: Tensor) -> Tensor:
        return ops.dense_focal_loss(levels, labels, COCO_CLASSES).sum()

    def floor() -> list[Tensor]:
        return [level.sum() for level in levels] + [torch.mul(level, 2) for level in levels]

    loss = loss_of(row, ours, torchvision_rows, reference_rows)
    if row.endswith("memory kept"):
        keep_freed_memory()
    with one_thread(row.endswith("one thread")):
        compare(
            row,
            floor if row == "floor" else lambda: with_gradients(loss, levels),
            with_gradients(reference_rows, [level.float() for level in levels]),
            check=lambda actual, expected: check_focal(actual, expected, row),
            bytes_moved=3 * sum(level.numel() * level.element_size() for level in levels),
            group=f"dense focal loss, forward + backward, {ANCHORS:,} x {COCO_CLASSES}, {layout}, {dtype}",
        )
