"""Random cases of detection against the reference. `make fuzz` tries many more."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st
from properties import Cases, many_cases

import retinanet_ops as ops
from retinanet_ops import reference


def with_special_values(cases, level, share):
    """Replace this share of the logits by NaN, infinities and a negative zero."""
    values = torch.tensor([math.nan, math.inf, -math.inf, -0.0])[cases.integers(level.numel(), 0, 3)]
    return torch.where(cases.uniform(*level.shape) < share, values.view(level.shape), level)


@given(seed=st.integers(0, 2**63 - 1))
@many_cases
def test_detect_equals_reference(device, seed):
    cases = Cases(seed)
    images, classes, per_cell, levels = (
        cases.integer(0, 2),
        cases.integer(1, 4),
        cases.integer(1, 2),
        cases.integer(1, 3),
    )
    dtype = cases.one_of(torch.float32, torch.float32, torch.float16, torch.bfloat16, torch.float64)
    spread, special = cases.one_of(0.0, 1.0, 8.0), cases.one_of(0.0, 0.05)
    logits, deltas = [], []
    for _ in range(levels):
        size = cases.integer(0, 5), cases.integer(1, 6)
        level = cases.uniform(images, per_cell * classes, *size, low=-spread, high=spread)
        level = cases.one_of(level, level.round())
        level = with_special_values(cases, level, special)
        # Boxes move by quarters of an anchor and have exact IoUs, so the rounding of decoding decides nothing.
        delta = cases.integers(images * per_cell * 4 * size[0] * size[1], -1, 2).view(images, per_cell, 4, *size) / 4
        delta[:, :, 2:] = 0
        delta = delta.flatten(1, 2)
        layout = cases.one_of(torch.contiguous_format, torch.channels_last)
        logits.append(level.to(dtype).contiguous(memory_format=layout))
        deltas.append(delta.to(dtype).contiguous(memory_format=layout))
    count = sum(d.shape[1] // 4 * d.shape[2] * d.shape[3] for d in deltas)
    corner = cases.integers(2 * count, 0, 12).view(count, 2) * 4.0
    anchors = torch.cat((corner, corner + 4 * 2.0 ** cases.integers(2 * count, 0, 2).view(count, 2)), dim=1)
    sizes = cases.integers(2 * images, 8, 64).view(images, 2)
    options = {
        "score_threshold": cases.one_of(0.05, 0.5, 0.0, -1.0, 1.0),
        "topk_per_level": cases.one_of(1, 5, 1000, 3000),
        "iou_threshold": cases.one_of(0.5, 0.3, 0.0),
        "max_detections": cases.one_of(0, 1, 10, 100),
        "class_agnostic": bool(cases.integer(0, 1)),
        "max_per_class": cases.one_of(None, None, 1, 3),
        "clip": cases.one_of("before_nms", "after_nms"),
    }
    expected = reference.detect(logits, deltas, anchors, sizes, **options)
    on_device = ([level.to(device) for level in levels] for levels in (logits, deltas))
    actual = ops.detect(*on_device, anchors.to(device), sizes.to(device), **options)
    for name in ("labels", "count", "anchor_index", "truncated"):
        assert torch.equal(getattr(actual, name).cpu(), getattr(expected, name)), name
    torch.testing.assert_close(actual.scores.cpu(), expected.scores, rtol=1e-6, atol=0)
    torch.testing.assert_close(actual.boxes.cpu(), expected.boxes, rtol=1e-6, atol=1e-4)


@given(seed=st.integers(0, 2**63 - 1))
@many_cases
def test_candidates_are_the_best_of_each_level(device, seed):
    cases = Cases(seed)
    classes, images, levels = cases.integer(1, 3), cases.integer(1, 2), cases.integer(1, 2)
    dtype = cases.one_of(torch.float32, torch.float32, torch.float16, torch.bfloat16, torch.float64)
    logits = []
    for _ in range(levels):
        # A level covers several chunks of the CPU and several tiles of CUDA.
        height, width = cases.integer(0, 4), cases.one_of(cases.integer(0, 9), cases.integer(5000, 20_000))
        level = cases.uniform(images, 2 * classes, height, width, low=-8, high=4)
        level = cases.one_of(level, level.round(), level.sort(dim=-1).values)
        level = with_special_values(cases, level, cases.one_of(0.0, 1e-4, 0.05))
        layout = cases.one_of(torch.contiguous_format, torch.channels_last)
        logits.append(level.to(dtype).contiguous(memory_format=layout))
    threshold, topk = cases.one_of(0.05, 0.5, 0.0, 0.99), cases.one_of(1, 3, 100, 1000, 2048, 2049, 5000)
    keys, truncated = torch.ops.retinanet_ops.select_candidates(
        [level.to(device) for level in logits], classes, threshold, topk
    )
    for n in range(images):
        expected, first = [], 0
        for i, level in enumerate(logits):
            flat = level[n].permute(1, 2, 0).flatten().float()
            passing = (flat.double().sigmoid().float() > torch.tensor(threshold)).nonzero()[:, 0]
            order = torch.sort(flat[passing], descending=True, stable=True).indices[:topk]
            best = passing[order]
            expected += list(zip((-flat[best]).tolist(), (best + first).tolist(), strict=True))
            assert truncated[n, i] == (len(passing) > topk)
            first += len(flat)
        used = keys[n][keys[n] != torch.iinfo(torch.int64).min].cpu()
        assert (2**32 - 1 - (used & (2**32 - 1))).tolist() == [index for _, index in sorted(expected)]


@given(seed=st.integers(0, 2**63 - 1))
@many_cases
def test_detect_with_many_candidates_is_nms_of_the_candidates(device, seed):
    """The whole of `detect` equals its steps, of which the other tests compare each with its reference."""
    cases = Cases(seed)
    classes, images, levels = cases.integer(1, 4), cases.integer(1, 2), cases.integer(1, 3)
    dtype = cases.one_of(torch.float32, torch.float32, torch.float16, torch.bfloat16, torch.float64)
    logits, deltas = [], []
    for _ in range(levels):
        # Images start anywhere within 16 bytes, and some levels have several tiles.
        size = cases.integer(1, 9), cases.one_of(cases.integer(1, 99), cases.integer(100, 2500))
        level = cases.uniform(images, 2 * classes, *size, low=-9, high=9) + cases.one_of(-8.0, 0.0)
        level = cases.one_of(level, level.round(), level.sort(dim=-1).values, torch.zeros_like(level))
        layout = cases.one_of(torch.contiguous_format, torch.channels_last)
        logits.append(level.to(device, dtype).contiguous(memory_format=layout))
        deltas.append(cases.uniform(images, 8, *size, low=-1).to(device, dtype).contiguous(memory_format=layout))
    count = sum(2 * level.shape[2] * level.shape[3] for level in logits)
    corner = cases.uniform(count, 2, high=cases.one_of(50.0, 900.0))
    anchors = torch.cat((corner, corner + cases.uniform(count, 2, low=8.0, high=40.0)), dim=1).to(device)
    sizes = torch.full((images, 2), 800.0, device=device)
    selection = {
        "score_threshold": cases.one_of(0.05, 0.4, 0.9),
        "topk_per_level": cases.one_of(3, 300, 1000, 2048, 2049, 20_000),
    }
    max_detections, threshold = cases.one_of(1, 30, 300, 1500), cases.one_of(0.5, 0.1)
    found = ops.detect(
        logits, deltas, anchors, sizes, **selection, max_detections=max_detections, iou_threshold=threshold
    )
    steps = ops.candidates(logits, deltas, anchors, sizes, **selection)
    index, kept, truncated = torch.ops.retinanet_ops.nms_sorted(
        steps.boxes, None, (steps.labels >= 0).sum(1), steps.labels, threshold, max_detections, 0, False
    )
    assert torch.equal(found.count, kept) and torch.equal(found.truncated, truncated | steps.truncated)
    for n, used in enumerate(kept.tolist()):
        for name in ("boxes", "scores", "labels", "anchor_index"):
            expected = getattr(steps, name)[n, index[n, :used]]
            assert torch.equal(getattr(found, name)[n, :used], expected), name
            unused = getattr(found, name)[n, used:]
            assert (unused == (-1 if name in ("labels", "anchor_index") else 0)).all()
