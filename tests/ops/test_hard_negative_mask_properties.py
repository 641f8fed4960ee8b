"""Random cases of hard negative mining against the reference. `make fuzz` tries many more."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st
from properties import Cases, many_cases

import retinanet_ops as ops
from retinanet_ops import reference


@given(seed=st.integers(0, 2**63 - 1))
@many_cases
def test_hard_negatives_equal_two_sorts(device, seed):
    cases = Cases(seed)
    # The largest sizes make several tiles, which may start within a pack of four anchors.
    anchors = cases.one_of(*(cases.integer(0, n) for n in (20, 700, 700, 13_000)))
    shape = cases.integer(0, 3), anchors
    count = shape[0] * shape[1]
    loss = cases.uniform(count)
    scale = cases.one_of(1e-42, 2.0**-20, 0.01, 2.0**12)
    loss = cases.one_of(loss - 0.3, loss * scale, 4 + loss * scale, cases.integers(count, -2, 2).float())
    special = torch.tensor([math.nan, -math.nan, math.inf, -math.inf, -0.0, 0.0])[cases.integers(count, 0, 5)]
    loss = torch.where(cases.uniform(count) < cases.one_of(0.0, 0.1), special, loss).view(shape)
    labels = torch.where(cases.uniform(count) < cases.one_of(0.0, 0.01, 0.2, 0.8), cases.integers(count, -2, 5), -1)
    labels = labels.view(shape)
    options = {
        "ratio": cases.one_of(0.0, 1 / 3, 1.0, 3.0, 1e9, 1.7e308),
        "min_negatives": cases.one_of(0, 0, 1, 5, 10_000),
    }
    mask = ops.hard_negative_mask(loss.to(device), labels.to(device), **options)
    assert torch.equal(mask.cpu(), reference.hard_negative_mask(loss, labels, **options))
