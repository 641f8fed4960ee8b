"""The cases that gpu_check runs on two backends: every op, with inputs that are the same on every machine.

The exact results of a case must agree in every bit: integers, and floats that IEEE arithmetic determines. Results that
depend on the accuracy of exp, log and pow, or on fused multiply-adds, are compared with a tolerance.

The test file of an op may define more cases: see `cases_of_tests`.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

OP_TESTS = Path(__file__).resolve().parents[2] / "tests" / "ops"
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
RULES = ("torchvision", "mmdet", "ssd", "off")
SEEDS = (0, 1, 2)


@dataclass
class Outcome:
    """The results of a case by name, moved to the CPU."""

    exact: dict[str, Tensor] = field(default_factory=dict)
    close: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Detach all results and move them to the CPU."""
        self.exact = {name: value.detach().cpu() for name, value in self.exact.items()}
        self.close = {name: value.detach().cpu() for name, value in self.close.items()}


@dataclass(frozen=True)
class Case:
    """One call of one or more ops.

    `run` takes the device and, when backends are compared, the results of the other backend. A later step of the case
    may start from those results.
    """

    name: str
    run: Callable[[torch.device, Outcome | None], Outcome]
    tolerance: float = 1e-5


def random_boxes(*shape: int, size: float, largest: float, step: float = 0.25) -> Tensor:
    """Return boxes `[*shape, 4]` on a lattice, so that many IoUs are equal and some lie on a threshold."""
    corner = (torch.rand(*shape, 2) * size / step).round() * step
    return torch.cat((corner, corner + (0.5 + torch.rand(*shape, 2) * largest / step).round() * step), dim=-1)


def matching(seed: int, rule: str, on_grid: bool, small: bool, dtype: torch.dtype) -> Case:
    """Return a case of matches, labels and counts of positives, with explicit anchors or a grid."""

    def run(device: torch.device, _: Outcome | None) -> Outcome:
        import retinanet_ops as ops

        torch.manual_seed(seed)
        size, grids = ((96, 128), ((12, 16), (6, 8))) if small else ((800, 1344), ((100, 168), (50, 84), (25, 42)))
        sides = tuple((4.0 * size[0] / h, 6.0 * size[0] / h) for h, _ in grids)
        grid = ops.AnchorGrid.torchvision(grids, size, sides)
        counts = torch.tensor([9, 0, 5, 20] if small else [37, 0, 300, 1])
        boxes = random_boxes(4, int(counts.max()), size=0.8 * size[0], largest=0.4 * size[0], step=2.0).to(dtype)
        labels = torch.randint(0, 80, boxes.shape[:2])
        crowds = random_boxes(4, 2, size=0.8 * size[0], largest=0.2 * size[0]).to(dtype)
        anchors = grid.to(device) if on_grid else grid.boxes().to(device, dtype)
        targets = ops.assign_targets(
            anchors,
            boxes.to(device),
            labels.to(device),
            counts.to(device),
            rule=ops.MatchRule(low_quality=rule),
            crowds=(crowds.to(device), torch.tensor([2, 0, 1, 0], device=device)),
        )
        statistics = ops.match_statistics(
            anchors, boxes.to(device), counts.to(device), rule=ops.MatchRule(low_quality=rule)
        )
        return Outcome(targets._asdict() | {f"{key} of statistics": t for key, t in statistics._asdict().items()})

    return Case(f"matching {'grid' if on_grid else 'explicit'} {rule} {dtype} seed {seed}", run)


