"""Random cases of NMS against oracles. `make fuzz` tries many more."""

import numpy as np
import torch
from cases import DEGENERATE_BOXES
from hypothesis import given
from hypothesis import strategies as st
from properties import Cases, many_cases

import retinanet_ops as ops
from retinanet_ops import reference
from retinanet_ops.reference.nms import greedy_nms

KINDS = ("anywhere", "cluster", "nested", "lattice", "thin", "sizes", "copies", "apart", "coarse", "powers")


class NmsCases(Cases):
    def boxes(self, count):  # [count, 4] float64
        """Return boxes of one kind, in pixels unless they are scaled or moved."""
        if count == 0:
            return torch.empty(0, 4, dtype=torch.float64)
        kind = self.one_of(*KINDS)
        corner = self.uniform(count, 2, low=-100, high=900).double()
        size = self.uniform(count, 2, low=1, high=120).double()
        if kind == "cluster":
            centres = self.integers(count, 0, min(4, count - 1))
            corner, size = corner[centres], size[centres]
            corner, size = corner + self.uniform(count, 2, high=8), size + self.uniform(count, 2, high=8)
        elif kind == "nested":
            shrink = (torch.arange(count)[:, None] / (count + 1)).expand(-1, 2)
            corner, size = 200 * shrink, 1000 - 900 * shrink
        elif kind == "lattice":
            corner, size = (corner / 16).round() * 16, (size / 16).ceil() * 16
        elif kind == "thin":
            size[:, self.integer(0, 1)] *= 0.01
        elif kind == "sizes":
            size = torch.exp(self.uniform(count, 2, low=-8, high=12).double())
        elif kind == "powers":  # the CPU kernel cannot put boxes of so different sizes into one grid of cells
            size = 10 ** self.uniform(count, 2, low=-12, high=11).double()
            corner = corner * 1e-3
        elif kind == "coarse":
            corner, size = (self.integers(2 * count, 0, 4).view(count, 2).double() for _ in range(2))
        elif kind == "apart":
            corner = 130.0 * torch.stack((torch.arange(count) % 40, torch.arange(count) // 40), dim=1)
        boxes = torch.cat((corner, corner + size), dim=1)
        if kind == "copies":
            boxes = boxes[self.integers(count, 0, count // 3)]
        # Far from the origin, float32 coordinates have few digits left. At a scale of 1e-18 the areas underflow, and at
        # 1e18 they overflow.
        boxes = boxes * self.one_of(1, 1, 1, 1, 1, 1e-3, 1e5, 1e-18, 1e-21, 1e18, 1e35, 1e305)
        boxes = boxes + self.one_of(0, 0, 0, 0, 0, 1e4, -1e7)
        if self.integer(0, 3) == 0:  # some areas underflow
            boxes[0, 2:] = boxes[0, :2] + self.one_of(1e-18, 1e-24, 1e-160)
        for _ in range(self.one_of(0, 0, 3)):
            boxes[self.integer(0, count - 1)] = DEGENERATE_BOXES[self.integer(0, len(DEGENERATE_BOXES) - 1)]
        return boxes

    def scores(self, count):
        kind = self.one_of("any", "ties", "same", "gaps")
        scores = self.uniform(count)
        if kind == "ties":
            scores = (scores * 8).round() / 8
        elif kind == "same":
            scores = torch.where(scores < 0.5, -0.0, 0.0)
        elif kind == "gaps":
            gone = self.uniform(count) < 0.2
            scores = torch.where(gone, self.one_of(torch.nan, -torch.inf), scores)
        return scores

    def case(self):
        # The CPU looks up the kept boxes of large classes in a grid, and those of small classes in a list.
        # Long lists are rare, because the oracle takes most of the time for them.
        short = self.integer(0, self.one_of(8, 80, 300))
        count = self.one_of(short, short, short, short, short, short, self.integer(500, 1500))
        labels = self.integers(count, 0, self.one_of(0, 0, 1, 7)) * self.one_of(1, -3, 2**33)
        threshold = self.one_of(0.5, 0.5, 0.5, 0.3, 1 / 3, 0.7, 0.9, 0.99999, 0.05, 1e-7, 0.0, 1.0, -0.5)
        dtype = self.one_of(torch.float32, torch.float32, torch.float32, torch.float64, torch.float16, torch.bfloat16)
        return self.boxes(count).to(dtype), self.scores(count), labels, threshold


def greedy(
    suppresses: torch.Tensor,  # [C, C] bool: row against column
    scores: torch.Tensor,  # [C]
) -> torch.Tensor:  # [kept]
    """Return what NMS keeps, by its definition."""
    order = torch.sort(scores, descending=True, stable=True).indices
    order = order[scores[order] > -torch.inf]  # false for NaN
    rows = suppresses[order][:, order].numpy()
    alive = np.ones(len(order), dtype=bool)
    kept = []
    for i, candidate in enumerate(order.tolist()):
        if alive[i]:
            kept.append(candidate)
            alive &= ~rows[i]
    return torch.tensor(kept, dtype=torch.int64)


@given(seed=st.integers(0, 2**63 - 1))
@many_cases
def test_nms_equals_brute_force(device, seed):
    boxes, scores, labels, threshold = NmsCases(seed).case()
    computed = boxes.to(torch.float64 if boxes.dtype == torch.float64 else torch.float32)
    iou = reference.box_iou(computed, computed)
    suppresses = iou > torch.tensor(threshold, dtype=iou.dtype)
    arguments = boxes.to(device), scores.to(device)
    keep = ops.nms(*arguments, threshold).cpu()
    assert torch.equal(keep, greedy(suppresses, scores))
    within_classes = greedy(suppresses & (labels[:, None] == labels), scores)
    assert torch.equal(ops.batched_nms(*arguments, labels.to(device), threshold).cpu(), within_classes)
    exact = reference.box_iou(computed.double(), computed.double())
    # Where areas leave the range of float32, the float32 IoU differs from the exact one.
    if ((exact - threshold).abs() > 1e-5).all() and ((exact - iou).abs() < 1e-5).all():
        assert torch.equal(keep, greedy(exact > threshold, scores))


@given(seed=st.integers(0, 2**63 - 1))
@many_cases
def test_padded_batch_equals_brute_force(device, seed):
    cases = NmsCases(seed)
    # The CUDA kernel orders 512 candidates at a time, and decides 256 of them at a time.
    border = cases.one_of(256, 512, 1024)
    short = cases.one_of(cases.integer(0, 60), cases.integer(border - 2, border + 2))
    count = cases.one_of(short, short, short, short, short, short, short, cases.integer(1500, 2500))
    boxes = torch.stack([cases.boxes(count).float() for _ in range(2)])
    scores = torch.stack([cases.scores(count) for _ in range(2)])
    scores = scores.to(cases.one_of(torch.float32, torch.float32, torch.float64, torch.float16, torch.bfloat16))
    labels = cases.one_of(None, cases.integers(2 * count, 0, cases.one_of(0, 3, 40)).view(2, count))
    counts = cases.one_of(None, torch.tensor([cases.integer(-1, count + 1), cases.integer(0, count)]))
    threshold, max_detections = cases.one_of(0.5, 0.3, 0.0, -0.5), cases.one_of(count, cases.integer(0, count), 100, 5)
    index, size = ops.batched_nms_padded(
        boxes.to(device),
        scores.to(device),
        labels if labels is None else labels.to(device),
        iou_threshold=threshold,
        max_detections=max_detections,
        counts=counts if counts is None else counts.to(device),
    )
    for n in range(2):
        listed = torch.arange(count) < (count if counts is None else counts[n])
        suppresses = reference.box_iou(boxes[n], boxes[n]) > torch.tensor(threshold)
        if labels is not None:
            suppresses &= labels[n][:, None] == labels[n]
        kept = greedy(suppresses, torch.where(listed, scores[n].double(), -torch.inf))[:max_detections].tolist()
        assert index[n].tolist() == kept + [-1] * (max_detections - len(kept)) and size[n] == len(kept)


@given(seed=st.integers(0, 2**63 - 1))
@many_cases
def test_limits_of_a_padded_batch(device, seed):
    cases = NmsCases(seed)
    count = cases.one_of(cases.integer(0, 60), cases.integer(600, 900))
    boxes = torch.stack([cases.boxes(count).float() for _ in range(2)])
    labels = cases.integers(2 * count, 0, cases.one_of(0, 3, 40)).view(2, count)
    order = torch.stack([torch.randperm(count, generator=cases.generator) for _ in range(2)])
    if count and cases.integer(0, 1):
        order[cases.integer(0, 1), cases.integer(0, count - 1)] = cases.one_of(
            -1, count
        )  # an entry that is out of range
    valid = torch.tensor([cases.integer(-1, count + 1), cases.integer(0, count)])
    threshold, max_detections = cases.one_of(0.5, 0.3, 0.0), cases.one_of(count, cases.integer(0, count), 5)
    max_per_class, class_agnostic = cases.one_of(0, 1, 7, 600), bool(cases.integer(0, 1))
    actual = torch.ops.retinanet_ops.nms_sorted(
        *(t.to(device) for t in (boxes, order, valid, labels)),
        threshold,
        max_detections,
        max_per_class,
        class_agnostic,
    )
    for n in range(2):
        listed = [i for i in order[n, : max(0, int(valid[n]))].tolist() if 0 <= i < count]
        scores = torch.full((count,), -torch.inf)
        scores[listed] = torch.arange(len(listed), 0, -1, dtype=torch.float32)
        kept, truncated = greedy_nms(
            boxes[n],
            scores,
            labels[n],
            threshold,
            max_detections,
            class_agnostic=class_agnostic,
            max_per_class=max_per_class or None,
        )
        index, size, cut = (t[n].cpu() for t in actual)
        assert index.tolist() == kept + [-1] * (max_detections - len(kept))
        assert size == len(kept) and cut == truncated
