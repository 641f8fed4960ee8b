"""The network: backbones, levels, initial weights, preprocessing, and the checks of images and targets."""

from __future__ import annotations

import math
import re

import pytest
import torch
from synthetic import random_boxes
from torch import Tensor
from torchvision.models import mobilenet_v2, resnet18

from retinanet.common.errors import DataError
from retinanet.model.config import RetinaNetConfig
from retinanet.model.network import RetinaNet
from retinanet.model.pyramid_config import BACKBONE_STAGES

CLASSES = ("cat", "dog", "bird", "fish")
SMALL = {"class_names": CLASSES, "min_size": (64,), "max_size": 100}
TINY = {**SMALL, "backbone": "resnet18", "fpn_channels": 32, "head_depth": 1, "min_size": None}


def random_batch(counts: tuple[int, ...] = (5, 0, 40)) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    sizes = [(110, 150), (120, 90), (140, 140)]
    images = [torch.rand(3, *size) for size in sizes[: len(counts)]]
    targets = [
        {"boxes": random_boxes(n, *size), "labels": torch.randint(0, len(CLASSES), (n,))}
        for n, size in zip(counts, sizes, strict=False)
    ]
    return images, targets


def test_frozen_norm_loads_batch_norm_and_has_torchvisions_names() -> None:
    batch = RetinaNet(RetinaNetConfig(**TINY, backbone_norm="batch"))
    frozen = RetinaNet(RetinaNetConfig(**TINY, backbone_norm="frozen"))
    frozen.load_state_dict(batch.state_dict())
    batch.load_state_dict(dict(frozen.state_dict()))
    names = {k for k in batch.state_dict() if not k.endswith("num_batches_tracked")}
    assert set(frozen.state_dict()) == names


