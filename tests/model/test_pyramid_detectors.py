"""FCOS and Faster R-CNN: networks, losses and detections equal to torchvision's, crowds, and configurations."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from synthetic import random_boxes
from torch import Tensor, nn
from torchvision.models.detection import FCOS as TorchvisionFCOS
from torchvision.models.detection import FasterRCNN as TorchvisionFasterRCNN
from torchvision.models.detection import fasterrcnn_resnet50_fpn, fcos_resnet50_fpn
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

import retinanet_ops as ops
from retinanet.common.errors import ConfigError
from retinanet.model.architectures import build_model
from retinanet.model.detector import Detector
from retinanet.model.detector_config import CONFIG_CLASSES
from retinanet.model.faster_rcnn import FasterRCNN
from retinanet.model.faster_rcnn_config import FasterRCNNConfig
from retinanet.model.fcos import FCOS
from retinanet.model.fcos_config import FCOSConfig
from retinanet_ops import _fcos

CLASSES = ("cat", "dog", "bird")
SIZES = {"min_size": (120,), "max_size": 200}


def spread_fcos(model: FCOS) -> None:
    """Spread the outputs of the head, because after initialisation nothing is detected and most distances are 0."""
    regression = model.head.regression_head
    for conv, bias in (
        (model.head.classification_head.cls_logits, -3.0),
        (regression.bbox_reg, 2.0),
        (regression.bbox_ctrness, 0.0),
    ):
        nn.init.normal_(conv.weight, std=0.06)
        nn.init.constant_(conv.bias, bias)


def torchvisions_fcos(config: FCOSConfig) -> TorchvisionFCOS:
    backbone = resnet_fpn_backbone(
        backbone_name="resnet18",
        weights=None,
        trainable_layers=5,
        returned_layers=[2, 3, 4],
        extra_blocks=LastLevelP6P7(256, 256),
    )
    return TorchvisionFCOS(
        backbone,
        len(CLASSES),
        min_size=120,
        max_size=200,
        score_thresh=config.score_threshold,
        topk_candidates=config.topk,
        detections_per_img=config.max_detections,
    )


def spread_faster_rcnn(model: FasterRCNN) -> None:
    """Spread the outputs of the heads, so that there are proposals and detections of several sizes and scores."""
    predictor = model.roi_heads["box_predictor"]
    for layer, std in (
        (model.rpn["head"].cls_logits, 0.1),
        (model.rpn["head"].bbox_pred, 0.02),
        (predictor.cls_score, 0.2),
        (predictor.bbox_pred, 0.1),
    ):
        nn.init.normal_(layer.weight, std=std)
    nn.init.constant_(predictor.cls_score.bias, 0.0)


def torchvisions_faster_rcnn(config: FasterRCNNConfig) -> TorchvisionFasterRCNN:
    return TorchvisionFasterRCNN(
        resnet_fpn_backbone(backbone_name="resnet18", weights=None, trainable_layers=5),
        len(CLASSES) + 1,
        min_size=120,
        max_size=200,
        rpn_batch_size_per_image=config.rpn_batch_size,
        rpn_pre_nms_top_n_train=config.rpn_topk_training,
        rpn_post_nms_top_n_train=config.proposals_training,
        box_batch_size_per_image=config.roi_batch_size,
        box_score_thresh=config.score_threshold,
        box_detections_per_img=config.max_detections,
    )


class Case(NamedTuple):
    spread: Callable[[Any], None]
    torchvisions: Callable[[Any], nn.Module]  # of a configuration with ResNet-18
    resnet50: Callable[..., nn.Module]
    first_label: int  # of torchvision's foreground classes
    classification: str  # name of the loss of the classes
    box: str  # name of the box loss of the same stage


CASES = {
    "fcos": Case(spread_fcos, torchvisions_fcos, fcos_resnet50_fpn, 0, "classification", "bbox_regression"),
    "fasterrcnn": Case(
        spread_faster_rcnn, torchvisions_faster_rcnn, fasterrcnn_resnet50_fpn, 1, "loss_classifier", "loss_box_reg"
    ),
}
every_architecture = pytest.mark.parametrize("name", CASES)


def new_model(name: str, **fields: object) -> Detector:
    torch.manual_seed(0)
    defaults = {"class_names": CLASSES, "backbone": "resnet18", "trainable_backbone_layers": None, **SIZES}
    model = build_model(CONFIG_CLASSES[name](**{**defaults, **fields}))
    CASES[name].spread(model)
    return model


def pair(model: Detector) -> nn.Module:
    """Return torchvision's model with the same weights, which must have the same names."""
    other = CASES[model.config.architecture].torchvisions(model.config)
    other.load_state_dict(model.state_dict())
    return other.train(model.training)


