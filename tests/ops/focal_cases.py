"""Logits and targets that the tests of the focal losses share."""

import torch

LAYOUTS = (torch.contiguous_format, torch.channels_last)
# Some areas are multiples of a pack and some are not. Some exceed a tile of 256 cells or 256 rows, some are one cell
# (255 cells) or one row (3 * 85 rows) smaller, and one is a single cell.
GRIDS = ((16, 40), (13, 21), (15, 17), (5, 17), (3, 5), (1, 1))
PER_CELL = 3


def logits(*shape, dtype=torch.float32, device="cpu"):
    """Return ordinary logits, one in four of them extreme, where a naive formula fails."""
    x = torch.randn(*shape) * 3
    return torch.where(torch.rand(*shape) < 0.25, x * 8, x).to(device, dtype)


def class_targets(*shape, num_classes, device="cpu"):
    """Return random class ids, including background and ignored."""
    return torch.randint(-2, num_classes, shape, dtype=torch.int32).to(device)


def heads(
    num_classes, *, images=2, grids=GRIDS, per_cell=PER_CELL, dtype=torch.float32, device="cpu", layout=LAYOUTS[0]
):
    """Return the logits of each level, of which one in four is extreme, with requires_grad."""

    def level(h, w):
        x = logits(images, per_cell * num_classes, h, w, dtype=dtype, device=device)
        return x.contiguous(memory_format=layout).requires_grad_()

    return [level(h, w) for h, w in grids]


def class_labels(num_classes, *, images=2, grids=GRIDS, per_cell=PER_CELL, device="cpu"):
    """Return random labels of all anchors, including background and ignored."""
    rows = sum(per_cell * h * w for h, w in grids)
    return torch.randint(-2, num_classes, (images, rows), dtype=torch.int32).to(device)