@pytest.mark.parametrize("backbone", BACKBONE_STAGES)
@pytest.mark.parametrize(("levels", "source"), [((3, 4, 5, 6, 7), "c5"), ((3, 4, 5), "p5"), ((2, 3), "p5")])
def test_backbones_and_levels(backbone: str, levels: tuple[int, ...], source: str) -> None:
    config = RetinaNetConfig(
        class_names=CLASSES,
        backbone=backbone,
        fpn_levels=levels,
        fpn_channels=16,
        p6_source=source,
        head_depth=1,
        anchor_sizes=((16.0,),) * len(levels),
    )
    with torch.device("meta"):
        model = RetinaNet(config)
        outputs = model.heads(torch.empty(1, 3, 128, 192))
    shapes = [tuple(level.shape[1:]) for level in outputs.cls_logits]
    assert shapes == [(3 * len(CLASSES), -(-128 // 2**n), -(-192 // 2**n)) for n in levels]
    assert [level.shape[1] for level in outputs.box_deltas] == [12] * len(levels)


def test_grid_sizes_and_anchors_of_a_coco_image() -> None:
    model = RetinaNet(RetinaNetConfig(**{**TINY, "class_names": ("a",)}))
    with torch.device("meta"):
        outputs = RetinaNet(model.config).heads(torch.empty(1, 3, 800, 1344))
    grid = model.anchor_grid(torch.empty(1, 3, 800, 1344, device="meta"), outputs)
    assert grid.grid_sizes == ((100, 168), (50, 84), (25, 42), (13, 21), (7, 11))
    assert grid.num_anchors == 201_600
    assert grid.strides[3:] == ((61.0, 64.0), (114.0, 122.0))
    expected = [[-23, -11, 23, 11], [-28, -14, 28, 14], [-35, -18, 35, 18], [-16, -16, 16, 16]]
    assert grid.base_anchors[:4].tolist() == expected


def test_trainable_backbone_layers() -> None:
    def trained(config: RetinaNetConfig) -> set[str]:
        body = RetinaNet(config).backbone.body
        return {name.split(".")[0] for name, p in body.named_parameters() if p.requires_grad}

    assert trained(RetinaNetConfig(**{**TINY, "trainable_backbone_layers": 0})) == set()
    assert trained(RetinaNetConfig(**{**TINY, "trainable_backbone_layers": 3})) == {
        "layer2",
        "layer3",
        "layer4",
    }
    all_layers = {"conv1", "bn1", "layer1", "layer2", "layer3", "layer4"}
    for layers in (5, None):
        config = RetinaNetConfig(**{**TINY, "trainable_backbone_layers": layers, "backbone_norm": "batch"})
        assert trained(config) == all_layers
    mobile = RetinaNetConfig(**{**TINY, "backbone": "mobilenet_v2", "backbone_norm": "batch"})
    assert trained(mobile) == {str(i) for i in range(7, 19)}


def test_eval_norm_trains_only_its_affine_parameters() -> None:
    torch.manual_seed(0)
    model = RetinaNet(RetinaNetConfig(**{**TINY, "backbone_norm": "eval", "trainable_backbone_layers": None}))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert model.train().training
    images, targets = random_batch((3, 2))
    sum(model(images, targets).values()).backward()
    norms = [m for m in model.backbone.body.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert len(norms) == 20 and all(norm.weight.grad is not None for norm in norms)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_backbone_weights(tmp_path) -> None:
    torch.manual_seed(0)
    for network, name in ((resnet18(weights=None), "resnet18"), (mobilenet_v2(weights=None), "mobilenet_v2")):
        path = tmp_path / f"{name}.pth"
        config = RetinaNetConfig(**{**TINY, "backbone": name})
        source = network.features if name == "mobilenet_v2" else network
        state = source.state_dict()
        for prefix in ("", "module._orig_mod."):  # as torch.compile and data parallelism change names
            torch.save({f"{prefix}{key}": value for key, value in network.state_dict().items()}, path)
            body = RetinaNet(config, backbone_weights=path).backbone.body
            assert body.state_dict().keys() <= state.keys()
            assert all(torch.equal(value, state[key]) for key, value in body.state_dict().items())


def test_backbone_weights_errors(tmp_path) -> None:
    config = RetinaNetConfig(**TINY)
    with pytest.raises(DataError, match="missing.pth: no such file"):
        RetinaNet(config, tmp_path / "missing.pth")
    (tmp_path / "junk.pth").write_bytes(b"junk")
    with pytest.raises(DataError, match="junk.pth: not a PyTorch state dict"):
        RetinaNet(config, tmp_path / "junk.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(DataError, match="list.pth: expected a state dict of resnet18, got list"):
        RetinaNet(config, tmp_path / "list.pth")
    torch.save(mobilenet_v2(weights=None).state_dict(), tmp_path / "mobile.pth")
    with pytest.raises(DataError, match="do not fit resnet18: the file lacks conv1.weight"):
        RetinaNet(config, tmp_path / "mobile.pth")
    state = resnet18(weights=None).state_dict()
    torch.save({**state, "conv1.weight": torch.zeros(1)}, tmp_path / "shape.pth")
    with pytest.raises(DataError, match=r"shape.pth: weights do not fit resnet18: .*conv1.weight"):
        RetinaNet(config, tmp_path / "shape.pth")


def test_initial_scores_are_the_prior() -> None:
    torch.manual_seed(0)
    model = RetinaNet(RetinaNetConfig(**TINY, backbone_norm="batch", prior_probability=0.02))
    with torch.no_grad():
        logits = torch.cat([level.flatten() for level in model.heads(torch.rand(2, 3, 96, 96)).cls_logits])
    assert torch.sigmoid(logits).mean().item() == pytest.approx(0.02, rel=0.1)


def test_crowd_boxes_follow_the_resized_image() -> None:
    model = RetinaNet(RetinaNetConfig(**{**TINY, "min_size": (64,)}))
    target = {"boxes": torch.tensor([[10.0, 20, 30, 40]]), "crowd_boxes": torch.tensor([[0.0, 8, 16, 32]])}
    batch, scaled = model.transform([torch.rand(3, 32, 48)], [target])
    assert batch.image_sizes == [(64, 96)]
    assert scaled[0]["boxes"].tolist() == [[20, 40, 60, 80]]
    assert scaled[0]["crowd_boxes"].tolist() == [[0, 16, 32, 64]]
    assert target["crowd_boxes"].tolist() == [[0, 8, 16, 32]]


def test_prepare_makes_one_batch_of_images_and_targets() -> None:
    model = RetinaNet(RetinaNetConfig(**{**TINY, "min_size": (64,)}))
    images = [torch.randint(0, 256, (3, 32, 48), dtype=torch.uint8), torch.randint(0, 256, (3, 64, 64)).to(torch.uint8)]
    crowd = torch.tensor([[0.0, 8, 16, 32]])
    targets = [
        {"boxes": torch.tensor([[10.0, 20, 30, 40]]), "labels": torch.tensor([2]), "crowd_boxes": crowd, "image_id": 7},
        {"boxes": torch.empty(0, 4), "labels": torch.empty(0, dtype=torch.int64)},
    ]
    batch = model.prepare(images, targets, torch.device("cpu"))
    assert batch.image_sizes == [(64, 96), (64, 64)] and batch.original_sizes == [(32, 48), (64, 64)]
    assert batch.size_tensor().tolist() == [[64, 96], [64, 64]]
    assert batch.ground_truth.boxes.tolist() == [[[20, 40, 60, 80]], [[0, 0, 0, 0]]]
    assert batch.ground_truth.labels.tolist() == [[2], [-1]] and batch.ground_truth.count.tolist() == [1, 0]
    assert batch.crowds.boxes[0].tolist() == [[0, 16, 32, 64]] and batch.crowds.count.tolist() == [1, 0]
    as_floats = model.prepare([image / 255 for image in images], targets[1:] * 2)
    assert torch.equal(batch.pixels, as_floats.pixels) and as_floats.crowds is None
    assert model.prepare(images).ground_truth is None
    with pytest.raises(TypeError, match="images: expected uint8, or floating point in 0..1, got torch.int64"):
        model.prepare([image.long() for image in images])


def test_images_keep_their_size_without_min_size() -> None:
    model = RetinaNet(RetinaNetConfig(**TINY))
    batch, _ = model.transform([torch.rand(3, 50, 70), torch.rand(3, 33, 20)])
    assert batch.image_sizes == [(50, 70), (33, 20)]
    assert batch.tensors.shape == (2, 3, 64, 96)


def test_half_precision_keeps_anchors_in_float32() -> None:
    model = RetinaNet(RetinaNetConfig(**TINY)).to(torch.bfloat16)
    assert model.base_anchors.dtype == torch.float32
    assert torch.equal(model.base_anchors, RetinaNet(model.config).base_anchors)
    assert "base_anchors" not in model.state_dict()
    detections = model.eval()([torch.rand(3, 64, 64, dtype=torch.bfloat16)])
    assert detections[0]["boxes"].dtype == torch.float32


BOX = torch.tensor([[1.0, 2, 30, 40]])
LABEL = torch.tensor([0])


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (None, r"targets: expected one dict per image in training mode, got None"),
        ([], r"targets: expected one dict for each of the 1 images, got 0"),
        ([(BOX, LABEL)], r"targets\[0\]: expected a dict, got tuple"),
        ([{"labels": LABEL}], r"targets\[0\]: expected a tensor 'boxes', got NoneType"),
        ([{"boxes": BOX}], r"targets\[0\]: expected a tensor 'labels', got NoneType"),
        (
            [{"boxes": BOX[0], "labels": LABEL}],
            r"targets\[0\]\['boxes'\]: expected floating-point boxes of shape \[M, 4\]",
        ),
        ([{"boxes": BOX.long(), "labels": LABEL}], r"expected floating-point boxes .* got torch.int64"),
        (
            [{"boxes": BOX, "labels": LABEL.float()}],
            r"targets\[0\]\['labels'\]: expected integers of shape \[1\]",
        ),
        (
            [{"boxes": BOX, "labels": torch.tensor([0, 1])}],
            r"expected integers of shape \[1\], got torch.int64 of shape \[2\]",
        ),
        ([{"boxes": BOX, "labels": torch.tensor([4])}], r"expected class ids in 0..3, got 4 at row 0"),
        ([{"boxes": BOX, "labels": torch.tensor([-1])}], r"expected class ids in 0..3, got -1 at row 0"),
        (
            [{"boxes": BOX[:, [2, 1, 0, 3]], "labels": LABEL}],
            r"expected x1 < x2 .* got \[30.0, 2.0, 1.0, 40.0\] at row 0",
        ),
        ([{"boxes": BOX * math.nan, "labels": LABEL}], r"expected x1 < x2 and y1 < y2, finite"),
        ([{"boxes": BOX * math.inf, "labels": LABEL}], r"expected x1 < x2 and y1 < y2, finite"),
        (
            [{"boxes": BOX, "labels": LABEL, "crowd_boxes": BOX * 0}],
            r"targets\[0\]\['crowd_boxes'\]: expected x1 < x2",
        ),
    ],
)
def test_wrong_targets_are_named(targets: list[dict[str, Tensor]] | None, message: str) -> None:
    model = RetinaNet(RetinaNetConfig(**TINY))
    with pytest.raises(ValueError, match=message):
        model([torch.rand(3, 64, 64)], targets)


def test_wrong_images_are_named() -> None:
    model = RetinaNet(RetinaNetConfig(**TINY)).eval()
    with pytest.raises(ValueError, match="images: expected at least one image"):
        model([])
    with pytest.raises(
        ValueError, match=r"images\[1\]: expected shape \[3, H, W\] with pixels in it, got \[1, 64, 64\]"
    ):
        model([torch.rand(3, 64, 64), torch.rand(1, 64, 64)])
    with pytest.raises(TypeError, match="floating"):
        model([torch.zeros(3, 64, 64, dtype=torch.uint8)])
    with pytest.raises(TypeError, match=r"images\[0\]: expected a tensor, got list"):
        model([[0.0]])
    model = RetinaNet(RetinaNetConfig(**{**TINY, "min_size": (64,), "max_size": 100})).eval()
    limit = model.config.max_size
    too_long = (
        f"images[1]: too elongated: resizing 1 x {limit + 1} pixels to max_size {limit} leaves less than one pixel"
    )
    with pytest.raises(ValueError, match=re.escape(too_long)):
        model([torch.rand(3, 64, 64), torch.rand(3, 1, limit + 1)])
    assert len(model([torch.rand(3, 1, limit)])) == 1


def test_one_tensor_of_images_and_int32_labels() -> None:
    torch.manual_seed(0)
    model = RetinaNet(RetinaNetConfig(**TINY))
    images, targets = torch.rand(2, 3, 64, 64), [{"boxes": BOX, "labels": LABEL}] * 2
    expected = model(list(images), targets)
    got = model(images, [{**t, "labels": t["labels"].int()} for t in targets])
    assert all(torch.equal(got[name], value) for name, value in expected.items())
    scores = [image["scores"] for image in model.eval()(images)]
    assert all(map(torch.equal, scores, (image["scores"] for image in model(list(images)))))
