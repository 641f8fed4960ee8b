"""Exported programs: what they return, in this process and in one that has the kernels alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from export_cases import assert_same, expected, make_inputs, make_model
from torch import nn

from retinanet import FasterRCNN, FasterRCNNConfig, RetinaNet, RetinaNetConfig
from retinanet.common.errors import ConfigError
from retinanet.export import ExportError, InputRule, Metadata, export_model
from retinanet.export.families import exportable
from retinanet.export.formats import EXTRA_FILE
from retinanet.export.program import DetectionProgram
from retinanet.model.detector import Detector


def test_metadata(model: Detector, deployed: Path) -> None:
    files = {EXTRA_FILE: ""}
    torch.export.load(deployed / "model.pt2", extra_files=files)
    texts = json.loads(files[EXTRA_FILE])
    assert json.loads(texts["class_names"]) == ["a", "b", "c"] and json.loads(texts["category_ids"]) == [3, 5, 9]
    assert texts["format_version"] == "1" and texts["size"] == texts["batch"] == '"dynamic"'
    assert json.loads(texts["preprocessing"]) == {
        "colour": "RGB",
        "range": [0, 1],
        "resize": {
            "rule": "shorter_side",
            "min_size": 96,
            "max_size": 128,
            "interpolation": "bilinear",
            "antialias": False,
        },
        "padding": {"multiple": 32, "least": 64},
    }
    assert texts["score_threshold"] == "0.1"
    assert json.loads(texts["score_thresholds"]) == {"overall": 0.2, "by_class": [0.2, None, 0.3]}
    metadata = Metadata.from_texts(texts)
    assert metadata.score_thresholds == model.score_thresholds
    assert metadata.to_texts() == texts
    for size in ((50, 60), (333, 100), (1, 400), (96, 96)):
        if not model.transform.vanishes(*size):
            assert metadata.rule.resized_size(*size) == model.transform.resized_size(*size)
    assert metadata.rule.padded_size([(33, 100), (65, 2)]) == (96, 128)
    assert metadata.rule.padded_size([(3, 10)]) == (64, 64)
    with pytest.raises(ValueError, match="format_version"):
        Metadata.from_texts({**texts, "format_version": "2"})


def test_a_fixed_size_limits_the_size_of_images() -> None:
    rule = InputRule(min_size=96, max_size=128, padded=(96, 96))
    assert rule.resized_size(100, 200) == (48, 96) and rule.resized_size(300, 100) == (96, 32)
    # 147 * (96 / 147) is less than 96 in floating point.
    assert rule.resized_size(147, 100) == (96, 65) and rule.resized_size(100, 147) == (65, 96)
    assert rule.resized_size(1, 500) == (1, 96)
    assert InputRule(min_size=None, max_size=1, padded=(96, 96)).resized_size(147, 147) == (96, 96)
    assert InputRule.from_dict(rule.to_dict()) == rule
    stretched = InputRule(min_size=None, max_size=1, stretched=(300, 300), padded=(300, 300))
    assert stretched.resized_size(10, 20) == (300, 300) and InputRule.from_dict(stretched.to_dict()) == stretched


@pytest.mark.parametrize("kind", ["fcos", "ssd300_mobilenet_v2"])
def test_other_detectors(kind: str, tmp_path: Path) -> None:
    model = make_model(kind)
    size = model.config.fixed_size or (96, 128)
    metadata = export_model(model, tmp_path / "model.pt2", size=size, batch=2)
    assert metadata.size == size and metadata.batch == 2
    program = torch.export.load(tmp_path / "model.pt2").module()
    images, sizes = make_inputs(2, *size)
    own = expected(model, images, sizes)
    assert own[3].min() > 0
    assert_same(program(images, sizes), own)


def test_raw_and_half_programs(model: Detector) -> None:
    images, sizes = make_inputs(2, 96, 128)
    with torch.no_grad():
        raw = DetectionProgram(exportable(model), raw=True)
        outputs = dict(zip(raw.output_names(), raw(images, sizes), strict=True))
        assert list(outputs) == ["cls_logits_0", "cls_logits_1", "box_deltas_0", "box_deltas_1"]
        assert outputs["cls_logits_1"].shape == (2, 6, 3, 4) and outputs["box_deltas_0"].shape == (2, 8, 6, 8)
        half_raw = DetectionProgram(exportable(model), raw=True, half=True)
        for got, own in zip(half_raw(images, sizes), outputs.values(), strict=True):
            assert got.dtype == torch.float32
            assert 0 < (got - own).abs().max() < 0.01 * own.abs().max()
        found = DetectionProgram(exportable(model), half=True)(images, sizes)
    own_detections = expected(model, images, sizes)
    assert [value.dtype for value in found] == [value.dtype for value in own_detections]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    torch.testing.assert_close(found[0][:, :5], own_detections[0][:, :5], rtol=0, atol=0.5)


def test_what_cannot_be_exported_is_refused_by_name(tmp_path: Path) -> None:
    class Host(nn.Module):
        out_channels = 8

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            maps = images.new_zeros(len(images), 8, images.shape[2] // 16, images.shape[3] // 16)
            return maps if images.sum() > 0 else maps + 1

    path = tmp_path / "model.pt2"
    path.write_text("old")
    custom = RetinaNet(
        RetinaNetConfig(class_names=("a",), backbone="custom", fpn_levels=(4,), fpn_channels=8, anchor_sizes=((16,),)),
        backbone=Host(),
    )
    with pytest.raises(ExportError, match=r"^the custom backbone Host cannot be traced by torch.export: .*; its code"):
        export_model(custom, path)
    assert custom.training
    classes = FasterRCNNConfig(class_names=("a",), backbone="resnet18", fpn_channels=8)
    with pytest.raises(ExportError, match=r"^FasterRCNN: cannot be exported, because its number of proposals depends"):
        export_model(FasterRCNN(classes), path)
    with pytest.raises(ExportError, match=r"^Conv2d: cannot be exported; .* after retinanet_ops\.integrations"):
        export_model(nn.Conv2d(1, 1, 1), path)
    assert [file.read_text() for file in tmp_path.iterdir()] == ["old"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "torchscript"}, "format: expected one of pt2, onnx, aoti, got 'torchscript'"),
        ({"format": "onnx"}, "format onnx: expected a file name that ends in .onnx, got .*model.pt2"),
        ({"postprocess": "soft"}, "postprocess: expected one of nms, raw, got 'soft'"),
        ({"batch": 0}, "batch: expected at least 1, or any number of images, got 0"),
        ({"size": (100, 96)}, "size: expected multiples of 32, to which the model pads its batches, got 100 96"),
        ({"size": (0, 96)}, "size: expected multiples of 32, .*got 0 96"),
        ({"class_names": ("a", "b")}, "class_names: expected none, because this RetinaNet has its own .*got a, b; "),
    ],
)
def test_wrong_arguments(model: Detector, tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        export_model(model, tmp_path / "model.pt2", **options)
    assert not list(tmp_path.iterdir())


def test_the_size_of_an_ssd(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^size: expected 300 300, the only size that this ssd takes, got 320 320; "):
        export_model(make_model("ssd300_mobilenet_v2"), tmp_path / "model.pt2", size=(320, 320))
