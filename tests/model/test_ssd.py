"""SSD: its networks and default boxes, losses and detections equal to torchvision's, and the choices of its losses."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from synthetic import random_boxes
from torch import Tensor, nn
from torchvision.models import mobilenet_v2, mobilenet_v3_large
from torchvision.models.detection import ssd300_vgg16, ssdlite320_mobilenet_v3_large
from torchvision.models.detection.ssd import SSD as TorchvisionSSD
from torchvision.models.vgg import cfgs, make_layers

import retinanet_ops as ops
from retinanet.common.errors import ConfigError, DataError
from retinanet.model.ssd import SSD
from retinanet.model.ssd_config import NETWORKS, SSDConfig
from retinanet.model.ssd_network import output_layer

CLASSES = ("cat", "dog", "bird")


def lite(**fields: object) -> SSD:
    torch.manual_seed(0)
    return SSD(SSDConfig(**{"class_names": CLASSES, "network": "ssdlite320", **fields}))


def random_batch(counts: tuple[int, ...] = (5, 0, 12)) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    sizes = [(110, 150), (120, 90), (140, 140)]
    images = [torch.rand(3, *size) for size in sizes[: len(counts)]]
    targets = [
        {"boxes": random_boxes(n, *size), "labels": torch.randint(0, len(CLASSES), (n,))}
        for n, size in zip(counts, sizes, strict=False)
    ]
    return images, targets


def with_background(targets: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Return targets as torchvision takes them, whose class 0 is the background."""
    return [{"boxes": t["boxes"], "labels": t["labels"] + 1} for t in targets]


def torchvisions(model: SSD, make: Callable[..., TorchvisionSSD] = ssdlite320_mobilenet_v3_large) -> TorchvisionSSD:
    """Return torchvision's model with the same weights, which must have the same names."""
    other = make(
        weights=None,
        weights_backbone=None,
        num_classes=len(CLASSES) + 1,
        score_thresh=model.config.score_threshold,
        nms_thresh=model.config.nms_threshold,
        detections_per_img=model.config.max_detections,
        topk_candidates=model.config.topk,
    )
    other.load_state_dict(model.state_dict())
    return other.train(model.training)


@pytest.mark.parametrize(
    ("network", "count"),
    [
        ("ssd300_vgg16", 8732),
        ("ssd512_vgg16", 24_564),
        ("ssdlite320", 3234),
        ("ssd300_mobilenet_v2", 8732),
        ("ssd512_mobilenet_v2", 24_564),
        ("ssdlite320_mobilenet_v2", 3234),
    ],
)
def test_default_boxes_are_as_many_as_the_rows_of_the_heads(network: str, count: int) -> None:
    config = SSDConfig(class_names=CLASSES, network=network)
    model = SSD(config).to("meta")
    outputs = model.heads(torch.empty(2, 3, *config.fixed_size, device="meta"))
    assert model.default_boxes.shape == (count, 4)
    for levels, values in ((outputs.cls_logits, len(CLASSES) + 1), (outputs.box_deltas, 4)):
        assert sum(level[0].numel() for level in levels) == count * values
    cells = [tuple(level.shape[-2:]) for level in outputs.cls_logits]
    assert cells == [(side, side) for side in NETWORKS[network].grid_sizes]


def test_scales_of_ssd512() -> None:
    boxes = SSD(SSDConfig(class_names=CLASSES, network="ssd512_vgg16")).default_boxes
    widths = (boxes[:, 2] - boxes[:, 0]) / 512
    # The first box of a level is a square of its scale, the second one of the geometric mean with the next scale.
    starts = [0, 16384, 22528, 24064, 24448, 24544, 24560]
    scales = torch.tensor([0.07, 0.15, 0.3, 0.45, 0.6, 0.75, 0.9, 1.05])
    torch.testing.assert_close(widths[starts], scales[:-1])
    torch.testing.assert_close(widths[[i + 1 for i in starts]], (scales[:-1] * scales[1:]).sqrt().clamp(max=1))


