"""The score threshold of `detect`: which logits pass, and which scores they get."""

import math

import pytest
import torch

import retinanet_ops as ops


def count_passing(device, x, threshold):
    """Return how many of the logits `x` [P] pass."""
    logits = [x.to(device).view(1, 1, 1, -1)]
    keys, _ = torch.ops.retinanet_ops.select_candidates(logits, 1, threshold, len(x))
    return int((keys != torch.iinfo(torch.int64).min).sum())


@pytest.mark.parametrize("threshold", (0.0, 1e-30, 0.05, 0.3, 0.5, 0.75, 0.999, 1 - 2**-24, 1.0, 1.5, -1.0))
def test_threshold_compares_the_exact_sigmoid_rounded_to_float32(device, threshold):
    limit = math.log(threshold / (1 - threshold)) if 0 < threshold < 1 else 0.0
    steps = [torch.tensor(limit, dtype=torch.float32)]
    for direction in (-math.inf, math.inf):
        x = steps[0]
        for _ in range(40):
            x = torch.nextafter(x, torch.tensor(direction))
            steps.append(x)
    extremes = [torch.tensor(v) for v in (-math.inf, -104.0, -103.9, -20.0, 0.0, 17.0, 17.4, 20.0, math.inf)]
    for x in (*steps, *extremes):
        expected = x.double().sigmoid().float() > torch.tensor(threshold, dtype=torch.float32)
        assert count_passing(device, x[None], threshold) == int(expected), x.item()


@pytest.mark.once
def test_many_thresholds(device):
    for threshold in torch.rand(300).tolist():
        limit = torch.tensor(math.log(threshold / (1 - threshold)), dtype=torch.float32)
        x = (limit.view(torch.int32) + torch.arange(-4, 5, dtype=torch.int32)).view(torch.float32)
        expected = x.double().sigmoid().float() > torch.tensor(threshold, dtype=torch.float32)
        assert count_passing(device, x, threshold) == int(expected.sum()), threshold


def test_float32_sigmoid_would_decide_differently(device):
    x = torch.tensor([1e-7])  # its exact sigmoid is 0.500000025, nearer to 0.5 than to the next float
    assert x.sigmoid() > 0.5 and count_passing(device, x, 0.5) == 0


def test_scores_exceed_the_threshold_in_the_order_of_the_logits(device):
    for threshold in (0.05, 0.3, 0.6, 0.95, 0.99):
        limit = torch.tensor(math.log(threshold / (1 - threshold)))
        x = (limit.view(torch.int32) + torch.arange(-200, 200, dtype=torch.int32)).view(torch.float32)
        anchors = torch.arange(400.0)[:, None] * 10 + torch.tensor([0.0, 0, 8, 8])
        detections = ops.detect(
            [x.to(device).view(1, 1, 1, -1)],
            [torch.zeros(1, 4, 1, 400, device=device)],
            anchors.to(device),
            torch.tensor([[8, 4000]], device=device),
            score_threshold=threshold,
            max_detections=400,
        )
        scores = detections.scores[0, : int(detections.count)]
        assert 150 < len(scores) < 250
        assert (scores > threshold).all() and (scores.diff() <= 0).all()


def test_nan_never_passes(device):
    assert count_passing(device, torch.tensor([math.nan, 1.0, math.nan]), 0.05) == 1
    assert count_passing(device, torch.tensor([math.nan, 1.0, math.nan]), -1.0) == 1
