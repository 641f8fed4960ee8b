"""Exports of accelerated models of torchvision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cli_cases import make_data
from export_cases import TinyBackbone, assert_same, make_inputs
from torch import Tensor, nn
from torchvision.models.detection import FCOS, RetinaNet
from torchvision.models.detection._utils import BoxLinearCoder
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.ssd import SSD

from retinanet.common.errors import ConfigError, DataError
from retinanet.data import open_dataset
from retinanet.export import ExportError, export_model
from retinanet.export.families import exportable
from retinanet.export.program import DetectionProgram
from retinanet.export.verify import verify_export
from retinanet_ops.integrations.torchvision import accelerate

KINDS = {
    "retinanet": (RetinaNet, AnchorGenerator(((16, 32), (32, 64)), ((0.5, 1.0),) * 2)),
    "fcos": (FCOS, AnchorGenerator(((16,), (32,)), ((1.0,),) * 2)),
}

NAMES = ("background", "a", "b", "c")


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


def state(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, bool]]:
    """Return copies of the parameters and buffers, and the mode of each module."""
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    return tensors, {name: module.training for name, module in model.named_modules()}


def assert_unchanged(model: nn.Module, before: tuple[dict[str, Tensor], dict[str, bool]]) -> None:
    tensors, modes = state(model)
    assert modes == before[1]
    for name, value in tensors.items():
        assert torch.equal(value, before[0][name]), name


@pytest.mark.parametrize(("kind", "names"), [("retinanet", NAMES), ("fcos", ())])
def test_the_file_finds_what_the_model_finds(kind: str, names: tuple[str, ...], tmp_path: Path) -> None:
    model, path = make_torchvision_model(kind), tmp_path / "model.pt2"
    dataset = open_dataset(make_data(tmp_path / "data", 3, ("b",)))
    model.train()
    model.head.eval()
    before = state(model)
    metadata = export_model(model, path, class_names=names)
    assert metadata.architecture == f"torchvision_{kind}" and metadata.rule.multiple == 32
    assert metadata.class_names == names and metadata.score_threshold == 0.005 and metadata.score_thresholds is None
    if names:
        (found,) = verify_export(model, path, dataset)
        assert found.agrees and found.ap is not None and found.ap[0] == found.ap[1]
    else:
        with pytest.raises(DataError, match=r"model\.pt2: expected the names of the classes, .*with class_names, or "):
            verify_export(model, path, dataset)
        (found,) = verify_export(model, path, sorted((tmp_path / "data").glob("*.png")))
        assert found.agrees and found.ap is None
    assert_unchanged(model, before)

    model.eval()
    images, sizes = make_inputs(2, 96, 128)
    sizes[1] = sizes[0]
    boxes, scores, labels, count = torch.export.load(path).module()(images, sizes)
    for i, own in enumerate(model(list(images))):
        number = int(count[i])
        assert number == len(own["labels"]) > 0
        got = boxes[i, :number], scores[i, :number], labels[i, :number]
        assert_same(got, (own["boxes"], own["scores"], own["labels"]))


def test_a_copy_in_half_precision_has_the_statistics_of_its_model() -> None:
    model = make_torchvision_model("retinanet").train()
    before = state(model)
    source = exportable(model, NAMES)
    assert_unchanged(model, before)
    program = DetectionProgram(source, half=True)
    assert program.source.class_names == NAMES
    for name, value in program.model.state_dict().items():
        assert torch.equal(value, before[0][name].half() if value.is_floating_point() else before[0][name]), name


def test_images_are_stretched_to_the_fixed_size_of_a_transform(tmp_path: Path) -> None:
    model = make_torchvision_model("retinanet")
    model.transform.fixed_size = (100, 90)  # width and height
    metadata = export_model(model, tmp_path / "model.pt2", batch=1)
    assert metadata.size == (96, 128) and metadata.rule.stretched == (90, 100)
    images = torch.zeros(1, 3, 96, 128)
    images[..., :90, :100] = make_inputs(1, 90, 100)[0]
    found = torch.export.load(tmp_path / "model.pt2").module()(images, torch.tensor([[90, 100]]))
    (own,) = model([images[0, :, :90, :100]])
    number = int(found[3])
    assert number > 0
    assert_same(tuple(values[0, :number] for values in found[:3]), (own["boxes"], own["scores"], own["labels"]))
    with pytest.raises(ConfigError, match=r"^size: expected 96 128, the only size that this torchvision_retinanet "):
        export_model(model, tmp_path / "other.pt2", size=(90, 100))


def test_what_cannot_be_exported_is_refused(tmp_path: Path) -> None:
    detector, anchors = KINDS["retinanet"]
    with pytest.raises(ExportError, match=r"^RetinaNet: cannot be exported; .*\.accelerate$"):
        export_model(detector(TinyBackbone(32), 4, anchor_generator=anchors), tmp_path / "model.pt2")
    boxes = DefaultBoxGenerator([[2], [2]], scales=[0.1, 0.4, 0.8])
    ssd = accelerate(SSD(TinyBackbone(32), boxes, (96, 96), 4, head=torch.nn.Identity()))
    with pytest.raises(ExportError, match=r"^AcceleratedSSD: cannot be exported; expected a RetinaNet"):
        export_model(ssd, tmp_path / "model.pt2")
    model = make_torchvision_model("retinanet")
    message = "^class_names: expected 4 names, one for each label of the model from 0, got 3$"
    with pytest.raises(ConfigError, match=message):
        export_model(model, tmp_path / "model.pt2", class_names=NAMES[1:])

    class Shifted(AnchorGenerator):
        def grid_anchors(self, grid_sizes: Any, strides: Any) -> Any:
            return [anchors + 1 for anchors in super().grid_anchors(grid_sizes, strides)]

    model.anchor_generator = Shifted(anchors.sizes, anchors.aspect_ratios)
    refused = r"^torchvision_{}: cannot be exported: model\.{}: expected .*, got {}"
    with pytest.raises(ExportError, match=refused.format("retinanet", "anchor_generator", "Shifted, .*; give its")):
        export_model(model, tmp_path / "model.pt2")
    model = make_torchvision_model("retinanet")
    model.detections_per_img = None
    with pytest.raises(ExportError, match=refused.format("retinanet", "detections_per_img", "None; set it to ")):
        export_model(model, tmp_path / "model.pt2")
    model = make_torchvision_model("fcos")
    model.box_coder = BoxLinearCoder(normalize_by_size=False)
    with pytest.raises(ExportError, match=refused.format("fcos", r"box_coder\.normalize_by_size", "False; .*train")):
        export_model(model, tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())