@pytest.mark.parametrize("network", ["ssd300_vgg16", "ssdlite320"])
def test_networks_and_default_boxes_are_torchvisions(network: str) -> None:
    config = SSDConfig(class_names=CLASSES, network=network)
    make = ssd300_vgg16 if network == "ssd300_vgg16" else ssdlite320_mobilenet_v3_large
    with torch.device("meta"):
        theirs = make(weights=None, weights_backbone=None, num_classes=len(CLASSES) + 1)
    ours = SSD(config)
    shapes = {name: value.shape for name, value in ours.state_dict().items()}
    assert shapes == {name: value.shape for name, value in theirs.state_dict().items()}
    assert tuple(theirs.transform.image_mean) == config.image_mean
    assert tuple(theirs.transform.image_std) == pytest.approx(config.image_std)
    images = type("Images", (), {"tensors": torch.empty(1, 3, *config.fixed_size), "image_sizes": [config.fixed_size]})
    maps = [torch.empty(1, 1, side, side) for side in config.layout.grid_sizes]
    assert torch.equal(ours.default_boxes, theirs.anchor_generator(images, maps)[0])


@pytest.mark.parametrize("counts", [(5, 0, 12), (1, 0, 0)])
def test_mining_losses_and_gradients_equal_torchvisions(counts: tuple[int, ...]) -> None:
    model = lite().train()
    other = torchvisions(model)
    images, targets = random_batch(counts)
    got, expected = model(images, targets), other(images, with_background(targets))
    assert got.keys() == expected.keys()
    for name in got:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-5, atol=1e-6)
    sum(got.values()).backward()
    sum(expected.values()).backward()
    for (name, one), two in zip(model.head.named_parameters(), other.head.parameters(), strict=True):
        assert (one.grad - two.grad).norm() <= 1e-4 * two.grad.norm() + 1e-7, name
    # The gradients of layers before a normalisation cancel each other out, so that some are rounding errors alone.
    one, two = (torch.cat([p.grad.flatten() for p in m.backbone.parameters()]) for m in (model, other))
    assert (one - two).norm() <= 1e-4 * two.norm()


def test_mining_losses_of_ssd300_equal_torchvisions() -> None:
    torch.manual_seed(0)
    model = SSD(SSDConfig(class_names=CLASSES, network="ssd300_vgg16")).train()
    images, targets = random_batch((7,))
    with torch.no_grad():
        got = model(images, targets)
        expected = torchvisions(model, ssd300_vgg16)(images, with_background(targets))
    for name in got:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-5, atol=1e-6)


def test_detections_equal_torchvisions() -> None:
    model = lite(topk=20_000, score_threshold=0.3).train()
    images, targets = random_batch()
    with torch.no_grad():
        # Untrained heads score every class of every box alike. Larger weights spread the scores.
        for level in model.head.classification_head.module_list:
            output_layer(level).weight.mul_(3)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0
        model(images, targets)
    model.eval()
    got, expected = model(images), torchvisions(model)(images)
    for one, two in zip(got, expected, strict=True):
        assert len(one["scores"]) > 20
        torch.testing.assert_close(one["scores"], two["scores"], rtol=0, atol=1e-6)
        torch.testing.assert_close(one["boxes"], two["boxes"], rtol=1e-5, atol=1e-3)
        assert torch.equal(one["labels"], two["labels"] - 1)


def test_focal_loss_is_over_all_default_boxes_and_divided_by_the_matched_ones() -> None:
    model = lite(cls_loss="focal", focal_alpha=0.3, focal_gamma=1.5).train()
    images, targets = random_batch()
    batch = model.prepare(images, targets)
    got = copy.deepcopy(model)(images, targets)
    rows = model.head.classification_head(list(model.backbone(batch.pixels).values()))  # [N, A, K]
    assert rows.shape == (3, 3234, len(CLASSES))
    rule = ops.MatchRule(0.5, 0.5, "ssd")
    assigned = ops.assign_targets(model.default_boxes, *batch.ground_truth, rule=rule)
    matched = int((assigned.labels >= 0).sum())
    assert matched >= 17
    loss = ops.sigmoid_focal_loss(rows.flatten(0, 1), assigned.labels.flatten(), alpha=0.3, gamma=1.5, reduction="sum")
    torch.testing.assert_close(got["classification"], loss / matched)


def test_focal_loss_starts_at_the_prior_probability() -> None:
    model = lite(cls_loss="focal", prior_probability=0.02)
    for level in model.head.classification_head.module_list:
        bias = output_layer(level).bias
        torch.testing.assert_close(bias.sigmoid(), torch.full_like(bias, 0.02))
    assert all((output_layer(level).bias == 0).all() for level in lite().head.classification_head.module_list)


def image_losses(model: SSD, counts: tuple[int, ...]) -> dict[str, Tensor]:
    """Return the sums of the losses of each image, and the number of its positives."""
    images, targets = random_batch(counts)
    batch = model.prepare(images, targets)
    with torch.no_grad():
        losses = model.image_losses(batch.pixels, batch.ground_truth)
    return {**losses.sums, "num_positive": losses.num_positive}


