"""Exports of accelerated models of torchvision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from export_cases import TinyBackbone, assert_same, make_inputs
from torchvision.models.detection import FCOS, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.ssd import SSD

from retinanet.export import ExportError, export_model
from retinanet_ops.integrations.torchvision import accelerate

KINDS = {
    "retinanet": (RetinaNet, AnchorGenerator(((16, 32), (32, 64)), ((0.5, 1.0),) * 2)),
    "fcos": (FCOS, AnchorGenerator(((16,), (32,)), ((1.0,),) * 2)),
}


def make_torchvision_model(kind: str) -> Any:
    """Return an accelerated model whose random weights give detections with distinct scores."""
    torch.manual_seed(0)
    detector, anchors = KINDS[kind]
    options = {"min_size": 96, "max_size": 128, "anchor_generator": anchors, "detections_per_img": 10}
    model = detector(TinyBackbone(32), 4, score_thresh=0.005, **options).eval()
    with torch.no_grad():
        model.head.classification_head.cls_logits.weight.normal_(0, 2.0)
        model.head.regression_head.bbox_reg.weight.normal_(0, 0.02)
    return accelerate(model)


@pytest.mark.parametrize("kind", KINDS)
def test_the_file_finds_what_the_model_finds(kind: str, tmp_path: Path) -> None:
    model = make_torchvision_model(kind)
    images, sizes = make_inputs(2, 96, 128)
    sizes[1] = sizes[0]
    metadata = export_model(model, tmp_path / "model.pt2", class_names=("background", "a", "b", "c"))
    assert metadata.architecture == f"torchvision_{kind}" and metadata.rule.multiple == 32
    assert metadata.class_names == ("background", "a", "b", "c")
    boxes, scores, labels, count = torch.export.load(tmp_path / "model.pt2").module()(images, sizes)
    for i, own in enumerate(model(list(images))):
        number = int(count[i])
        assert number == len(own["labels"]) > 0
        got = boxes[i, :number], scores[i, :number], labels[i, :number], count[i]
        assert_same(got, (own["boxes"], own["scores"], own["labels"], count[i]))


def test_what_cannot_be_exported_is_refused(tmp_path: Path) -> None:
    detector, anchors = KINDS["retinanet"]
    with pytest.raises(ExportError, match=r"^RetinaNet: cannot be exported; .*\.accelerate$"):
        export_model(detector(TinyBackbone(32), 4, anchor_generator=anchors), tmp_path / "model.pt2")
    boxes = DefaultBoxGenerator([[2], [2]], scales=[0.1, 0.4, 0.8])
    ssd = accelerate(SSD(TinyBackbone(32), boxes, (96, 96), 4, head=torch.nn.Identity()))
    with pytest.raises(ExportError, match=r"^AcceleratedSSD: cannot be exported; expected a RetinaNet"):
        export_model(ssd, tmp_path / "model.pt2")
    limitless = make_torchvision_model("retinanet")
    limitless.detections_per_img = None
    with pytest.raises(ExportError, match=r"model\.detections_per_img must be the number of slots"):
        export_model(limitless, tmp_path / "model.pt2", size=(96, 96), batch=1)
    assert not list(tmp_path.iterdir())
