"""torchvision's layout: converted models give the detections of torchvision's own models."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from convert_cases import Detections, State, assert_same_detections
from torch import Tensor, nn
from torchvision.models.detection import (
    RetinaNet,
    RetinaNet_ResNet50_FPN_V2_Weights,
    retinanet_resnet50_fpn_v2,
)
from torchvision.models.detection._utils import overwrite_eps
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from retinanet import CompatConfig, RetinaNetConfig
from retinanet.checkpoints.convert import convert_checkpoint
from retinanet.common.errors import DataError

COCO_NAMES = RetinaNet_ResNet50_FPN_V2_Weights.COCO_V1.meta["categories"]
#: Limits that are never reached, so that detections of some classes do not depend on those of the other classes.
UNLIMITED = {"topk": 10**6, "max_detections": 10**4}
SIZES = {"min_size": 64, "max_size": 100}
ANCHORS = AnchorGenerator(RetinaNetConfig().anchor_sizes, ((0.5, 1.0, 2.0),) * 5)


def spread(theirs: RetinaNet, image: Tensor) -> None:
    """Scale the output layers so that some scores exceed 0.05 and boxes differ from their anchors."""
    with torch.no_grad():
        features = theirs.eval().backbone(theirs.transform([image])[0].tensors)
        outputs = theirs.head(list(features.values()))
        logits, deltas = theirs.head.classification_head.cls_logits, theirs.head.regression_head.bbox_reg
        logits.weight.mul_(0.8 / outputs["cls_logits"].std())
        logits.bias.normal_(-4.5, 0.5)
        deltas.weight.mul_(0.2 / outputs["bbox_regression"].std())
        deltas.bias.normal_(std=0.1)


def random_statistics(theirs: RetinaNet) -> None:
    """Set random statistics of batch normalisation."""
    for module in theirs.modules():
        if isinstance(module, (FrozenBatchNorm2d, nn.BatchNorm2d)):
            # With small variances, the epsilon that is added to them matters.
            module.running_var.uniform_(1e-3, 2e-3)
            module.weight.data.uniform_(0.02, 0.04)
            module.running_mean.normal_(std=0.01)


def backbone_of(name: str) -> nn.Module:
    """Return a backbone with frozen statistics, and P6 from P5."""
    top = LastLevelP6P7(256, 256)
    return resnet_fpn_backbone(backbone_name=name, weights=None, returned_layers=[2, 3, 4], extra_blocks=top)


def published_v1(image: Tensor) -> RetinaNet:
    """Return a model as published for COCO: 91 classes, frozen statistics, and an epsilon of 0."""
    limits = {"topk_candidates": UNLIMITED["topk"], "detections_per_img": UNLIMITED["max_detections"]}
    theirs = RetinaNet(backbone_of("resnet50"), 91, anchor_generator=ANCHORS, **limits, **SIZES)
    random_statistics(theirs)
    overwrite_eps(theirs, 0.0)
    spread(theirs, image)
    return theirs


def old_names(state: State) -> State:
    """Return a state dict with the names in the file that torchvision publishes."""
    renamed = {}
    for name, value in state.items():
        name = re.sub(r"(inner|layer)_blocks\.(\d)\.0\.", r"\1_blocks.\2.", name)
        renamed[re.sub(r"_head\.conv\.(\d)\.0\.", lambda m: f"_head.conv.{2 * int(m[1])}.", name)] = value
    return renamed


def detections_of(theirs: RetinaNet, image: Tensor) -> Detections:
    with torch.no_grad():
        result = theirs.eval()([image])[0]
    return Detections(result["boxes"].double(), result["scores"].double(), result["labels"])


def test_v1_with_91_and_with_80_classes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    image = torch.rand(3, 90, 70)
    theirs = published_v1(image)
    state = old_names(theirs.state_dict())
    assert "backbone.fpn.inner_blocks.0.weight" in state and "head.regression_head.conv.6.bias" in state
    torch.save(state, tmp_path / "old.pth")
    torch.save({"model": theirs.state_dict(), "epoch": 25}, tmp_path / "new.pth")
    sizes = {"min_size": [64], "max_size": 100, **UNLIMITED}
    model, report = convert_checkpoint(tmp_path / "old.pth", "torchvision", fields=sizes)
    assert set(report.mapped) == set(state) and not report.unused
    assert report.config == RetinaNetConfig(compat=CompatConfig(backbone_norm_eps=0.0), **sizes)
    again, _ = convert_checkpoint(tmp_path / "new.pth", "torchvision", fields=sizes)
    expected = theirs.state_dict()
    for ours in (model.state_dict(), again.state_dict()):
        assert ours.keys() == expected.keys() and all(torch.equal(ours[name], expected[name]) for name in ours)

    theirs, image = theirs.double(), image.double()
    detections = detections_of(theirs, image)
    assert_same_detections(model.double(), image, detections, least=500)

    kept, report = convert_checkpoint(tmp_path / "old.pth", "torchvision", classes=80, fields=sizes)
    assert sum(p.numel() for p in kept.parameters()) == 33_786_804
    ids = report.config.category_ids
    assert len(ids) == 80 and (ids[0], ids[-1]) == (1, 90)
    assert report.config.class_names == tuple(name for name in COCO_NAMES[1:] if name != "N/A")
    assert report.config.class_names == tuple(COCO_NAMES[i] for i in ids)
    wanted = torch.isin(detections.labels, torch.tensor(ids))
    assert 0 < (~wanted).sum() < len(wanted) / 2
    ours = Detections(*(part[wanted] for part in detections))
    ours = ours._replace(labels=torch.searchsorted(torch.tensor(ids), ours.labels))
    assert_same_detections(kept.double(), image, ours, least=400)


def test_v2(tmp_path: Path) -> None:
    torch.manual_seed(1)
    image = torch.rand(3, 90, 70)
    theirs = retinanet_resnet50_fpn_v2(weights=None, weights_backbone=None, num_classes=5, **SIZES)
    random_statistics(theirs)
    spread(theirs, image)
    state = theirs.state_dict()
    torch.save({f"module.{name}": value for name, value in state.items()}, tmp_path / "model.pth")
    fields = {"min_size": (64,), "max_size": 100}
    names = ["a", "b", "c", "d", "e"]
    model, report = convert_checkpoint(tmp_path / "model.pth", "torchvision", class_names=names, fields=fields)
    assert report.config == RetinaNetConfig.torchvision_v2(class_names=names, backbone_norm="eval", **fields)
    assert set(report.mapped) == set(state) and any("backbone_norm is set to eval" in note for note in report.notes)
    image = image.double()
    assert_same_detections(model.double(), image, detections_of(theirs.double(), image), least=60)


def test_own_training_on_another_resnet(tmp_path: Path) -> None:
    """Trained from ImageNet weights, torchvision's models have frozen statistics and the usual epsilon."""
    torch.manual_seed(2)
    image = torch.rand(3, 90, 70)
    theirs = RetinaNet(backbone_of("resnet18"), 2, anchor_generator=ANCHORS, **SIZES)
    random_statistics(theirs)
    spread(theirs, image)
    torch.save({"state_dict": {f"model.{k}": v for k, v in theirs.state_dict().items()}}, tmp_path / "model.ckpt")
    fields = {"min_size": (64,), "max_size": 100}
    model, report = convert_checkpoint(tmp_path / "model.ckpt", "torchvision", fields=fields)
    config = report.config
    assert (config.backbone, config.backbone_norm, config.compat.backbone_norm_eps) == ("resnet18", "frozen", 1e-5)
    assert config.class_names == ("class 0", "class 1") and config.category_ids == (0, 1)
    image = image.double()
    assert_same_detections(model.double(), image, detections_of(theirs.double(), image), least=60)

    anchors = {"anchor_sizes": [[16], [32], [64], [128], [256]], "aspect_ratios": [1.0]}
    with pytest.raises(
        DataError, match="anchor_sizes and aspect_ratios: expected 9, as the rows of the heads imply, got 1"
    ):
        convert_checkpoint(tmp_path / "model.ckpt", "torchvision", fields=anchors)
    with pytest.raises(
        DataError, match="classes: expected 80 of torchvision's 91 classes, got a checkpoint with 2 classes"
    ):
        convert_checkpoint(tmp_path / "model.ckpt", "torchvision", classes=80)
    with pytest.raises(DataError, match="class_names: expected 2, as the rows of the heads imply, got 3"):
        convert_checkpoint(tmp_path / "model.ckpt", "torchvision", class_names=["a", "b", "c"])
