"""`gather_class_scores`: all anchors and class counts, rows out of range, errors and compilation."""

import pytest
import torch
from cases import FLOATING
from torch.library import opcheck

import retinanet_ops as ops
from retinanet_ops import AnchorGrid, reference

SIZES = ((5, 7), (3, 4), (1, 1))


def heads(images=2, per_cell=3, num_classes=7, dtype=torch.float32, memory_format=torch.contiguous_format):
    """Return the logits of three levels, and the number of anchors."""
    levels = [torch.randn(images, per_cell * num_classes, h, w).mul(4).to(dtype) for h, w in SIZES]
    return [t.to(memory_format=memory_format) for t in levels], per_cell * sum(h * w for h, w in SIZES)


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("memory_format", (torch.contiguous_format, torch.channels_last))
@pytest.mark.parametrize("num_classes", (1, 7))
def test_every_anchor(device, dtype, memory_format, num_classes):
    logits, count = heads(num_classes=num_classes, dtype=dtype, memory_format=memory_format)
    index = torch.stack((torch.randperm(count), torch.randperm(count)))
    scores = ops.gather_class_scores([t.to(device) for t in logits], index.to(device), num_classes)
    assert scores.dtype == torch.float32 and scores.shape == (2, count, num_classes)
    torch.testing.assert_close(
        scores.cpu(), reference.gather_class_scores(logits, index, num_classes), rtol=3e-7, atol=1e-38
    )


@pytest.mark.parametrize("num_classes", (1, 80, 257))
def test_class_counts(device, num_classes):
    logits, count = heads(per_cell=2, num_classes=num_classes)
    index = torch.randint(0, count, (2, 11))
    scores = ops.gather_class_scores([t.to(device) for t in logits], index.to(device), num_classes)
    expected = reference.gather_class_scores(logits, index, num_classes)
    torch.testing.assert_close(scores.cpu(), expected, rtol=3e-7, atol=1e-38)


def test_anchors_out_of_range_have_no_score(device):
    logits, count = heads()
    logits = [t.to(device) for t in logits]
    index = torch.tensor([[-1, 0, count], [count - 1, -(2**40), 2**40]], device=device)
    scores = ops.gather_class_scores(logits, index, 7)
    assert (scores > 0).all(-1).tolist() == [[False, True, False], [True, False, False]]
    assert (scores == 0).all(-1).tolist() == [[True, False, True], [False, True, True]]
    assert ops.gather_class_scores(logits, index.int().clamp(-1, 9), 7).shape == (2, 3, 7)


def test_scores_of_detections(device):
    logits, count = heads()
    deltas = [torch.randn(2, 3 * 4, h, w) * 0.1 for h, w in SIZES]
    logits, deltas = ([t.to(device) for t in levels] for levels in (logits, deltas))
    anchors = AnchorGrid.mmdet(SIZES, (8, 16, 32), scales_per_octave=1).to(device)
    assert anchors.num_anchors == count
    detections = ops.detect(logits, deltas, anchors, torch.tensor([[40, 56]] * 2, device=device), max_detections=200)
    scores = ops.gather_class_scores(logits, detections.anchor_index, 7)
    of_label = scores.gather(2, detections.labels.clamp(min=0)[..., None])[..., 0]
    assert detections.count.min() > 0 and torch.equal(of_label, detections.scores)


def test_empty(device):
    logits, _ = heads()
    logits = [t.to(device) for t in logits]
    assert ops.gather_class_scores(logits, torch.empty(2, 0, dtype=torch.int64, device=device), 7).shape == (2, 0, 7)
    none = [t[:0] for t in logits]
    assert ops.gather_class_scores(none, torch.empty(0, 4, dtype=torch.int64, device=device), 7).shape == (0, 4, 7)


def test_messages(device):
    logits, _ = heads()
    index = torch.zeros(2, 3, dtype=torch.int64)
    for arguments, error, message in (
        (([], index, 7), ValueError, "gather_class_scores: cls_logits must hold 1 to 16 levels, got 0"),
        ((logits, index.float(), 7), TypeError, "gather_class_scores: anchor_index must be an integer tensor"),
        ((logits, index[:1], 7), ValueError, r"anchor_index must have shape \[2, D\], got \[1, 3\]"),
        ((logits, index, 6), ValueError, r"cls_logits\[0\] must have a multiple of 6 channels, got 21"),
        ((logits, index, 0), ValueError, "num_classes must be at least 1, got 0"),
        ((logits, index, 7.0), TypeError, "num_classes must be an integer, got 7.0"),
    ):
        with pytest.raises(error, match=message):
            ops.gather_class_scores(*arguments)
    logits, index = [t.to(device) for t in logits], index.to(device)
    for arguments, message in (
        ((logits, index, 0), "num_classes must be positive"),
        ((logits, index, 6), "do not fit 6 classes"),
        ((logits, index[:1], 7), "does not fit 2 images"),
        ((logits, index.int(), 7), "anchor_index must be Long"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.retinanet_ops.gather_class_scores(*arguments)


class TestCompile:
    def test_opcheck_and_one_graph(self, device):
        logits, count = heads()
        logits, index = [t.to(device) for t in logits], torch.randint(-1, count, (2, 5)).to(device)
        opcheck(torch.ops.retinanet_ops.gather_class_scores, (logits, index, 7))
        compiled = torch.compile(ops.gather_class_scores, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(logits, index, 7), ops.gather_class_scores(logits, index, 7))
