"""`detect` and `candidates` in ONNX files give the detections of the ops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import retinanet_ops as ops

pytest.importorskip("onnxruntime")
pytest.importorskip("openvino")
from onnx_cases import DYNAMIC, RUNTIMES, Runtime, assert_equal, export

CLASSES, PER_CELL = 3, 6
#: Calls of `detect` in the one file.
OPTIONS = {
    "default": {},
    "agnostic": dict(
        class_agnostic=True, clip="after_nms", topk_per_level=25, coder_weights=(10.0, 10.0, 5.0, 5.0), offset=1.0
    ),
    "per_class": dict(max_per_class=4, iou_threshold=0.3, max_detections=10, max_log_ratio=None, score_threshold=0.0),
    "per_class_agnostic": dict(max_per_class=3, class_agnostic=True, topk_per_level=50, min_log_ratio=-0.2),
}


class Detectors(nn.Module):
    """Detection on a grid whose size follows the heads, with every option, and on the same anchors as a tensor."""

    def forward(self, logits0: Tensor, logits1: Tensor, deltas0: Tensor, deltas1: Tensor, sizes: Tensor):
        heads = [logits0, logits1], [deltas0, deltas1]
        grid = ops.AnchorGrid.detectron2(
            [tuple(level.shape[2:]) for level in heads[0]],
            strides=(8, 16),
            sizes=((16.0, 24.0), (40.0, 60.0)),
            aspect_ratios=(0.5, 1.0, 2.0),
            offset=0.5,
        )
        found = [ops.detect(*heads, grid, sizes, **options) for options in OPTIONS.values()]
        half = [[level.half() for level in levels] for levels in heads]
        found.append(ops.detect(*half, grid, sizes, topk_per_level=40))
        found.append(ops.candidates(*heads, grid, sizes, topk_per_level=100, score_threshold=0.2))
        shifts = torch.arange(sizes.shape[0]) * 2.0
        own = grid.boxes()[None] + shifts[:, None, None]
        found.append(ops.candidates(*heads, own, score_threshold=0.3))
        return tuple(field for fields in found for field in fields)


KINDS = {call: ops.Detections for call in (*OPTIONS, "half")} | {"grid": ops.Candidates, "own": ops.Candidates}
NAMES = [f"{call}.{field}" for call, kind in KINDS.items() for field in kind._fields]


def heads(
    images: int, shapes: tuple[tuple[int, int], ...], *, seed: int, bias: float, ties: bool
) -> tuple[Tensor, ...]:
    """Return logits and deltas of two levels, and sizes of images within the batch."""
    generator = torch.Generator().manual_seed(seed)
    logits = [torch.randn(images, PER_CELL * CLASSES, *s, generator=generator) * 1.5 + bias for s in shapes]
    if ties:  # a third of the logits of an image are equal to others
        logits = [(2 * level).round() / 2 for level in logits]
    deltas = [torch.randn(images, PER_CELL * 4, *s, generator=generator) * 0.3 for s in shapes]
    # Half precision holds these numbers exactly, because OpenVINO drops the conversion to it.
    logits, deltas = ([level.half().float() for level in levels] for levels in (logits, deltas))
    height, width = 8.0 * shapes[0][0], 8.0 * shapes[0][1]
    sizes = torch.tensor([[height, width], [height - 11, width - 7.5]]).repeat(images, 1)[:images]
    return (*logits, *deltas, sizes)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    heads_shape = {0: DYNAMIC, 2: DYNAMIC, 3: DYNAMIC}
    return export(
        tmp_path_factory.mktemp("onnx") / "detect.onnx",
        Detectors(),
        heads(2, ((8, 10), (4, 5)), seed=0, bias=-3, ties=False),
        (heads_shape, heads_shape, heads_shape, heads_shape, {0: DYNAMIC}),
        optimize=False,
    )


@pytest.fixture(scope="module", params=RUNTIMES)
def runtime(request, path):
    return Runtime(request.param, path)


@pytest.mark.parametrize(
    "images, shapes, bias, ties",
    [
        pytest.param(1, ((8, 10), (4, 5)), -3.0, False, id="1 image"),
        pytest.param(2, ((12, 7), (6, 4)), -1.0, True, id="2 images of another size with ties"),
        pytest.param(7, ((9, 10), (5, 5)), -2.0, True, id="7 images with ties"),
        pytest.param(2, ((4, 5), (2, 3)), -20.0, False, id="nothing above the usual threshold"),
    ],
)
def test_file_detects_what_the_op_detects(runtime, images, shapes, bias, ties):
    arguments = heads(images, shapes, seed=images, bias=bias, ties=ties)
    expected = Detectors()(*arguments)
    counts = expected[NAMES.index("default.count")]
    assert (counts == 0).all() if bias == -20 else (counts > 20).all()
    assert_equal(runtime(*arguments), expected, NAMES)
