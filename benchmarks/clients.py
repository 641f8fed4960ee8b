"""NMS, IoU and focal loss of other programs beside the lines of docs/clients.md, from their inputs to their outputs.

The rows "ours" of sahi, supervision and lsnms convert arrays to tensors and back. A client that is not installed has no
rows. PyTorch and the kernels use one thread. On a busy machine, measure the time of the process by
`--benchmark-timer=time.process_time`.
"""

import functools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from focal_loss import with_gradients
from harness import one_thread
from nms import unique_scores
from torch import Tensor

import retinanet_ops as ops

PAGE = Path(__file__).resolve().parents[1] / "docs" / "clients.md"
THRESHOLD = 0.5
#: By scenario: pixels per box. With boxes of 8 to 60 pixels, nearly all boxes of the sparse one are kept.
PIXELS_PER_BOX = {"sparse": 20_000, "dense": 50}


@functools.cache
def lines(client: str) -> dict[str, Any]:
    """Run the first block of code of a client's section, which replaces nothing, and return the names it defines."""
    pytest.importorskip(client, exc_type=ImportError)
    block = re.search(rf"^## {client}\n.*?```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL | re.MULTILINE)
    names: dict[str, Any] = {}
    exec(block[1], names)
    return names


def detections(
    count: int, scenario: str = "dense", dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Return boxes in a square image, distinct scores and class ids of 10 classes."""
    sides = 8 * (60 / 8) ** torch.rand(count, 2)
    corner = torch.rand(count, 2) * (PIXELS_PER_BOX[scenario] * count) ** 0.5
    boxes = torch.cat((corner, corner + sides), dim=1).to(dtype)
    return boxes, unique_scores(count, device="cpu").to(dtype), torch.randint(0, 10, (count,))


def rows_of(boxes: Tensor, scores: Tensor, classes: Tensor) -> Any:
    """Return the array [count, 6] that sahi and supervision use."""
    return torch.cat((boxes, scores[:, None], classes[:, None].to(boxes.dtype)), dim=1).numpy()


def check_equal(actual: Any, expected: Any) -> None:
    """Assert that kept indices, or marks of the kept boxes, are the same."""
    assert list(actual) == list(expected), "the client keeps other boxes, or keeps them in another order"


def full(value: Any) -> Any:
    """Return a value that is measured with --full only."""
    return pytest.param(value, marks=pytest.mark.full)


@pytest.mark.parametrize("row", ("ours", "sahi, numpy", "sahi, numba", "sahi, torchvision"))
@pytest.mark.parametrize("name", ("nms", "batched_nms"))
@pytest.mark.parametrize("count", (10, 100, 1000, full(10_000)))
def test_sahi(compare, count, name, row):
    names = lines("sahi")
    from sahi.postprocess import backends

    predictions = rows_of(*detections(count))
    backend = row.removeprefix("sahi, ")
    if row != "ours":
        pytest.importorskip(backend)
        backends.set_postprocess_backend(backend)
    function = names[name if row == "ours" else f"sahi_{name}"]
    with one_thread():
        compare(
            row,
            lambda: function(predictions, "IOU", THRESHOLD),
            names[name](predictions, "IOU", THRESHOLD),
            check=check_equal,
            group=f"sahi {name}, {count:,} boxes, 10 classes, float32",
        )


@pytest.mark.parametrize("row", ("ours", "supervision"))
@pytest.mark.parametrize("columns, dtype", ((5, torch.float32), (6, torch.float64)))
@pytest.mark.parametrize("count", (100, 1000, full(3000)))
def test_supervision_nms(compare, count, columns, dtype, row):
    names = lines("supervision")
    predictions = rows_of(*detections(count, dtype=dtype))[:, :columns]
    function = names["box_non_max_suppression" if row == "ours" else "supervision_nms"]
    with one_thread():
        compare(
            row,
            lambda: function(predictions, THRESHOLD),
            names["box_non_max_suppression"](predictions, THRESHOLD),
            check=check_equal,
            group=f"supervision NMS, {count:,} boxes, {1 if columns == 5 else 10} classes, {dtype}",
        )


@pytest.mark.parametrize("row", ("ours", "supervision"))
@pytest.mark.parametrize("count", (100, 1000, full(3000)))
def test_supervision_soft_nms(compare, count, row):
    names = lines("supervision")
    predictions = rows_of(*detections(count))
    function = names["box_soft_non_max_suppression" if row == "ours" else "supervision_soft_nms"]
    with one_thread():
        compare(
            row,
            lambda: function(predictions, 0.5),
            names["box_soft_non_max_suppression"](predictions, 0.5),
            check=lambda actual, expected: np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-12),
            group=f"supervision Soft-NMS, {count:,} boxes, 10 classes, float32",
        )


@pytest.mark.parametrize("row", ("ours", "supervision"))
@pytest.mark.parametrize("shape", ((20, 300), full((300, 1000))), ids=str)
def test_supervision_iou(compare, shape, row):
    names = lines("supervision")
    boxes, others = (detections(count)[0].numpy() for count in shape)
    function = names["box_iou_batch" if row == "ours" else "supervision_iou"]
    with one_thread():
        compare(
            row,
            lambda: function(boxes, others),
            names["box_iou_batch"](boxes, others),
            check=lambda actual, expected: torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6),
            group=f"supervision IoU, {shape[0]} x {shape[1]:,}, float32",
        )


@pytest.mark.parametrize("row", ("ours", "kornia", "ultralytics"))
@pytest.mark.parametrize("shape", ((20, 300), full((300, 1000))), ids=str)
def test_iou_of_tensors(compare, shape, row):
    boxes, others = (detections(count)[0] for count in shape)
    if row == "kornia":
        box_iou = pytest.importorskip("kornia.metrics").mean_iou_bbox
    elif row == "ultralytics":
        box_iou = pytest.importorskip("ultralytics.utils.metrics", exc_type=ImportError).box_iou
    else:
        box_iou = ops.box_iou
    with one_thread():
        compare(
            row,
            lambda: box_iou(boxes, others),
            ops.box_iou(boxes, others),
            group=f"IoU of tensors, {shape[0]} x {shape[1]:,}, float32",
        )


@pytest.mark.parametrize("row", ("ours", "kornia"))
@pytest.mark.parametrize("shape", ((8, 20, 64, 64), full((2, 80, 100, 168))), ids=str)
def test_kornia_focal_loss(compare, shape, row):
    names = lines("kornia")
    logits, targets = torch.randn(shape).sub_(2), (torch.rand(shape) < 0.02).float()
    criteria = {
        "ours": names["OpsFocalLoss"](alpha=0.25, reduction="mean"),
        "kornia": names["BinaryFocalLossWithLogits"](alpha=0.25, reduction="mean"),
    }
    with one_thread():
        compare(
            row,
            lambda: with_gradients(lambda x: criteria[row](x, targets), [logits]),
            with_gradients(lambda x: ops.reference.sigmoid_focal_loss(x, targets, reduction="mean"), [logits]),
            check=lambda actual, expected: torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-10),
            group=f"kornia focal loss, forward + backward, {list(shape)}, float32",
        )


@pytest.mark.parametrize("row", ("ours", "kornia", "ultralytics"))
@pytest.mark.parametrize("count", (100, 1000, full(3000)))
def test_nms_of_tensors(compare, count, row):
    boxes, scores, _ = detections(count)
    if row == "kornia":
        nms = pytest.importorskip("kornia.geometry.bbox").nms
    elif row == "ultralytics":
        nms = pytest.importorskip("ultralytics.utils.nms", exc_type=ImportError).TorchNMS.nms
    else:
        nms = ops.nms
    with one_thread():
        compare(
            row,
            lambda: nms(boxes, scores, THRESHOLD),
            ops.nms(boxes, scores, THRESHOLD),
            group=f"NMS of tensors, {count:,} boxes, float32",
        )


@pytest.mark.parametrize("row", ("ours", "torchmetrics"))
@pytest.mark.parametrize("kind", ("intersection_over_union", "complete_intersection_over_union"))
def test_torchmetrics(compare, monkeypatch, kind, row):
    metrics = pytest.importorskip("torchmetrics.functional.detection", exc_type=ImportError)
    torchvision = pytest.importorskip("torchvision")
    boxes = detections(100)[0]
    others = boxes + torch.randn(100, 4)
    expected = getattr(metrics, kind)(boxes, others, aggregate=False)
    if row == "ours":
        for name in ("box_iou", "complete_box_iou"):
            monkeypatch.setattr(torchvision.ops, name, getattr(ops, name))
    with one_thread():
        compare(
            row,
            lambda: getattr(metrics, kind)(boxes, others, aggregate=False),
            expected,
            check=lambda actual, expected: torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5),
            group=f"torchmetrics {kind}, 100 x 100, float32",
        )


@pytest.mark.parametrize("row", ("ours", "lsnms"))
@pytest.mark.parametrize("dtype", (torch.float32, full(torch.float64)), ids=str)
@pytest.mark.parametrize("scenario", PIXELS_PER_BOX)
@pytest.mark.parametrize("count", (1000, 20_000, full(100_000)))
def test_lsnms(compare, count, scenario, dtype, row):
    names = lines("lsnms")
    boxes, scores = (x.numpy() for x in detections(count, scenario, dtype)[:2])
    function = names["nms"] if row == "ours" else names["lsnms"].nms
    with one_thread():
        compare(
            row,
            lambda: function(boxes, scores, iou_threshold=THRESHOLD),
            names["nms"](boxes, scores, iou_threshold=THRESHOLD),
            check=check_equal,
            group=f"lsnms, {scenario}, {count:,} boxes, {dtype}",
        )