def test_images_without_objects_teach_the_background_by_their_negatives() -> None:
    none, some, more = (image_losses(lite(min_negatives=n).eval(), (0, 0)) for n in (0, 1, 10))
    assert none["classification"].tolist() == [0, 0]
    assert (some["classification"] > 0).all()
    # Ten negatives have at most ten times the loss of the hardest one.
    assert (more["classification"] > some["classification"]).all()
    assert (more["classification"] <= 10 * some["classification"]).all()
    assert more["bbox_regression"].tolist() == more["num_positive"].tolist() == [0, 0]


def test_more_negatives_have_more_loss() -> None:
    losses = [image_losses(lite(negative_ratio=r).eval(), (4,))["classification"].item() for r in (0, 3, 6)]
    assert losses[0] < losses[1] < losses[2]


@pytest.mark.parametrize("cls_loss", ["mining", "focal"])
def test_class_weights_multiply_the_loss_of_matched_boxes(cls_loss: str) -> None:
    ratio = {"negative_ratio": 0.0} if cls_loss == "mining" else {}
    one = image_losses(lite(cls_loss=cls_loss, **ratio).eval(), (4,))["classification"]
    torch.manual_seed(0)
    two = image_losses(lite(cls_loss=cls_loss, class_weights=(2.0, 2.0, 2.0), **ratio).eval(), (4,))["classification"]
    if cls_loss == "mining":
        torch.testing.assert_close(two, 2 * one)
    else:
        assert (one < two).all() and (two < 2 * one).all()


@pytest.mark.parametrize("cls_loss", ["mining", "focal"])
def test_crowds_hide_background(cls_loss: str) -> None:
    model = lite(cls_loss=cls_loss, **({"min_negatives": 50} if cls_loss == "mining" else {})).eval()
    image, nothing = torch.rand(3, 100, 100), {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}
    everything = {**nothing, "crowd_boxes": torch.tensor([[-200.0, -200, 300, 300]])}
    shown, hidden = (
        model.image_losses(batch.pixels, batch.ground_truth, batch.crowds).sums["classification"].item()
        for batch in (model.prepare([image], [target]) for target in (nothing, everything))
    )
    assert shown > 0
    assert hidden == 0


def test_one_image_alone_can_be_trained() -> None:
    for model in (lite().train(), lite(cls_loss="focal").train()):
        losses = model(*random_batch((3,)))
        assert all(loss.isfinite() for loss in losses.values())


def test_images_of_any_shape_are_resized_to_the_square_of_the_network() -> None:
    model = lite().eval()
    images = [torch.rand(3, 1, 900), torch.rand(3, 300, 40)]
    boxes = torch.tensor([[0.0, 0, 20, 150]])
    target = {"boxes": boxes, "labels": torch.tensor([0])}
    batch = model.prepare(images, [target, target])
    assert batch.pixels.shape == (2, 3, 320, 320)
    assert batch.image_sizes == [(320, 320)] * 2
    torch.testing.assert_close(batch.ground_truth.boxes[1, 0], torch.tensor([0.0, 0, 160, 160]))
    detections = model.split(model.detections(batch.pixels, batch.size_tensor()), batch)
    assert detections[1].boxes[:, 2].max() <= 40 and detections[1].boxes[:, 3].max() <= 300


def test_frozen_stages() -> None:
    frozen = {
        (network, layers): sum(not p.requires_grad for p in SSD(config).parameters())
        for network, layers in (("ssdlite320", 0), ("ssdlite320", 5), ("ssdlite320", 6), ("ssdlite320", None))
        for config in [SSDConfig(class_names=CLASSES, network=network, trainable_backbone_layers=layers)]
    }
    backbone = sum(1 for _ in mobilenet_v3_large().features.parameters())
    assert frozen[("ssdlite320", 0)] == backbone
    assert 0 < frozen[("ssdlite320", 5)] < backbone
    assert frozen[("ssdlite320", 6)] == frozen[("ssdlite320", None)] == 0


