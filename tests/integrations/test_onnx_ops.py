"""The ops in ONNX files give what they give in PyTorch, and what has no translation is refused."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import retinanet_ops as ops

pytest.importorskip("onnxruntime")
pytest.importorskip("openvino")
from onnx_cases import DYNAMIC, RUNTIMES, Runtime, assert_equal, export

import retinanet_ops.onnx

PAGE = Path(__file__).parents[2] / "docs" / "onnx.md"
#: Results of `OwnDetector`.
NAMES = [
    "nms",
    "batched_nms",
    "nms_of_all",
    "padded.index",
    "padded.count",
    "counted.index",
    "counted.count",
    "sorted.index",
    "sorted.count",
    "sorted.truncated",
    "no_slots.index",
    "no_slots.count",
    "no_slots.truncated",
    "one_of_each.index",
    "one_of_each.count",
    "one_of_each.truncated",
    "order",
    "valid",
    "decoded boxes",
    "encoded",
    "clipped boxes",
    "iou",
    "giou",
    "diou",
    "ciou",
    "class_scores",
]


class OwnDetector(nn.Module):
    """A post-processing that calls the ops one by one, as a user's detector may."""

    def forward(
        self,
        boxes: Tensor,  # [N, C, 4]
        scores: Tensor,  # [N, C]
        labels: Tensor,  # [N, C]
        counts: Tensor,  # [N]
        sizes: Tensor,  # [N, 2]
        logits: Tensor,  # [N, 3 * 4, 2, 3]
        deltas: Tensor,  # [N, 3 * 2 * 3, 4]
    ) -> tuple[Tensor, ...]:
        first, best, classes = boxes[0, :2000], scores[0, :2000], labels[0, :2000]
        grid = ops.AnchorGrid.detectron2([tuple(logits.shape[2:])], strides=(8,), sizes=((16.0,),))
        anchors = grid.boxes()
        decoded = ops.decode_boxes(deltas, grid, coder_weights=(10.0, 10.0, 5.0, 5.0), image_sizes=sizes)
        order, valid = torch.ops.retinanet_ops.rank_scores(scores, counts)
        limits = (0.3, 9, 2, False)
        # The class of the second box has its one box already. The third one overlaps it, but ranks after it. OpenVINO
        # refuses NMS of constants.
        three = torch.tensor([[[0.0, 0, 9, 9], [20, 0, 29, 9], [20, 1, 29, 10]]]) + sizes[:1, :1, None]
        of_three = torch.tensor([[0, 0, 1]])
        some, other = first[:20], ops.clip_boxes(boxes, sizes)[1]
        return (
            ops.nms(first, best, 0.5),
            ops.batched_nms(first, best, classes, 0.5),
            ops.nms(first, best, -1.0),
            *ops.batched_nms_padded(boxes, scores, labels, iou_threshold=0.5, max_detections=100),
            *ops.batched_nms_padded(boxes, scores, iou_threshold=0.2, max_detections=40, counts=counts),
            *torch.ops.retinanet_ops.nms_sorted(boxes, order, valid, labels, *limits),
            *torch.ops.retinanet_ops.nms_sorted(boxes, None, valid, labels, 0.3, 0, 0, True),
            *torch.ops.retinanet_ops.nms_sorted(three, None, torch.tensor([3]), of_three, 0.3, 5, 1, True),
            order,
            valid,
            decoded,
            ops.encode_boxes(decoded, anchors, offset=1.0),
            other,
            *(measure(some, other) for measure in (ops.box_iou, ops.generalized_box_iou)),
            *(measure(some, other) for measure in (ops.distance_box_iou, ops.complete_box_iou)),
            ops.gather_class_scores([logits], labels - 1, 4),
        )


def candidates(images: int, count: int, classes: int, *, seed: int = 0) -> tuple[Tensor, ...]:
    """Return boxes on a grid of half pixels with tied scores, so that many IoUs equal a threshold."""
    g = torch.Generator().manual_seed(seed)
    corner = torch.randint(0, 400, (images, count, 2), generator=g) / 2.0
    boxes = torch.cat((corner, corner + torch.randint(-2, 60, (images, count, 2), generator=g) / 2.0), dim=-1)
    scores = torch.randint(0, max(count // 3, 2), (images, count), generator=g) / max(count, 1)
    scores[:, 5::11], scores[:, 7::13], boxes[:, 9::17, 1] = torch.nan, -torch.inf, torch.nan
    scores[:, 3::19] = torch.inf
    labels = torch.randint(0, classes, (images, count), generator=g)
    counts = torch.tensor([count // 2, count + 3, -1]).repeat(images)[:images]
    sizes = torch.tensor([[150.5, 180.0], [199.0, 120.0]]).repeat(images, 1)[:images]
    logits, deltas = torch.randn(images, 12, 2, 3, generator=g), torch.randn(images, 18, 4, generator=g)
    return boxes, scores, labels, counts, sizes, logits, deltas


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    rows, images = {0: DYNAMIC, 1: DYNAMIC}, {0: DYNAMIC}
    return export(
        tmp_path_factory.mktemp("onnx") / "ops.onnx",
        OwnDetector(),
        candidates(2, 60, 3),
        (rows, rows, rows, images, images, images, images),
        optimize=False,
    )


@pytest.fixture(scope="module", params=RUNTIMES)
def runtime(request, path):
    return Runtime(request.param, path)


@pytest.mark.parametrize(
    "images, count, classes",
    [(2, 0, 1), (2, 1, 1), (7, 300, 2), (2, 1000, 80), (2, 10_000, 1203)],
)
def test_file_computes_what_the_ops_compute(runtime, images, count, classes):
    arguments = candidates(images, count, classes, seed=count)
    expected = OwnDetector()(*arguments)
    assert_equal(runtime(*arguments), expected, NAMES)


class SoftNms(nn.Module):
    def forward(self, boxes: Tensor, scores: Tensor) -> tuple[Tensor, ...]:
        return ops.soft_nms(boxes, scores, max_detections=5)


def test_soft_nms_is_refused_with_a_remedy(tmp_path):
    with pytest.raises(Exception, match=r"retinanet_ops::soft_nms has no translation to ONNX: .*batched_nms_padded"):
        export(tmp_path / "soft.onnx", SoftNms(), candidates(1, 8, 1)[:2], None)


def test_every_op_is_translated_or_refused():
    names = {op.name() for op in retinanet_ops.onnx.translations()}
    assert names == {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("retinanet_ops::")}


def test_without_onnxscript_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    monkeypatch.delitem(sys.modules, "retinanet_ops.onnx")
    with pytest.raises(ModuleNotFoundError, match=r"no module 'onnxscript'; run: pip install 'retinanet-ops\[onnx\]'$"):
        importlib.import_module("retinanet_ops.onnx")


@pytest.mark.skipif(not PAGE.exists(), reason="the documents are only in the source tree")
def test_example_of_the_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    definition, *blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    exec(definition, names)
    with torch.no_grad():
        names["model"].logits.weight.normal_(std=0.3)  # an untrained detector finds hardly anything
        for block in blocks:
            exec(block, names)
    assert [path.name for path in tmp_path.iterdir()] == ["detector.onnx"]  # the weights are inside
    found = [torch.from_numpy(names[name].copy()) for name in ("boxes", "scores", "labels", "count")]
    assert (found[-1] > 0).all()
    expected = [tensor.detach() for tensor in names["model"](names["images"], names["sizes"])]
    assert_equal(found, expected, ("boxes", "scores", "labels", "count"))
    assert Runtime("openvino", tmp_path / "detector.onnx")(names["images"], names["sizes"])[3].equal(found[3])
