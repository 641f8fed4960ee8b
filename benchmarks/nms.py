"""NMS of one list of boxes, with one class and within each of 80 classes, and of a padded batch."""

from collections.abc import Callable

import pytest
import torch
from harness import ground_truth

import retinanet_ops as ops

THRESHOLD = 0.5


def unique_scores(*shape, device):
    """Return scores without ties, which every sort orders in the same way."""
    return (torch.randperm(torch.Size(shape).numel()).reshape(shape).float() / torch.Size(shape).numel()).to(device)


@pytest.mark.parametrize("row", ("ours", "torchvision"))
@pytest.mark.parametrize("count", (1000, 5000, *(pytest.param(n, marks=pytest.mark.full) for n in (20_000, 200_000))))
@pytest.mark.parametrize("num_classes", (1, 80))
def test_nms(compare, device, num_classes, count, row):
    boxes, scores = ground_truth(count, device), unique_scores(count, device=device)
    classes = torch.randint(0, num_classes, (count,)).to(device)
    if row == "torchvision":
        torchvision = pytest.importorskip("torchvision")
        if count > 20_000:
            pytest.skip("takes minutes")
    library = ops if row == "ours" else torchvision.ops
    function = {
        1: lambda: library.nms(boxes, scores, THRESHOLD),
        80: lambda: library.batched_nms(boxes, scores, classes, THRESHOLD),
    }[num_classes]
    arguments = boxes.cpu(), scores.cpu(), classes.cpu()
    group = f"NMS, {count:,} boxes, {num_classes} classes, float32"
    if count > 20_000:
        compare(row, function, arguments, check=check_sample, group=group)
    else:
        # The oracle is a separate greedy NMS on the CPU, which computes its IoU matrix row by row.
        compare(row, function, plain_nms(*arguments), check=check_of(row), group=group)


@pytest.mark.parametrize("row", ("ours", "torchvision, image by image"))
@pytest.mark.parametrize("images", (2, pytest.param(16, marks=pytest.mark.full)))
def test_padded_batch(compare, device, images, row):
    count, max_detections = 5000, 100
    boxes = torch.stack([ground_truth(count, device) for _ in range(images)])
    scores, labels = unique_scores(images, count, device=device), torch.randint(0, 80, (images, count)).to(device)
    expected = torch.stack(
        [plain_nms(b.cpu(), s.cpu(), c.cpu())[:max_detections] for b, s, c in zip(boxes, scores, labels, strict=True)]
    )

    def image_by_image() -> torch.Tensor:
        import torchvision

        keep = [torchvision.ops.batched_nms(*image, THRESHOLD) for image in zip(boxes, scores, labels, strict=True)]
        return torch.stack([k[:max_detections] for k in keep])

    if row != "ours":
        pytest.importorskip("torchvision")
    options = {"iou_threshold": THRESHOLD, "max_detections": max_detections}
    ours = lambda: ops.batched_nms_padded(boxes, scores, labels, **options)[0]  # noqa: E731
    compare(
        row,
        ours if row == "ours" else image_by_image,
        expected,
        check=check_of(row),
        group=f"padded NMS, {images} x {count:,} boxes, 80 classes, best {max_detections}, float32",
    )


def plain_nms(boxes: torch.Tensor, scores: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """Compute greedy NMS with code that no row shares."""
    left = torch.argsort(scores, descending=True)
    kept = []
    while len(left):
        best, left = left[0], left[1:]
        kept.append(int(best))
        left = left[(plain_iou(boxes[best], boxes[left]) <= THRESHOLD) | (classes[left] != classes[best])]
    return torch.tensor(kept)


def plain_iou(
    box: torch.Tensor,  # [4]
    boxes: torch.Tensor,  # [C, 4]
) -> torch.Tensor:  # [C]
    """Return the IoU of one box with others."""
    inter = (torch.minimum(box[2:], boxes[:, 2:]) - torch.maximum(box[:2], boxes[:, :2])).clamp(min=0).prod(1)
    return inter / ((box[2:] - box[:2]).prod() + (boxes[:, 2:] - boxes[:, :2]).prod(1) - inter)


def check_sample(keep: torch.Tensor, expected: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    """Assert the definition of NMS on a sample: a box is kept unless a better kept box of its class overlaps it."""
    boxes, scores, classes = expected
    keep = keep.cpu()
    kept = torch.zeros(len(boxes), dtype=torch.bool)
    kept[keep] = True
    assert (scores[keep].diff() < 0).all(), "NMS does not return the best first"
    for i in torch.randperm(len(boxes))[:1000].tolist():
        rivals = keep[(scores[keep] > scores[i]) & (classes[keep] == classes[i])]
        suppressed = (plain_iou(boxes[i], boxes[rivals]) > THRESHOLD).any()
        assert suppressed != kept[i], f"NMS is wrong about box {i}"


def check_of(row: str) -> Callable[[torch.Tensor, torch.Tensor], None]:
    """Return the check of a row.

    Our indices must equal the oracle's. torchvision adds offsets to the coordinates, and the rounding of the sums may
    change the decision for a pair on the threshold.
    """
    return check_equal if row == "ours" else check_nearly_equal


def check_equal(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Assert that the indices are the same and in the same order."""
    assert torch.equal(actual.cpu(), expected), "NMS keeps other boxes than the oracle, or keeps them in another order"


def check_nearly_equal(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Assert that each image keeps the same boxes in the same order, except for one in a thousand."""
    for ours, theirs in zip(torch.atleast_2d(actual.cpu()), torch.atleast_2d(expected), strict=True):
        there = {index: place for place, index in enumerate(theirs.tolist())}
        places = torch.tensor([there[index] for index in ours.tolist() if index in there])
        most = 1 + len(theirs) // 1000
        assert max(len(ours), len(theirs)) - len(places) <= most, "NMS keeps other boxes than the oracle"
        assert (places.diff() > 0).all(), "NMS does not return the best first"
