"""The forms in which ops take the sizes of images. torchvision's `ImageList.image_sizes` is a list of pairs."""

import numpy as np
import pytest
import torch
from cases import random_boxes
from torch import Tensor

import retinanet_ops as ops
from retinanet_ops import reference

pytestmark = pytest.mark.once

PAIRS = ((20, 30), (25, 18))


def inputs(device):
    """Return logits, deltas and anchors of two images."""
    anchors = random_boxes(8).to(device)
    logits, deltas = torch.randn(2, 6, 2, 2, device=device), torch.randn(2, 8, 2, 2, device=device)
    return [logits], [deltas], anchors


@pytest.mark.parametrize(
    "given", (list(PAIRS), PAIRS, [list(pair) for pair in PAIRS], np.array(PAIRS), torch.tensor(PAIRS)), ids=repr
)
def test_one_pair_for_each_image(device, given):
    heads, boxes = inputs(device), random_boxes(2, 8).to(device)
    deltas = torch.randn(2, 8, 4, device=device)
    given, sizes = (t.to(device) if isinstance(t, Tensor) else t for t in (given, torch.tensor(PAIRS)))
    for library in (ops, reference):
        for op in (library.detect, library.candidates):
            for actual, expected in zip(op(*heads, given), op(*heads, sizes), strict=True):
                assert torch.equal(actual, expected)
        assert torch.equal(library.clip_boxes(boxes, given), library.clip_boxes(boxes, sizes))
        decoded = library.decode_boxes(deltas, heads[2], image_sizes=given)
        assert torch.equal(decoded, library.decode_boxes(deltas, heads[2], image_sizes=sizes))


@pytest.mark.parametrize("given", ((20, 30), torch.tensor([20, 30])), ids=repr)
def test_one_pair_for_all_images(device, given):
    given = given.to(device) if isinstance(given, Tensor) else given
    heads, sizes = inputs(device), torch.tensor([(20, 30)] * 2, device=device)
    for library in (ops, reference):
        for op in (library.detect, library.candidates):
            for actual, expected in zip(op(*heads, given), op(*heads, sizes), strict=True):
                assert torch.equal(actual, expected)


def test_one_graph(device):
    heads = inputs(device)
    compiled = torch.compile(lambda *heads: ops.detect(*heads, list(PAIRS)), fullgraph=True, backend="aot_eager")
    for actual, expected in zip(compiled(*heads), ops.detect(*heads, list(PAIRS)), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    (
        ([(20, 30)], ValueError, r"a pair for each of the 2 images .* got \[\(20, 30\)\]"),
        ([(20, 30), (1, 2, 3)], ValueError, "a pair for each of the 2 images"),
        ([(20, 30), 4], ValueError, "a pair for each of the 2 images"),
        ((20, 30, 40), ValueError, "a pair for each of the 2 images"),
        ([], ValueError, r"a pair for each of the 2 images .* got \[\]"),
        (20, TypeError, r"must be a tensor or \(height, width\) pairs, got int"),
        (("a", "b"), ValueError, "a pair for each of the 2 images"),
        ([(20, None), (1, 2)], TypeError, "image_sizes must be a number, got None"),
        (torch.zeros(3), ValueError, r"must have shape \[2\], got \[3\]"),
        (torch.zeros(3, 2), ValueError, r"must have shape \[2, 2\], got \[3, 2\]"),
        (torch.ones(2).bool(), TypeError, "must be an integer or floating tensor, got torch.bool"),
    ),
    ids=repr,
)
def test_messages(given, error, message):
    heads = inputs("cpu")
    for op in (ops.detect, ops.candidates):
        with pytest.raises(error, match=f"{op.__name__}: image_sizes .*{message}|{op.__name__}: {message}"):
            op(*heads, given)
    with pytest.raises(error, match=f"clip_boxes: image_sizes .*{message}|clip_boxes: {message}"):
        ops.clip_boxes(torch.zeros(2, 5, 4), given)
    assert ops.clip_boxes(torch.zeros(0, 5, 4), []).shape == (0, 5, 4)
