"""NMS of lists of which the CUDA kernels take a chunk at a time, and the order of their candidates."""

import math

import pytest
import torch
from cases import FLOATING

import retinanet_ops as ops


def row_of_boxes(count, *, gap=20.0):
    """Return boxes of 10 x 10 pixels side by side, none of which touches another."""
    left = torch.arange(count) * gap
    return torch.stack((left, torch.zeros(count), left + 10, torch.full((count,), 10.0)), dim=1)


class TestChunks:
    """Cases around the chunks of the CUDA kernel, which takes 256 candidates at a time."""

    def sorted_nms(self, device, boxes, *, order=None, count=None, labels=None, max_detections=1000, max_per_class=0):
        """Return the kept indices of one image's boxes in their order, and whether a limit dropped a candidate."""
        count = torch.tensor([len(boxes) if count is None else count], device=device)
        order, labels = (None if t is None else torch.tensor([t], device=device) for t in (order, labels))
        index, size, truncated = torch.ops.retinanet_ops.nms_sorted(
            boxes[None].to(device), order, count, labels, 0.4, max_detections, max_per_class, False
        )
        assert (index[0, size[0] :] == -1).all()
        return index[0, : size[0]].tolist(), truncated.item()

    @pytest.mark.parametrize("length", (256, 512))
    def test_a_box_suppressed_in_its_chunk_suppresses_nothing_in_the_next(self, device, length):
        boxes = row_of_boxes(length + 1)
        # The last box of a chunk overlaps the box before it and the first box of the next chunk, which are disjoint.
        boxes[length - 1] = boxes[length - 2] + torch.tensor([4.0, 0, 4, 0])
        boxes[length] = boxes[length - 2] + torch.tensor([8.0, 0, 8, 0])
        assert self.sorted_nms(device, boxes)[0] == [*range(length - 1), length]

    @pytest.mark.parametrize("count", (1023, 1024, 1025, 2049, pytest.param(3100, marks=pytest.mark.once)))
    @pytest.mark.parametrize("step", (3.0, 20.0))
    def test_chunks_of_long_lists(self, device, count, step):
        # The CUDA kernels for long lists take 1,024 candidates at a time. With a step of 3 pixels, each box suppresses
        # the next one only, and the result of each depends on all before it.
        boxes = row_of_boxes(count, gap=step)
        expected = list(range(0, count, 2 if step < 10 else 1))
        assert self.sorted_nms(device, boxes, max_detections=count) == (expected, False)
        assert self.sorted_nms(device, boxes, max_detections=len(expected)) == (expected, False)
        assert self.sorted_nms(device, boxes, max_detections=len(expected) - 1) == (expected[:-1], True)
        assert self.sorted_nms(device, boxes, max_detections=513) == (expected[:513], len(expected) > 513)

    @pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
    @pytest.mark.parametrize("kept", (500, 1500))
    def test_every_kept_box_suppresses_its_copy(self, device, kept, dtype):
        # The kept boxes pass through shared memory, at most 256 at a time.
        boxes = torch.cat((row_of_boxes(kept), row_of_boxes(kept))).to(dtype)
        assert self.sorted_nms(device, boxes, max_detections=2 * kept) == (list(range(kept)), False)

    def test_long_lists_of_several_images(self, device):
        # One image has few candidates, and the entries of its order are partly out of range.
        boxes = torch.stack((row_of_boxes(1500, gap=3.0), row_of_boxes(1500))).to(device)
        order = torch.stack((torch.arange(1500), torch.arange(1499, -1, -1))).to(device)
        order[1, 5:9] = torch.tensor([-1, 1500, 2**40, -5])
        counts = torch.tensor([1500, 1030], device=device)
        labels = torch.zeros(2, 1500, dtype=torch.int64, device=device)
        index, size, truncated = torch.ops.retinanet_ops.nms_sorted(boxes, order, counts, labels, 0.4, 1500, 0, False)
        expected = [[*range(0, 1500, 2)], [i for i in range(1499, 469, -1) if i not in (1494, 1493, 1492, 1491)]]
        for n in range(2):
            assert index[n].tolist() == expected[n] + [-1] * (1500 - len(expected[n]))
        assert size.tolist() == [len(e) for e in expected] and truncated.tolist() == [False, False]

    @pytest.mark.parametrize("count", (1030, 2100))
    def test_one_box_of_a_long_list_suppresses_all_its_copies(self, device, count):
        boxes = torch.cat((row_of_boxes(1).expand(count, -1), row_of_boxes(2)[1:]))
        assert self.sorted_nms(device, boxes) == ([0, count], False)

    def test_a_long_list_in_which_half_a_warp_of_candidates_does_not_exist(self, device):
        # The CUDA kernels skip groups of 32 candidates of which none exists.
        boxes = row_of_boxes(1030)
        boxes[17] = boxes[16]
        order = [-1] * 16 + list(range(16, 1030))
        assert self.sorted_nms(device, boxes, order=order, max_detections=1030)[0] == [16, *range(18, 1030)]

    def test_a_long_list_is_not_compared_with_boxes_of_another_image(self, device):
        # The second image keeps only one box of its first chunk, where the first image keeps all.
        row = row_of_boxes(2048)
        boxes = torch.stack((row, torch.cat((row[:1].expand(1024, -1), row[1:1025])))).to(device)
        counts = torch.tensor([2048, 2048], device=device)
        index, size, _ = torch.ops.retinanet_ops.nms_sorted(boxes, None, counts, None, 0.4, 2048, 0, False)
        assert size.tolist() == [2048, 1025]
        assert index[1, :1025].tolist() == [0, *range(1024, 2048)]

    @pytest.mark.parametrize("kept", (128, 129))
    def test_kept_boxes_of_a_long_list_fill_a_tile(self, device, kept):
        # With 64 blocks of later candidates or more, the CUDA kernel that compares them takes 128 kept boxes at a time.
        images, count = 4, 5120
        places = torch.cat(
            (torch.randint(0, kept, (images, 1024)), torch.randint(0, 200, (images, count - 1024))), dim=1
        )
        places[:, :kept] = torch.arange(kept)
        boxes = row_of_boxes(200)[places].to(device)
        counts = torch.full((images,), count, device=device)
        index, size, _ = torch.ops.retinanet_ops.nms_sorted(boxes, None, counts, None, 0.4, 1000, 0, False)
        for image in range(images):
            first = [(places[image] == place).nonzero()[0].item() for place in places[image].unique()]
            assert index[image, : size[image]].tolist() == sorted(first)

    @pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
    @pytest.mark.parametrize("kept", (127, 128, 255, 256))
    def test_a_chunk_after_as_many_boxes_as_slots(self, device, kept, dtype):
        boxes = torch.cat((row_of_boxes(kept), row_of_boxes(1).expand(300, -1))).to(dtype)
        assert self.sorted_nms(device, boxes, max_detections=kept) == (list(range(kept)), False)

    def test_truncated_only_if_a_candidate_was_dropped(self, device):
        boxes = torch.cat((row_of_boxes(100), row_of_boxes(100), row_of_boxes(100)))
        assert self.sorted_nms(device, boxes, max_detections=100) == (list(range(100)), False)
        assert self.sorted_nms(device, boxes, max_detections=99) == (list(range(99)), True)

    @pytest.mark.parametrize("count", (0, 1, 299, 300, 301, 10_000))
    def test_count_around_the_candidates(self, device, count):
        assert self.sorted_nms(device, row_of_boxes(300), count=count)[0] == list(range(min(count, 300)))

    def test_count_does_not_reach_into_the_next_image(self, device):
        boxes = row_of_boxes(4).expand(2, -1, -1).to(device)
        order, count = (
            torch.tensor([[0, 1, -1, -1], [2, 3, -1, -1]], device=device),
            torch.tensor([8, 4], device=device),
        )
        index, count, _ = torch.ops.retinanet_ops.nms_sorted(boxes, order, count, None, 0.4, 4, 0, False)
        assert index.tolist() == [[0, 1, -1, -1], [2, 3, -1, -1]] and count.tolist() == [2, 2]

    def test_negative_count(self, device):
        assert self.sorted_nms(device, row_of_boxes(3), count=-1) == ([], False)

    def test_order_out_of_range_is_skipped(self, device):
        boxes = row_of_boxes(4)
        # Row 4 of the first image would be row 0 of the second.
        order = torch.tensor([[3, 4, -1, 0], [4, 2, 2**40, 1]], device=device)
        index, count, _ = torch.ops.retinanet_ops.nms_sorted(
            torch.stack((boxes, boxes)).to(device), order, torch.tensor([4, 4], device=device), None, 0.4, 4, 0, False
        )
        assert index.tolist() == [[3, 0, -1, -1], [2, 1, -1, -1]] and count.tolist() == [2, 2]

    @pytest.mark.parametrize("first", (0, 200, 230))  # the last word of 32 candidates starts at 224
    def test_a_suppressed_candidate_of_a_full_class_is_not_dropped(self, device, first):
        # The last box is of the class of box `first`, which fills it. The other three are a chain, of which the second
        # is suppressed, so that a CUDA block keeps the third one round after it has excluded the last box.
        chain = row_of_boxes(4, gap=3.0) + torch.tensor([10_000.0, 0, 10_000, 0])
        boxes = torch.cat((row_of_boxes(first + 1), chain))[None].to(device)
        labels = torch.arange(first + 5, device=device)[None]
        labels[0, -1] = first
        count = torch.tensor([first + 5], device=device)
        index, size, truncated = torch.ops.retinanet_ops.nms_sorted(boxes, None, count, labels, 0.4, 300, 1, True)
        assert index[0, : size[0]].tolist() == [*range(first + 2), first + 3] and not truncated.item()

    @pytest.mark.parametrize("max_per_class", (1, 2, 7, 100))
    @pytest.mark.parametrize("max_detections", (20, 256, 257, 1000))
    def test_max_per_class_over_several_chunks(self, device, max_per_class, max_detections):
        labels = torch.randint(0, 60, (700,)).tolist()
        kept, seen, dropped = [], [0] * 60, False
        for i, label in enumerate(labels):
            if seen[label] == max_per_class or len(kept) == max_detections:
                dropped = True
            else:
                kept.append(i)
                seen[label] += 1
        result = self.sorted_nms(
            device, row_of_boxes(700), labels=labels, max_detections=max_detections, max_per_class=max_per_class
        )
        assert result == (kept, dropped)

    def test_the_last_candidates_of_a_chunk_count_for_their_class(self, device):
        labels = [*range(230), *[500] * 26, *range(300, 310), 500]
        expected = [i for i, label in enumerate(labels) if label != 500 or labels.index(500) == i]
        assert self.sorted_nms(device, row_of_boxes(len(labels)), labels=labels, max_per_class=1)[0] == expected