def suppression(seed: int, small: bool) -> Case:
    """Return a case of all ops that rank by scores, in which scores tie and IoUs lie on the threshold."""

    def run(device: torch.device, _: Outcome | None) -> Outcome:
        import retinanet_ops as ops

        torch.manual_seed(seed)
        n = 300 if small else 5000
        boxes = random_boxes(2, n, size=n**0.5 * 5, largest=12.0, step=4.0).to(device)
        scores, classes = (torch.randint(0, 97, (2, n)) / 97).to(device), torch.randint(0, 7, (2, n)).to(device)
        exact = {}
        for threshold in (0.3, 0.5):
            exact[f"nms {threshold}"] = ops.nms(boxes[0], scores[0], threshold)
            exact[f"batched_nms {threshold}"] = ops.batched_nms(boxes[0], scores[0], classes[0], threshold)
            index, count = ops.batched_nms_padded(
                boxes,
                scores,
                classes,
                iou_threshold=threshold,
                max_detections=100,
                counts=torch.tensor([n, n // 2], device=device),
            )
            exact |= {f"padded index {threshold}": index, f"padded count {threshold}": count}
        # Scores in float64 are ranked before NMS, and long rows by PyTorch's sort.
        index, count = ops.batched_nms_padded(boxes, scores.double(), classes, iou_threshold=0.5, max_detections=100)
        for dtype in (torch.float32, torch.float64):
            long_scores = (torch.randint(0, 97, (1, 12_000)) / 97).to(device, dtype)
            order, valid = torch.ops.retinanet_ops.rank_scores(long_scores, None)
            exact |= {f"ranking of a long row {dtype}": order, f"candidates of a long row {dtype}": valid}
        exact |= {"padded index of float64 scores": index, "padded count of float64 scores": count}
        # A long list is decided by all multiprocessors.
        many = 1500 if small else 20000
        long_boxes = random_boxes(many, size=many**0.5 * 5, largest=12.0, step=4.0).to(device)
        exact["nms of a long list"] = ops.nms(long_boxes, (torch.randint(0, 97, (many,)) / 97).to(device), 0.5)
        for method in ("linear", "gaussian"):
            taken = ops.soft_nms(boxes, scores, classes, method=method, max_detections=100)
            exact |= {f"soft_nms {method} {i}": t for i, t in enumerate(taken)}
        labels = torch.where(classes == 6, -2, torch.where(classes == 0, 3, -1))
        exact["hard_negative_mask"] = ops.hard_negative_mask(scores, labels)
        return Outcome(exact)

    return Case(f"nms seed {seed}", run)


def head_outputs(small: bool, classes: int) -> tuple[tuple[tuple[int, int], ...], list[Tensor]]:
    """Return the sizes of the levels, and logits of which some pass the threshold and many are equal."""
    grids = ((9, 13), (5, 7), (1, 2)) if small else ((100, 168), (50, 84), (25, 42), (13, 21), (7, 11))
    logits = [(torch.randn(2, 9 * classes, h, w) * 2 - 5).mul(16).round() / 16 for h, w in grids]
    return grids, logits


def exact_detection(seed: int, dtype: torch.dtype, channels_last: bool, small: bool) -> Case:
    """Return a case of `detect` with deltas that decode exactly, so that only the scores depend on exp."""

    def run(device: torch.device, _: Outcome | None) -> Outcome:
        import retinanet_ops as ops

        torch.manual_seed(seed)
        grids, logits = head_outputs(small, 5)
        levels = tuple(range(len(grids)))
        half = torch.tensor([[2.0 ** (3 + level) + 4 * a, 2.0 ** (3 + level)] for level in levels for a in range(9)])
        grid = ops.AnchorGrid(
            torch.cat((-half, half), dim=1),
            (9,) * len(grids),
            grids,
            tuple((8.0 * 2**level, 8.0 * 2**level) for level in levels),
            ((0.0, 0.0),) * len(grids),
        )
        # Centres move by eighths of the anchor's side. Sides stay the same, because exp(0) is exactly 1.
        deltas = [torch.randint(-4, 5, (2, 36, h, w)) / 8 for h, w in grids]
        for level in deltas:
            level.view(2, 9, 4, *level.shape[2:])[:, :, 2:] = 0
        layout = torch.channels_last if channels_last else torch.contiguous_format
        detections = ops.detect(
            [t.to(device, dtype).contiguous(memory_format=layout) for t in logits],
            [t.to(device, dtype).contiguous(memory_format=layout) for t in deltas],
            grid.to(device),
            torch.tensor([[8 * grids[0][0], 8 * grids[0][1]], [7 * grids[0][0], 50]], device=device),
            topk_per_level=200,
            max_detections=100,
        )
        results = detections._asdict()
        return Outcome(close={"scores": results.pop("scores")}, exact=results)

    return Case(f"detect, exact boxes, {dtype} {'channels_last' if channels_last else ''} seed {seed}", run)


def detection_steps(seed: int, small: bool, topk: int = 1000) -> Case:
    """Return a case of the steps of `detect` on random heads. NMS gets the same decoded boxes on both backends."""

    def run(device: torch.device, theirs: Outcome | None) -> Outcome:
        import retinanet_ops as ops

        torch.manual_seed(seed)
        classes = 80
        grids, logits = head_outputs(small, classes)
        size = (8 * grids[0][0], 8 * grids[0][1])
        grid = ops.AnchorGrid.torchvision(grids, size, tuple((32.0 * 2**i,) * 3 for i in range(len(grids))))
        deltas = [(torch.randn(2, 36, h, w) * 0.4).to(device) for h, w in grids]
        sizes = torch.tensor([size, size], dtype=torch.float32, device=device)
        keys, truncated = torch.ops.retinanet_ops.select_candidates([t.to(device) for t in logits], classes, 0.05, topk)
        boxes, scores, labels, anchors = torch.ops.retinanet_ops.decode_candidates(
            keys, deltas, *grid.to(device).arguments(), sizes, classes, [1.0] * 4, -4.0, 4.0, 0.0
        )
        index, count = ops.batched_nms_padded(
            theirs.close["boxes"].to(device) if theirs else boxes,
            torch.linspace(1, 0, keys.shape[1], device=device).expand(2, -1),
            labels,
            iou_threshold=0.5,
            max_detections=100,
        )
        exact = {"keys": keys, "truncated": truncated, "labels": labels, "anchors": anchors}
        class_scores = ops.gather_class_scores([t.to(device) for t in logits], anchors, classes)
        close = {"boxes": boxes, "scores": scores, "class scores": class_scores}
        return Outcome({**exact, "index": index, "count": count}, close)

    return Case(f"detect, step by step, top {topk}, seed {seed}", run, tolerance=1e-3)


def coordinates(seed: int, small: bool, dtype: torch.dtype) -> Case:
    """Return a case of IoU and clipping, which are exact, and of what is close.

    These are box coding, GIoU, DIoU and CIoU, and the gradients of all four measures.
    """

    def run(device: torch.device, _: Outcome | None) -> Outcome:
        import retinanet_ops as ops

        torch.manual_seed(seed)
        n = 257 if small else 40_001
        boxes, anchors = (random_boxes(n, size=700.0, largest=300.0).to(device, dtype) for _ in range(2))
        size = torch.tensor([[500.0, 600.0]], dtype=dtype, device=device)
        exact = {
            "box_iou": ops.box_iou(boxes[: n // 400 + 3], anchors),
            "clip_boxes": ops.clip_boxes(boxes[None], size),
        }
        deltas = ops.encode_boxes(boxes, anchors)
        close = {"encode": deltas, "decode": ops.decode_boxes(deltas, anchors)}
        for relative in (ops.generalized_box_iou, ops.distance_box_iou, ops.complete_box_iou):
            close[relative.__name__] = relative(boxes[: n // 400 + 3], anchors)
        for loss in (ops.generalized_box_iou_loss, ops.distance_box_iou_loss, ops.complete_box_iou_loss):
            pair = boxes.clone().requires_grad_(), anchors.clone().requires_grad_()
            close[loss.__name__] = losses = loss(*pair)
            weight = torch.linspace(0, 1, n, dtype=dtype, device=device)
            grads = torch.autograd.grad((losses * weight).sum(), pair)
            close |= {f"gradient of {loss.__name__}, {i}": grad for i, grad in enumerate(grads)}
        for measure in (ops.box_iou, ops.generalized_box_iou, ops.distance_box_iou, ops.complete_box_iou):
            few, many = boxes[: n // 400 + 3].clone().requires_grad_(), anchors.clone().requires_grad_()
            weight = torch.linspace(0, 1, len(many), dtype=dtype, device=device)
            grads = torch.autograd.grad((measure(few, many) * weight).sum(), (few, many))
            close |= {f"gradient of {measure.__name__}, {i}": grad for i, grad in enumerate(grads)}
        return Outcome(exact, close)

    return Case(f"boxes {dtype} seed {seed}", run, tolerance=1e-3 if dtype == torch.float32 else 1e-9)


#: Two units in the last place for half precision. For float32 and float64, room for the accuracy of exp, log and pow.
FOCAL_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def focal_loss(seed: int, small: bool, dtype: torch.dtype, classes: bool) -> Case:
    """Return a case of the loss, its mean and its gradients for class ids or soft targets, up to saturated logits."""

    def run(device: torch.device, _: Outcome | None) -> Outcome:
        import retinanet_ops as ops

        torch.manual_seed(seed)
        rows = 67 if small else 10_003
        x = (torch.randn(rows, 81) * torch.logspace(0, 1.5, 81)).to(device, dtype).requires_grad_()
        targets = (torch.randint(-2, 81, (rows,)) if classes else torch.rand(rows, 81)).to(device)
        targets = targets if classes else targets.to(dtype)
        loss = ops.sigmoid_focal_loss(x, targets)
        (gradient,) = torch.autograd.grad(
            loss, x, torch.linspace(-1, 1, loss.numel(), device=device, dtype=dtype).view_as(loss)
        )
        total = ops.sigmoid_focal_loss(x, targets, gamma=1.5, reduction="sum")
        (of_total,) = torch.autograd.grad(total, x)
        mean = total / x.numel()
        return Outcome(close={"loss": loss, "gradient": gradient, "mean": mean, "gradient of the sum": of_total})

    kind = "class ids" if classes else "dense"
    return Case(f"focal loss {kind} {dtype} seed {seed}", run, FOCAL_TOLERANCE[dtype])


def dense_focal_loss(seed: int, small: bool, dtype: torch.dtype, channels_last: bool) -> Case:
    """Return a case of losses and gradients of levels of odd and even sizes, with and without weights and smoothing."""

    def run(device: torch.device, _: Outcome | None) -> Outcome:
        import retinanet_ops as ops

        torch.manual_seed(seed)
        grids = ((12, 16), (5, 7)) if small else ((100, 168), (51, 83), (7, 11))
        layout = torch.channels_last if channels_last else torch.contiguous_format
        levels = [(torch.randn(2, 3 * 20, h, w) * 5).to(device, dtype, memory_format=layout) for h, w in grids]
        levels = [level.requires_grad_() for level in levels]
        labels = torch.randint(-2, 20, (2, sum(3 * h * w for h, w in grids))).to(device)
        results = {}
        weight = torch.rand(labels.shape).to(device, torch.float64 if dtype == torch.float64 else torch.float32)
        weighted: dict[str, Any] = {"anchor_weight": weight, "gamma": 1.5, "label_smoothing": 0.1}
        plain: dict[str, Any] = {}
        for name, options in (("plain", plain), ("weighted", weighted)):
            loss = ops.dense_focal_loss(levels, labels, 20, **options)
            results[f"{name} loss"] = loss / labels.shape[1]
            for i, gradient in enumerate(torch.autograd.grad(loss, levels, torch.ones_like(loss))):
                results[f"{name} gradient of level {i}"] = gradient
        return Outcome(close=results)

    layout = "channels_last" if channels_last else "contiguous"
    return Case(f"dense focal loss {layout} {dtype} seed {seed}", run, FOCAL_TOLERANCE[dtype])


def dense_box_loss(seed: int, small: bool, dtype: torch.dtype, channels_last: bool) -> Case:
    """Return a case of losses and gradients of every kind of box loss."""

    def run(device: torch.device, _: Outcome | None) -> Outcome:
        import retinanet_ops as ops

        torch.manual_seed(seed)
        grids = ((12, 16), (5, 7)) if small else ((100, 168), (51, 83), (7, 11))
        layout = torch.channels_last if channels_last else torch.contiguous_format
        grid = ops.AnchorGrid.torchvision(grids, (800, 1344), tuple((32.0 * 2**i,) for i in range(len(grids))))
        levels = [(torch.randn(2, 3 * 4, h, w) * 0.3).to(device, dtype, memory_format=layout) for h, w in grids]
        levels = [level.requires_grad_() for level in levels]
        boxes = random_boxes(2, 9, size=700.0, largest=300.0).to(device)
        matches = torch.randint(-30, 9, (2, grid.num_anchors)).clamp(min=-2).to(device)
        results = {}
        for kind in ("l1", "smooth_l1", "giou", "diou", "ciou"):
            loss = ops.dense_box_loss(levels, grid.to(device), boxes, matches, kind=kind)
            results[f"{kind} loss"] = loss / grid.num_anchors
            for i, gradient in enumerate(torch.autograd.grad(loss, levels, torch.ones_like(loss))):
                results[f"{kind} gradient of level {i}"] = gradient
        return Outcome(close=results)

    layout = "channels_last" if channels_last else "contiguous"
    return Case(f"dense box loss {layout} {dtype} seed {seed}", run, 10 * FOCAL_TOLERANCE[dtype])


def cases_of_tests(small: bool) -> Iterator[Case]:
    """Yield the cases that the test files of tests/ops define in a function `gpu_check_cases(small)`.

    The function yields (name, run, tolerance). `run(device)` returns results by name, which must agree in every bit if
    the tolerance is 0. Test files need pytest, so there are no such cases without it.
    """
    for path in sorted(OP_TESTS.glob("test_*.py")):
        if "def gpu_check_cases(" not in path.read_text() or importlib.util.find_spec("pytest") is None:
            continue
        sys.path.insert(0, str(OP_TESTS))  # tests import their helpers from their own folder
        try:
            module = importlib.import_module(path.stem)
        finally:
            sys.path.remove(str(OP_TESTS))
        for name, run, tolerance in module.gpu_check_cases(small):
            yield case_of_test(name, run, tolerance)


def case_of_test(name: str, run: Callable[[torch.device], dict[str, Tensor]], tolerance: float) -> Case:
    """Return the case that a test file describes."""

    def outcome(device: torch.device, _: Outcome | None) -> Outcome:
        results = run(device)
        return Outcome(close=results) if tolerance else Outcome(exact=results)

    return Case(name, outcome, tolerance)


def cases(small: bool) -> Iterator[Case]:
    """Yield every case: all ops, dtypes and kernels, with three seeds for matching, NMS and detection."""
    for seed in SEEDS:
        for rule in RULES:
            for on_grid in (True, False):
                yield matching(seed, rule, on_grid, small, torch.float32)
        yield suppression(seed, small)
        yield detection_steps(seed, small)
        for channels_last in (False, True):
            yield exact_detection(seed, torch.float32, channels_last, small)
    yield matching(3, "mmdet", False, small, torch.float64)
    for dtype in DTYPES[1:]:
        yield exact_detection(3, dtype, False, small)
    yield detection_steps(3, small, topk=3000)  # more than a block's memory holds
    for dtype in (torch.float32, torch.float64):
        yield coordinates(3, small, dtype)
    for dtype in DTYPES:
        for classes in (True, False):
            yield focal_loss(3, small, dtype, classes)
            yield dense_focal_loss(3, small, dtype, channels_last=classes)
            yield dense_box_loss(3, small, dtype, channels_last=classes)
    yield from cases_of_tests(small)