def test_backbone_weights(tmp_path: Path) -> None:
    path = tmp_path / "mobilenet.pth"
    source = mobilenet_v3_large()
    torch.save(source.state_dict(), path)
    model = SSD(SSDConfig(class_names=CLASSES, network="ssdlite320", reduced_tail=False), path)
    convolutions = [m.weight for m in model.backbone.features.modules() if isinstance(m, nn.Conv2d)]
    expected = [m.weight for m in source.features.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == len(expected)
    assert all(torch.equal(one, two) for one, two in zip(convolutions, expected, strict=True))
    with pytest.raises(DataError, match=r"mobilenet.pth: weights do not fit mobilenet_v3_large"):
        SSD(SSDConfig(class_names=CLASSES, network="ssdlite320"), path)


@pytest.mark.parametrize("network", ["ssd300_mobilenet_v2", "ssdlite320_mobilenet_v2"])
def test_backbone_weights_and_levels_of_mobilenet_v2(network: str, tmp_path: Path) -> None:
    source = mobilenet_v2()
    torch.save(source.state_dict(), tmp_path / "mobilenet.pth")
    model = SSD(SSDConfig(class_names=CLASSES, network=network), tmp_path / "mobilenet.pth").eval()
    source.eval()
    pixels = torch.rand(1, 3, *model.config.fixed_size)
    with torch.no_grad():
        levels = list(model.backbone(pixels).values())
        inside = (
            [source.features[:14](pixels)] if model.config.is_lite else [source.features[:n](pixels) for n in (7, 14)]
        )
        blocks = [source.features[14]] if model.config.is_lite else [source.features[n] for n in (7, 14)]
        expected = [block.conv[0](x) for block, x in zip(blocks, inside, strict=True)] + [source.features(pixels)]
    for level, same in zip(levels, expected, strict=False):
        torch.testing.assert_close(level, same, rtol=0, atol=0)
    assert sum(not p.requires_grad for p in model.parameters()) == 0
    frozen = SSD(SSDConfig(class_names=CLASSES, network=network, trainable_backbone_layers=0))
    trained = [p for p in frozen.backbone.features.parameters() if p.requires_grad]
    assert not trained and all(p.requires_grad for p in frozen.backbone.extra.parameters())


def test_networks_with_normalisation_train_on_a_single_image() -> None:
    torch.manual_seed(0)
    model = SSD(SSDConfig(class_names=CLASSES, network="ssd300_mobilenet_v2"))
    losses = model(*random_batch((5,)))
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_backbone_weights_of_vgg16(tmp_path: Path) -> None:
    blocks = make_layers(cfgs["D"])
    # torchvision's file for SSD has a classifier of NaN.
    torch.save(
        {f"features.{k}": v for k, v in blocks.state_dict().items()} | {"classifier.0.weight": torch.ones(1)},
        tmp_path / "vgg.pth",
    )
    backbone = SSD(SSDConfig(class_names=CLASSES, network="ssd300_vgg16"), tmp_path / "vgg.pth").backbone
    pairs = [(backbone.features[0], blocks[0]), (backbone.features[21], blocks[21]), (backbone.extra[0][5], blocks[28])]
    assert all(torch.equal(one.weight, two.weight) for one, two in pairs)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"network": "ssd640"},
            "network: expected one of ssd300_vgg16, ssd512_vgg16, ssdlite320, ssd300_mobilenet_v2, "
            "ssd512_mobilenet_v2, ssdlite320_mobilenet_v2, got 'ssd640'",
        ),
        ({"cls_loss": "hinge"}, "cls_loss: expected one of mining, focal, got 'hinge'"),
        ({"trainable_backbone_layers": 6}, r"trainable_backbone_layers: expected an integer in 0\.\.5, got 6"),
        ({"cls_loss": "focal", "min_negatives": 3}, "min_negatives: does not apply to cls_loss focal"),
        ({"cls_loss": "focal", "negative_ratio": 2.0}, "negative_ratio: does not apply to cls_loss focal"),
        ({"class_names": ()}, "class_names: expected at least one name"),
        ({"class_weights": (1.0,)}, "class_weights: expected 90 numbers above 0"),
    ],
)
def test_wrong_fields_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SSDConfig(**fields)


def test_configurations_survive_json() -> None:
    config = SSDConfig(class_names=CLASSES, network="ssdlite320", cls_loss="focal", category_ids=(3, 5, 9))
    assert SSDConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ConfigError, match="fpn_levels: no such field in the configuration"):
        SSDConfig.from_dict({"fpn_levels": [3]})
    assert SSDConfig().num_scores == 91
    assert math.isclose(SSDConfig().image_std[0], 1 / 255)


def test_targets_are_checked() -> None:
    model = lite().train()
    images, targets = random_batch((2,))
    targets[0]["labels"][1] = len(CLASSES)
    with pytest.raises(ValueError, match=r"targets\[0\]\['labels'\]: expected class ids in 0\.\.2, got 3 at row 1"):
        model(images, targets)