class TestOrder:
    """`batched_nms_padded` and `nms` order the candidates, on CUDA in batches of at most 512 that a search finds."""

    # The values of a group differ in the sign, the exponent, high or low bits only, or not at all.
    GROUPS = {
        "signs": lambda n: torch.linspace(-1, 1, n),
        "exponents": lambda n: 2.0 ** torch.linspace(-140, 120, n),
        "high bits": lambda n: 1 + torch.arange(n) / n,
        "low bits": lambda n: 1 + torch.arange(n) * 2.0**-23,
        "one value": lambda n: torch.ones(n),
        "two values": lambda n: (torch.arange(n) % 2).float(),
    }

    @pytest.mark.parametrize("group", GROUPS)
    @pytest.mark.parametrize("count", (1, 255, 256, 257, 511, 512, 513, 1300))
    def test_all_are_kept_in_order(self, device, group, count):
        scores = self.GROUPS[group](count)[torch.randperm(count)].to(device)
        expected = scores.sort(descending=True, stable=True).indices
        boxes = row_of_boxes(count).to(device)
        assert torch.equal(ops.nms(boxes, scores, 0.5), expected)
        index, size = ops.batched_nms_padded(boxes[None], scores[None], iou_threshold=0.5, max_detections=count)
        assert torch.equal(index[0], expected) and size.item() == count

    def padded_nms(self, device, boxes, scores, threshold):
        """Return the kept indices of one image's boxes, at most 512."""
        index, size = ops.batched_nms_padded(
            boxes[None].to(device), scores[None].to(device), iou_threshold=threshold, max_detections=512
        )
        return index[0, : size[0]].tolist()

    # The search of the CUDA kernel divides [0.5, 1) at 0.75. The key of candidate 0 is the highest of its score.
    BELOW_BOUND = torch.tensor([0.75]).nextafter(torch.tensor(0.0))

    def test_the_best_candidate_below_a_batch_is_kept_once(self, device):
        scores = torch.cat((self.BELOW_BOUND, torch.linspace(0.75, 0.99, 300), torch.linspace(0.5, 0.74, 300)))
        expected = scores.sort(descending=True, stable=True).indices[:512]
        assert self.padded_nms(device, row_of_boxes(601), scores, 1.0) == expected.tolist()  # suppresses nothing

    def test_the_best_candidate_of_the_second_batch_counts_for_its_size(self, device):
        # The first batch has copies of one box, and [0.5, 0.75) has one key more than a batch.
        scores = [
            self.BELOW_BOUND,
            torch.linspace(0.5, 0.74, 512),
            torch.linspace(0.75, 0.99, 300),
            torch.full((300,), 0.1),
        ]
        row = row_of_boxes(1000)
        boxes = torch.cat((row[:513], row[600:601].expand(300, -1), row[601:901]))
        assert self.padded_nms(device, boxes, torch.cat(scores), 0.5) == [812, 0, *range(512, 2, -1)]

    def test_the_last_candidate_of_a_batch_is_not_in_the_next(self, device):
        # Candidate 511 has no area, so a second copy of it would be kept as well.
        boxes = torch.cat((row_of_boxes(1).expand(515, -1), row_of_boxes(600)[1:]))
        boxes[511] = -50
        assert self.padded_nms(device, boxes, torch.ones(len(boxes)), 0.5) == [0, 511, *range(515, 1025)]

    @pytest.mark.parametrize("dtype", FLOATING)
    @pytest.mark.parametrize("size", (1, 2, 15, 16, 17, 33))
    def test_ranking_of_few(self, device, dtype, size):
        # A block of the CUDA kernel ranks 16 candidates.
        scores = torch.tensor([0.5, math.nan, -math.inf, 0.25, 0.75, 0.25]).repeat(6)[:size].to(device, dtype)
        order, valid = torch.ops.retinanet_ops.rank_scores(scores[None], None)
        ranked = scores.double().nan_to_num(-math.inf, neginf=-math.inf)
        assert torch.equal(order[0], ranked.sort(descending=True, stable=True).indices)
        assert valid.tolist() == [(ranked > -math.inf).sum().item()]

    # The CUDA kernels rank short rows by counting, and sort long ones.
    @pytest.mark.parametrize("size", (300, 9000))
    @pytest.mark.parametrize("dtype", FLOATING)
    def test_ranking_of_every_dtype(self, device, dtype, size):
        special = torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0]).repeat(2)
        scores = torch.cat((torch.randn(size).round(decimals=3), special)).to(dtype)
        scores = scores[torch.randperm(len(scores))].expand(2, -1).to(device)
        counts = torch.tensor([len(scores[0]), 100], device=device)
        order, valid = torch.ops.retinanet_ops.rank_scores(scores, counts)
        for n in range(2):
            kept = (scores[n] > -math.inf) & (torch.arange(len(scores[n]), device=device) < counts[n])
            ranked = torch.where(kept, scores[n].double(), -math.inf) + 0.0
            assert torch.equal(order[n], ranked.sort(descending=True, stable=True).indices)
            assert valid[n] == kept.sum()

    @pytest.mark.parametrize("shape", ((0, 5), (2, 0)))
    def test_ranking_of_nothing(self, device, shape):
        order, valid = torch.ops.retinanet_ops.rank_scores(torch.empty(shape, device=device), None)
        assert order.shape == shape and valid.tolist() == [0] * shape[0]
