"""Files of the detectors besides RetinaNet: they come back, and their weights start models with other classes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from synthetic import tiny_config

from retinanet.checkpoints.convert import convert_checkpoint
from retinanet.checkpoints.model_file import CheckpointError, load_model, save_model
from retinanet.checkpoints.transfer import transfer_weights
from retinanet.common.errors import DataError
from retinanet.model.detector import Detector
from retinanet.model.faster_rcnn import FasterRCNN
from retinanet.model.faster_rcnn_config import FasterRCNNConfig
from retinanet.model.fcos import FCOS
from retinanet.model.fcos_config import FCOSConfig
from retinanet.model.network import RetinaNet
from retinanet.model.ssd import SSD
from retinanet.model.ssd_config import SSDConfig
from retinanet.model.ssd_network import output_layer
from retinanet.model.thresholds import ScoreThresholds


def lite(*class_names: str, **fields: object) -> SSD:
    return SSD(SSDConfig(class_names=class_names, network="ssdlite320", **fields))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[SSD, Path]:
    torch.manual_seed(0)
    model = lite("cat", "dog", category_ids=(3, 9), min_negatives=2)
    model.score_thresholds = ScoreThresholds(0.4, (0.3, None))
    path = tmp_path_factory.mktemp("ssd") / "model.safetensors"
    save_model(path, model)
    return model, path


def change_description(source: Path, target: Path, **changes: object) -> Path:
    """Copy a model file with other entries in its metadata; None removes an entry."""
    with safe_open(source, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        description = json.loads(file.metadata()["retinanet"]) | changes
    content = {name: value for name, value in description.items() if value is not None}
    save_file(tensors, target, {"retinanet": json.dumps(content)})
    return target


def small_fcos(*class_names: str, **fields: object) -> FCOS:
    small = {"backbone": "mobilenet_v3_small", "fpn_channels": 32, "fpn_levels": (4, 5), "head_depth": 1}
    return FCOS(FCOSConfig(class_names=class_names, **{"min_size": None, "score_threshold": 0.0, **small, **fields}))


def small_faster_rcnn(*class_names: str, **fields: object) -> FasterRCNN:
    small = {"backbone": "mobilenet_v3_small", "fpn_channels": 32, "fpn_levels": (4, 5), "anchor_sizes": (16, 32)}
    small |= {"min_size": None, "score_threshold": 0.0, "representation_size": 16}
    return FasterRCNN(FasterRCNNConfig(class_names=class_names, **{**small, **fields}))


@pytest.mark.parametrize("make", [lite, small_fcos, small_faster_rcnn])
def test_a_saved_model_comes_back(tmp_path: Path, make: Callable[..., Detector]) -> None:
    torch.manual_seed(0)
    model, path = make("cat", "dog", category_ids=(3, 9)), tmp_path / "model.safetensors"
    model.score_thresholds = ScoreThresholds(0.4, (0.3, None))
    save_model(path, model)
    again = load_model(path, class_names=("cat", "dog"))
    assert type(again) is type(model)
    assert again.config == model.config
    assert again.score_thresholds == model.score_thresholds
    images = [torch.rand(3, 60, 80)]
    for got, expected in zip(again(images), model.eval()(images), strict=True):
        assert len(expected["scores"])
        assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_files_name_their_architecture_and_old_ones_hold_retinanets(saved: tuple[SSD, Path], tmp_path: Path) -> None:
    path = tmp_path / "retinanet.safetensors"
    save_model(path, RetinaNet(tiny_config()))
    old = change_description(path, tmp_path / "old.safetensors", architecture=None)
    assert isinstance(load_model(path), RetinaNet)
    assert isinstance(load_model(old), RetinaNet)
    nameless = change_description(saved[1], tmp_path / "nameless.safetensors", architecture=None)
    with pytest.raises(CheckpointError, match="no such field in the configuration"):
        load_model(nameless)
    unknown = change_description(saved[1], tmp_path / "unknown.safetensors", architecture="yolo")
    with pytest.raises(
        CheckpointError, match=r"architecture: expected one of retinanet, ssd, fcos, fasterrcnn, got 'yolo'"
    ):
        load_model(unknown)


def test_an_ssd_takes_no_module_as_backbone(saved: tuple[SSD, Path]) -> None:
    with pytest.raises(CheckpointError, match="backbone: expected none for the network ssdlite320, got Identity"):
        load_model(saved[1], backbone=torch.nn.Identity())


def test_rows_of_common_classes_and_of_the_background_are_transferred(saved: tuple[SSD, Path]) -> None:
    model, path = saved
    torch.manual_seed(1)
    target = lite("bird", "dog", "cat")
    before = [output_layer(level).weight.clone() for level in target.head.classification_head.module_list]
    report = transfer_weights(path, target)
    assert not report.skipped and not report.differing and len(report.adapted) == 12
    assert set(report.adapted.values()) == {"copied 2 of 3 classes: dog, cat"}
    pairs = zip(
        model.head.classification_head.module_list, target.head.classification_head.module_list, before, strict=True
    )
    for one, two, old in pairs:
        source = output_layer(one).weight.unflatten(0, (6, 3))
        new = output_layer(two).weight.unflatten(0, (6, 4))
        assert torch.equal(new[:, [0, 2, 3]], source[:, [0, 2, 1]])
        assert torch.equal(new[:, 1], old.unflatten(0, (6, 4))[:, 1])


def test_rows_for_another_loss_are_not_transferred(saved: tuple[SSD, Path]) -> None:
    report = transfer_weights(saved[1], lite("cat", "dog", cls_loss="focal"))
    assert len(report.skipped) == 12
    assert set(report.skipped.values()) == {
        "only one of the file and the model has a background class (cls_loss mining)"
    }
    assert report.differing == ["cls_loss"]


def test_weights_of_another_architecture_are_refused(saved: tuple[SSD, Path]) -> None:
    message = "expected the weights of a model of the architecture retinanet, got those of ssd; choose the same model"
    with pytest.raises(CheckpointError, match=message):
        transfer_weights(saved[1], RetinaNet(tiny_config()))


def test_weights_of_an_fcos_start_one_with_other_classes_and_levels(tmp_path: Path) -> None:
    torch.manual_seed(0)
    source, target = small_fcos("cat", "dog"), small_fcos("bird", "dog", fpn_levels=(4, 5, 6))
    save_model(tmp_path / "model.safetensors", source)
    report = transfer_weights(tmp_path / "model.safetensors", target)
    rows = [model.head.classification_head.cls_logits.weight for model in (source, target)]
    assert torch.equal(rows[1][1], rows[0][1]) and not torch.equal(rows[1][0], rows[0][0])
    assert set(report.adapted.values()) == {"copied 1 of 2 classes: dog"}
    assert set(report.skipped) == {f"backbone.fpn.extra_blocks.p6.{name}" for name in ("weight", "bias")}
    assert report.differing == ["fpn_levels"]


def test_both_layers_of_a_faster_rcnn_transfer_the_rows_of_common_classes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    source, target = small_faster_rcnn("cat", "dog"), small_faster_rcnn("bird", "dog", "cat")
    before = target.roi_heads["box_predictor"].bbox_pred.weight.clone().unflatten(0, (4, 4))
    save_model(tmp_path / "model.safetensors", source)
    report = transfer_weights(tmp_path / "model.safetensors", target)
    assert not report.skipped and not report.differing and len(report.adapted) == 4
    assert set(report.adapted.values()) == {"copied 2 of 3 classes: dog, cat"}
    one, two = (model.roi_heads["box_predictor"] for model in (source, target))
    assert torch.equal(two.cls_score.weight[[0, 2, 3]], one.cls_score.weight[[0, 2, 1]])
    rows = [layer.bbox_pred.weight.unflatten(0, (-1, 4)) for layer in (one, two)]
    assert torch.equal(rows[1][[0, 2, 3]], rows[0][[0, 2, 1]]) and torch.equal(rows[1][1], before[1])


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (lambda: FCOS(FCOSConfig(backbone="resnet18", fpn_channels=32)), "FCOS"),
        (lambda: FasterRCNN(FasterRCNNConfig(backbone="resnet18", fpn_channels=8, representation_size=8)), "R-CNN"),
    ],
)
def test_conversion_refuses_other_detectors_by_name(tmp_path: Path, model: Callable[[], Detector], name: str) -> None:
    torch.save(model().state_dict(), tmp_path / "other.pth")
    with pytest.raises(DataError, match=f"other.pth: expected a RetinaNet, got an {name}: the state dict has"):
        convert_checkpoint(tmp_path / "other.pth", "torchvision")
