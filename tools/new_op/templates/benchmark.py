"""Benchmark of null_op on ten million numbers."""

import pytest
import torch

import retinanet_ops as ops
from retinanet_ops import reference

SIZE = 10_000_000


@pytest.mark.parametrize("row", ("ours", "reference", "torch.compile"))
def test_null_op(compare, device, row):
    x = torch.randn(SIZE).to(device)
    compiled = torch.compile(reference.null_op) if row == "torch.compile" else None
    function = {
        "ours": lambda: ops.null_op(x),
        "reference": lambda: reference.null_op(x),
        "torch.compile": lambda: compiled(x),
    }[row]
    group = f"null_op, {SIZE:,}, float32"
    compare(row, function, reference.null_op(x), bytes_moved=2 * 4 * SIZE, group=group)
