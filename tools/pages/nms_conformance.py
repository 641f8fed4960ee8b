"""Writes docs/generated/nms_conformance.md, which shows what NMS does in unusual cases, here and in torchvision.

    python -m tools.pages.nms_conformance

tests/ops/nms_conformance.py defines the cases, the expected results and the reasons. torchvision's results are measured
on the CPU. The results of other projects, and of torchvision on CUDA, were read in their sources.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torchvision
from torch import Tensor

from tests.ops.nms_conformance import ROWS, Row

ROOT = Path(__file__).resolve().parents[2]

PAGE = ROOT / "docs" / "generated" / "nms_conformance.md"


def outcome(row: Row, nms: Callable[..., Tensor], batched_nms: Callable[..., Tensor]) -> str:
    """Return "right" if the result of a library is the expected one, and the result otherwise."""
    boxes, scores = row.boxes.to(row.dtypes[0]), row.scores
    try:
        if row.classes is None:
            keep = nms(boxes, scores.to(boxes.dtype), row.threshold).tolist()
        else:
            keep = batched_nms(boxes, scores.to(boxes.dtype), row.classes, row.threshold).tolist()
    except (RuntimeError, TypeError) as error:
        return f"raises: {str(error).splitlines()[0].split(', ')[-1]}"
    if keep == row.expected:
        return "right"
    return f"**{keep}**" if len(keep) < 10 else f"**{len(keep):,} boxes**"


def page() -> str:
    """Return the page as Markdown."""
    import retinanet_ops as ops

    lines = [
        "# NMS in unusual cases",
        "",
        "Written by `python -m tools.pages.nms_conformance`; `tests/ops/test_nms_conformance.py` checks each row",
        f"on every backend. torchvision {torchvision.__version__.split('+')[0]} was run on the CPU; the last column",
        "was read in sources and issues. Results are indices of kept boxes, best first.",
        "",
        "| case | expected | why | here | torchvision | others |",
        "|---|---|---|---|---|---|",
    ]
    for row in ROWS:
        expected = str(row.expected) if len(row.expected) < 10 else f"{len(row.expected):,} boxes"
        cells = [row.name, expected, row.reason, outcome(row, ops.nms, ops.batched_nms)]
        cells += [outcome(row, torchvision.ops.nms, torchvision.ops.batched_nms), row.peers]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "A batch without images gives results without rows (`test_no_images`); torchvision has no batched form.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    torch.manual_seed(0)
    PAGE.write_text(page())