def random_batch(counts: tuple[int, ...] = (5, 0, 12)) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    sizes = [(110, 150), (120, 90), (140, 140)]
    images = [torch.rand(3, *size) for size in sizes[: len(counts)]]
    targets = [
        {"boxes": random_boxes(n, *size), "labels": torch.randint(0, len(CLASSES), (n,))}
        for n, size in zip(counts, sizes, strict=False)
    ]
    return images, targets


def torchvision_targets(name: str, targets: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    return [{"boxes": t["boxes"], "labels": t["labels"] + CASES[name].first_label} for t in targets]


@every_architecture
def test_state_dict_and_preprocessing_are_torchvisions(name: str) -> None:
    with torch.device("meta"):
        theirs = CASES[name].resnet50(weights=None, weights_backbone=None, num_classes=3 + CASES[name].first_label)
        ours = build_model(CONFIG_CLASSES[name](class_names=CLASSES, backbone_norm="batch"))
    shapes = {key: value.shape for key, value in ours.state_dict().items()}
    assert shapes == {key: value.shape for key, value in theirs.state_dict().items()}
    for field in ("image_mean", "image_std", "min_size"):
        assert list(getattr(ours.config, field)) == list(getattr(theirs.transform, field))
    assert ours.config.max_size == theirs.transform.max_size


@every_architecture
@pytest.mark.parametrize("counts", [(5, 0, 12), (0, 1), (30,)])
def test_losses_and_gradients_equal_torchvisions(name: str, counts: tuple[int, ...]) -> None:
    model = new_model(name).train()
    other = pair(model)
    images, targets = random_batch(counts)
    torch.manual_seed(1)
    got = model(images, targets)
    torch.manual_seed(1)
    expected = other(images, torchvision_targets(name, targets))
    assert got.keys() == expected.keys() == set(model.loss_names)
    for key in got:
        torch.testing.assert_close(got[key], expected[key], rtol=1e-4, atol=1e-6)
    sum(got.values()).backward()
    sum(expected.values()).backward()
    theirs = dict(other.named_parameters())
    for key, parameter in model.named_parameters():
        assert (parameter.grad - theirs[key].grad).norm() <= 1e-3 * theirs[key].grad.norm() + 1e-7, key


@every_architecture
def test_losses_without_any_object_are_finite(name: str) -> None:
    model = new_model(name).train()
    other = pair(model)
    images, targets = random_batch((0, 0))
    torch.manual_seed(1)
    got = model(images, targets)
    torch.manual_seed(1)
    expected = other(images, targets)
    for key, value in got.items():
        # torchvision divides FCOS's sum over the batch by 1, and this package divides it by the number of images.
        torch.testing.assert_close(value, expected[key] / (2 if name == "fcos" else 1), rtol=1e-4, atol=1e-6)
    sum(got.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@every_architecture
def test_detections_equal_torchvisions(name: str) -> None:
    model = new_model(name, score_threshold=0.1, max_detections=40).eval()
    images, _ = random_batch()
    got, expected = model(images), pair(model)(images)
    for one, two in zip(got, expected, strict=True):
        assert len(one["scores"]) == len(two["scores"]) > 20
        torch.testing.assert_close(one["scores"], two["scores"], rtol=0, atol=1e-5)
        torch.testing.assert_close(one["boxes"], two["boxes"], rtol=1e-4, atol=1e-2)
        assert torch.equal(one["labels"], two["labels"] - CASES[name].first_label)


@every_architecture
def test_unused_slots_are_those_of_detect(name: str) -> None:
    model = new_model(name, score_threshold=0.5, max_detections=300).eval()
    batch = model.prepare(random_batch()[0])
    found = model.detections(batch.pixels, batch.size_tensor())
    assert found.scores.shape == (3, 300) and (found.count < 300).all()
    unused = torch.arange(300) >= found.count[:, None]
    assert (found.boxes[unused] == 0).all() and (found.scores[unused] == 0).all() and (found.labels[unused] == -1).all()
    assert not found.truncated.any()
    few = new_model(name, score_threshold=0.1, max_detections=5).eval().detections(batch.pixels, batch.size_tensor())
    assert few.count.tolist() == [5, 5, 5] and few.truncated.all()


@every_architecture
def test_detections_are_the_candidates_that_nms_keeps(name: str) -> None:
    model = new_model(name, score_threshold=0.1, max_detections=40).eval()
    batch = model.prepare(random_batch()[0])
    found = model.detections(batch.pixels, batch.size_tensor())
    best = model.candidates(batch.pixels, batch.size_tensor())
    kept, count = ops.batched_nms_padded(
        best.boxes, best.scores, best.labels, iou_threshold=model.config.nms_threshold, max_detections=40
    )
    assert torch.equal(count, found.count) and (count > 20).all()
    for image, rows in enumerate(kept):
        rows = rows[rows >= 0]
        for part in ("boxes", "scores", "labels", "anchor_index"):
            assert torch.equal(getattr(best, part)[image, rows], getattr(found, part)[image, : len(rows)]), part


@every_architecture
def test_crowds_hide_background(name: str) -> None:
    model = new_model(name).eval()
    image, nothing = torch.rand(3, 100, 100), {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}
    everything = {**nothing, "crowd_boxes": torch.tensor([[-400.0, -400, 500, 500]])}
    shown, hidden = (
        model.losses(batch.pixels, batch.ground_truth, batch.crowds)
        for batch in (model.prepare([image], [target]) for target in (nothing, everything))
    )
    for key in {CASES[name].classification, model.loss_names[0]}:
        assert shown[key] > 0 and hidden[key] == 0, key


@every_architecture
def test_crowds_do_not_hide_objects(name: str) -> None:
    model = new_model(name).eval()
    images, targets = random_batch((5,))
    with_crowd = [{**targets[0], "crowd_boxes": torch.tensor([[-400.0, -400, 500, 500]])}]
    for batch in (model.prepare(images, t) for t in (targets, with_crowd)):
        losses = model.losses(batch.pixels, batch.ground_truth, batch.crowds)
        assert all(losses[key] > 0 for key in (CASES[name].classification, CASES[name].box))


@every_architecture
def test_class_weights_multiply_the_loss_of_objects(name: str) -> None:
    images, targets = random_batch((5,))
    losses = []
    for weights in ((1.0, 1.0, 1.0), (2.0, 2.0, 2.0)):
        model = new_model(name, class_weights=weights).eval()
        batch = model.prepare(images, targets)
        torch.manual_seed(1)
        losses.append(model.losses(batch.pixels, batch.ground_truth))
    key = CASES[name].classification
    assert losses[0][key] < losses[1][key] < 2 * losses[0][key]
    for other in set(losses[0]) - {key}:
        torch.testing.assert_close(losses[0][other], losses[1][other])


@every_architecture
def test_a_module_can_be_the_backbone(name: str) -> None:
    sizes = {"anchor_sizes": (32, 64, 128)} if name == "fasterrcnn" else {}
    model = new_model(name, fpn_levels=(3, 4, 5), **sizes)
    fields = {**model.config.to_dict(), "backbone": "custom"}
    config = CONFIG_CLASSES[name].from_dict(fields)
    other = build_model(config, backbone=model.backbone)
    assert other.backbone is model.backbone
    with pytest.raises(ValueError, match="backbone: expected a module if and only if"):
        build_model(config)
    more = {"fpn_levels": (2, 3, 4, 5), **({"anchor_sizes": (16, 32, 64, 128)} if sizes else {})}
    longer = CONFIG_CLASSES[name].from_dict({**fields, **more})
    with pytest.raises(ValueError, match="backbone: expected a map for each of the configuration's fpn_levels"):
        build_model(longer, backbone=model.backbone)(*random_batch((1,)))


@every_architecture
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"backbone": "vgg16"}, "backbone: expected one of resnet18"),
        ({"trainable_backbone_layers": 6}, r"trainable_backbone_layers: expected an integer in 0\.\.5, got 6"),
        ({"fpn_levels": (3, 5)}, r"fpn_levels: expected consecutive levels such as \(3, 4, 5\), got \(3, 5\)"),
        ({"score_threshold": 2}, r"score_threshold: expected a number in 0\.\.1, got 2"),
        ({"class_names": ()}, "class_names: expected at least one name"),
        ({"head_norm": "group"}, "head_norm: no such field in the configuration"),
    ],
)
def test_wrong_fields_are_refused(name: str, fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CONFIG_CLASSES[name].from_dict(fields)


@every_architecture
def test_configurations_survive_json(name: str) -> None:
    config = new_model(name, category_ids=(3, 5, 9), class_weights=(1.0, 2.0, 3.0)).config
    assert CONFIG_CLASSES[name].from_dict(json.loads(json.dumps(config.to_dict()))) == config


@every_architecture
def test_targets_are_checked(name: str) -> None:
    images, targets = random_batch((2,))
    targets[0]["labels"][1] = len(CLASSES)
    with pytest.raises(ValueError, match=r"targets\[0\]\['labels'\]: expected class ids in 0\.\.2, got 3 at row 1"):
        new_model(name).train()(images, targets)


def test_outputs_of_background_do_not_reach_the_box_losses_of_an_fcos() -> None:
    model = new_model("fcos").train()
    batch = model.prepare(*random_batch((5,)))
    with torch.no_grad():
        outputs = model.heads(batch.pixels)
    points = model.points(batch.pixels, outputs)
    targets = _fcos.assign(points, batch.ground_truth, 1.5)
    of_levels = targets.labels[0].split([level[0].numel() for level in outputs.centreness])
    for distances, centreness, labels in zip(outputs.distances, outputs.centreness, of_levels, strict=True):
        background = labels.view(centreness.shape[-2:]) < 0
        distances[:, :, background] = torch.inf
        centreness[:, :, background] = torch.nan
    leaves = [level.requires_grad_() for level in (*outputs.distances, *outputs.centreness)]
    losses = _fcos.image_losses(outputs, points, batch.ground_truth, targets)
    (losses.bbox_regression + losses.bbox_ctrness).sum().backward()
    assert losses.bbox_regression.isfinite().all() and losses.bbox_ctrness.isfinite().all()
    assert all(level.grad.isfinite().all() for level in leaves)
    assert any((level.grad != 0).any() for level in leaves)


def test_the_centre_sampling_radius_limits_the_points_of_an_fcos() -> None:
    images, targets = random_batch((5,))
    counts = []
    for radius in (0.5, 1.5, 3.0):
        model = new_model("fcos", center_sampling_radius=radius)
        batch = model.prepare(images, targets)
        counts.append(int(model.image_losses(batch.pixels, batch.ground_truth).num_positive))
    assert 0 < counts[0] < counts[1] < counts[2]


def test_fcos_has_heads_of_32_groups() -> None:
    with pytest.raises(ConfigError, match="fpn_channels: expected a multiple of 32 for the GroupNorm of FCOS's heads"):
        FCOSConfig(fpn_channels=48)


def test_the_first_image_does_not_decide_how_a_faster_rcnn_pools() -> None:
    # The finest map of an image of 5 pixels has 2 cells, as if its stride were 2.
    images = [torch.rand(3, 5, 5), torch.rand(3, 96, 96)]
    model = new_model("fasterrcnn", min_size=None, size_divisible=1, score_threshold=0.1).eval()
    expected = model(images[1:])[0]
    other = new_model("fasterrcnn", min_size=None, size_divisible=1, score_threshold=0.1).eval()
    other(images[:1])
    assert len(expected["scores"]) and torch.equal(other(images[1:])[0]["boxes"], expected["boxes"])


def test_faster_rcnn_samples_at_most_the_shares_that_it_is_told() -> None:
    model = new_model("fasterrcnn", roi_batch_size=40, roi_positive_fraction=0.2).train()
    images, targets = random_batch((5, 0, 12))
    batch = model.prepare(images, targets)
    first = model.first_stage(batch.pixels)
    proposals = model.proposals(first, batch.size_tensor())
    sample = model.sample(proposals, batch.ground_truth, None)
    assert [len(labels) for labels in sample.labels] == [40, 40, 40]
    positive = [int((labels >= 0).sum()) for labels in sample.labels]
    assert positive[1] == 0 and 0 < positive[0] <= 8 and 0 < positive[2] <= 8
    for rois, labels, boxes, truth in zip(
        sample.rois, sample.labels, sample.boxes, batch.ground_truth.boxes, strict=True
    ):
        of_objects = labels >= 0
        assert torch.equal(boxes[~of_objects], rois[~of_objects])
        assert (boxes[of_objects][:, None] == truth).all(2).any(1).all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rpn_bg_iou_threshold": 0.8}, "rpn_bg_iou_threshold: expected at most rpn_fg_iou_threshold 0.7, got 0.8"),
        ({"roi_bg_iou_threshold": 0.8}, "roi_bg_iou_threshold: expected at most roi_fg_iou_threshold 0.5, got 0.8"),
        ({"anchor_sizes": (32, 64)}, "anchor_sizes: expected 5 entries, one per level of fpn_levels, got 2"),
        ({"fpn_levels": (5, 6, 7), "anchor_sizes": (32, 64, 128)}, "fpn_levels: expected none above 6 with p6_source"),
    ],
)
def test_wrong_fields_of_a_faster_rcnn_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FasterRCNNConfig(**fields)
