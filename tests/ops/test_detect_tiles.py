"""Candidates at the ends of the tiles, steps and chunks into which the CUDA kernels of detection cut their work.

A tile is 8 steps of 256 threads with 4 packs of 16 bytes each: 32,768 logits in float32. Other kernels select the
candidates from a top k of 2,049 on.
"""

import pytest
import torch
from cases import FLOATING
from detect_cases import assert_same
from test_detect_candidates import assert_same_candidates

import retinanet_ops as ops
from retinanet_ops import reference

LOW = -9.0  # its score is below every threshold here


def tile_size(dtype):
    return 8 * 256 * 4 * (16 // dtype.itemsize)


def anchors_and_deltas(levels, num_classes, device):
    """Return anchors that do not overlap [A, 4], and deltas of 0 for each level."""
    per_level = [level[0].numel() // num_classes for level in levels]
    x = torch.arange(sum(per_level), dtype=torch.float32, device=device)[:, None] * 20
    anchors = x * torch.tensor([1.0, 0, 1, 0], device=device) + torch.tensor([0.0, 0, 10, 10], device=device)
    deltas = [level.new_zeros(len(level), level.shape[1] // num_classes * 4, *level.shape[2:]) for level in levels]
    return anchors, deltas


def assert_candidates_equal_reference(levels, num_classes, device, **options):
    anchors, deltas = anchors_and_deltas(levels, num_classes, device)
    actual = ops.candidates(levels, deltas, anchors, **options)
    assert_same_candidates(actual, reference.candidates(levels, deltas, anchors, **options))
    return actual


@pytest.mark.parametrize("topk", (300, 3000))
@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("more", (-1, 0, 1, 2))
def test_ends_of_tiles_and_packs(device, dtype, more, topk):
    # With an odd number of logits, the second image starts within a pack.
    size = tile_size(dtype) + more
    near_end = (torch.arange(size) + 5) % 1024 < 10  # five logits on either side of each 1,024-th
    logits = torch.where(near_end, torch.randn(2, size), torch.tensor(LOW))
    logits[0, -1] = logits[1, 0] = 5
    levels = [logits.to(device, dtype).view(2, 1, size, 1)]
    assert_candidates_equal_reference(levels, 1, device, topk_per_level=topk, score_threshold=0.1)


@pytest.mark.parametrize("topk", (700, 2500))
@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("value", (1.0, 0.0, -1.0))
def test_equal_logits_over_several_tiles(device, dtype, value, topk):
    # A plane of contiguous logits has every 24-th candidate, so the first ones are in all tiles.
    logits = torch.full((1, 24, 96, 32), value)
    if value == 0:
        logits[torch.rand(logits.shape) < 0.5] = -0.0
    levels = [logits.to(device, dtype)]
    assert_candidates_equal_reference(levels, 8, device, topk_per_level=topk, score_threshold=0.1)


@pytest.mark.parametrize("topk", (64, 3000))
@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("threshold", (0.05, 0.5, 0.7, 0.99))
def test_thresholds_above_and_below_one_half(device, dtype, threshold, topk):
    levels = [(torch.randn(2, 8, 40, 40) * 2).to(device, dtype)]
    assert_candidates_equal_reference(levels, 4, device, topk_per_level=topk, score_threshold=threshold)


@pytest.mark.parametrize("topk", (1700, 2048, 2049))
def test_more_keys_than_a_block_can_gather(device, topk):
    # Each of 3 tiles keeps about topk keys, and fewer of them than topk are in the fronts of the tiles.
    logits = torch.randperm(3 * 32_768).view(1, 24, 64, 64) / 30_000
    assert_candidates_equal_reference([logits.to(device)], 8, device, topk_per_level=topk, score_threshold=0.1)


@pytest.mark.parametrize("more", (0, 1))
@pytest.mark.parametrize("best_tile", (0, 1))
@pytest.mark.parametrize("descending", (False, True))
def test_exactly_as_many_keys_as_a_block_can_gather_or_one_more(device, best_tile, descending, more):
    # Each of 2 tiles keeps all of its 2,048 keys. Half of them are in the sample, too few for a floor. A third tile has
    # no key, or one that is not in the sample.
    logits = torch.full((3, 32_768), LOW)
    logits[:2, :2048] = torch.linspace(0, 0.9, 2048)
    if descending:
        logits[:2, :2048] = logits[:2, :2048].flip(1)
    logits[best_tile, :2048] += 1
    logits[2, 200] = 3 if more else LOW
    levels = [logits.view(1, 1, 3 * 32_768, 1).to(device)]
    assert_candidates_equal_reference(levels, 1, device, topk_per_level=2048, score_threshold=0.1)


@pytest.mark.parametrize("passing", ((2000, 2096), (2000, 2097), (3072, 4096), (3073, 4096)))
def test_full_buffers_without_a_sample(device, passing):
    # The sample of a top k of 1 is empty, so no floor rules out logits before they fill the 4,096 keys of a block.
    logits = torch.full((2, 4096), LOW)
    for step, count in enumerate(passing):
        logits[step, torch.randperm(4095)[: count - 1] + 1] = torch.linspace(0, 0.9, count - 1)
    logits[:, 0] = torch.tensor([1.0, 2.0])
    levels = [logits.view(1, 1, 8192, 1).to(device)]
    actual = assert_candidates_equal_reference(levels, 1, device, topk_per_level=1, score_threshold=0.1)
    assert actual.anchor_index.tolist() == [[4096]]


@pytest.mark.parametrize("topk", (300, 2000))
@pytest.mark.parametrize(
    "passing", ((2000, 2096), (2000, 2097), (3072, 4096), (3073, 4096), (2047, 1), (2048, 1), (127, 1), (128, 1))
)
def test_buffers_that_are_full_or_hold_one_more(device, passing, topk):
    # A block holds 4,096 keys, of which 1,024 are added at a time, and keeps 2,048, of which 128 are the front.
    logits = torch.full((2, 4096), LOW)
    for step, count in enumerate(passing):
        places = torch.cat((torch.randperm(4095)[: count - 1], torch.tensor([4095])))
        logits[step, places] = step + torch.linspace(0, 0.9, count)  # the last logit is the best of its step
    levels = [logits.view(1, 1, 8192, 1).to(device)]
    assert_candidates_equal_reference(levels, 1, device, topk_per_level=topk, score_threshold=0.1)


@pytest.mark.parametrize("passing", (4, 5, 6))
def test_as_many_candidates_as_slots_or_one_fewer_or_more(device, passing):
    # A level that drops a candidate makes the image truncated, also if it is the last one.
    def level(count):
        logits = torch.full((1, 400), LOW)
        logits[0, torch.randperm(400)[:count]] = torch.rand(count) * 3
        return logits.view(1, 1, 20, 20).to(device)

    for counts in ((passing, 3), (3, passing)):
        levels = [level(count) for count in counts]
        anchors, deltas = anchors_and_deltas(levels, 1, device)
        sizes = torch.tensor([[20, 20_000]], device=device)
        actual = ops.detect(levels, deltas, anchors, sizes, topk_per_level=5, max_detections=50)
        assert actual.truncated.tolist() == [passing > 5] and actual.count.tolist() == [3 + min(passing, 5)]
        assert_same(actual, reference.detect(levels, deltas, anchors, sizes, topk_per_level=5, max_detections=50))
        assert_candidates_equal_reference(levels, 1, device, topk_per_level=5)


@pytest.mark.parametrize("cells", (600, 17_000))  # more than 16,384 candidates of an image are sorted first
@pytest.mark.parametrize("passing", (255, 256, 257, 513))
def test_as_many_candidates_as_chunks_of_nms_or_one_fewer_or_more(device, passing, cells):
    logits = torch.full((2, cells), LOW)
    logits[:, torch.randperm(cells)[:passing]] = torch.rand(2, passing) * 3
    levels = [logits.view(2, 1, cells, 1).to(device)]
    anchors, deltas = anchors_and_deltas(levels, 1, device)
    sizes = torch.tensor([[20, 400_000]] * 2, device=device)
    options = {"topk_per_level": cells, "max_detections": 600, "score_threshold": 0.1}
    actual = ops.detect(levels, deltas, anchors, sizes, **options)
    assert actual.count.tolist() == [passing, passing] and not actual.truncated.any()
    assert_same(actual, reference.detect(levels, deltas, anchors, sizes, **options))


@pytest.mark.parametrize("cells", (16_640, 16_641, 16_700))  # 65 chunks of 256, and a part of a chunk
def test_the_last_of_many_candidates(device, cells):
    # All candidates but the last one have the same box, so the search goes on to the end of the sorted candidates.
    logits = torch.linspace(3, 0, cells).repeat(2, 1).view(2, 1, cells, 1).to(device)
    anchors = torch.tensor([[5.0, 5, 15, 15]], device=device).repeat(cells, 1)
    anchors[-1] += 50
    sizes = torch.tensor([[100, 100]] * 2, device=device)
    options = {"topk_per_level": cells, "max_detections": 50, "score_threshold": 0.1}
    actual = ops.detect([logits], [logits.new_zeros(2, 4, cells, 1)], anchors, sizes, **options)
    assert actual.count.tolist() == [2, 2] and not actual.truncated.any()
    assert actual.anchor_index[:, :3].tolist() == [[0, cells - 1, -1]] * 2
