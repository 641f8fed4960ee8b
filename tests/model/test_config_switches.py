"""Fields of the configuration that change the network, its anchors or its boxes."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from synthetic import tiny_config
from torch import Tensor, nn
from torchvision.models import resnet50
from torchvision.models.detection import RetinaNet as TorchvisionRetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import mobilenet_backbone
from torchvision.ops import FrozenBatchNorm2d

import retinanet_ops as ops
from retinanet.model.anchors import anchor_grid, base_anchors
from retinanet.model.backbone import TopLevels, build_backbone
from retinanet.model.config import CompatConfig, RetinaNetConfig
from retinanet.model.network import RetinaNet
from retinanet_ops.constants import ANCHOR_PROFILES, ANCHOR_SIZES

IMAGES = [torch.rand(3, 64, 96), torch.rand(3, 64, 64)]
TARGETS = [
    {"boxes": torch.tensor([[10.0, 12, 40, 44]]), "labels": torch.tensor([1])},
    {"boxes": torch.empty(0, 4), "labels": torch.empty(0, dtype=torch.int64)},
]


class Pyramid(nn.Module):
    """A custom backbone with maps of strides 8 and 16."""

    def __init__(self, out_channels: int) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.first = nn.Conv2d(3, out_channels, 9, 8, 4)
        self.second = nn.Conv2d(out_channels, out_channels, 3, 2, 1)

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        fine = self.first(x).relu()
        return OrderedDict(a=fine, b=self.second(fine))


class TestBackbones:
    def test_custom_backbone_trains_and_detects(self) -> None:
        config = tiny_config(backbone="custom", fpn_channels=32)
        model = RetinaNet(config, backbone=Pyramid(32))
        losses = model(IMAGES, TARGETS)
        sum(losses.values()).backward()
        assert all(p.grad is not None for p in model.backbone.parameters())
        assert len(model.eval()(IMAGES)) == 2
        assert {name.split(".")[0] for name in model.state_dict()} == {"backbone", "head"}

    def test_custom_backbone_of_one_level_has_torchvisions_losses(self) -> None:
        torch.manual_seed(0)
        backbone = mobilenet_backbone(
            backbone_name="mobilenet_v3_small", fpn=False, weights=None, norm_layer=FrozenBatchNorm2d
        )
        anchors = AnchorGenerator(((16, 32),), ((0.5, 1.0, 2.0),))
        theirs = TorchvisionRetinaNet(backbone, 2, anchor_generator=anchors, min_size=64, max_size=96)
        config = tiny_config(
            backbone="custom",
            fpn_levels=(5,),
            fpn_channels=backbone.out_channels,
            anchor_sizes=((16.0, 32.0),),
            aspect_ratios=(0.5, 1.0, 2.0),
            head_depth=4,
            head_norm="none",
            min_size=(64,),
            max_size=96,
        )
        ours = RetinaNet(config, backbone=backbone)
        ours.load_state_dict(theirs.state_dict())
        expected, got = theirs.train()(IMAGES, TARGETS), ours.train()(IMAGES, TARGETS)
        for name in expected:
            torch.testing.assert_close(got[name], expected[name], rtol=1e-5, atol=0)

    def test_errors_of_custom_backbones(self) -> None:
        with pytest.raises(ValueError, match="expected a module if and only if .* got NoneType with 'custom'"):
            RetinaNet(tiny_config(backbone="custom"))
        with pytest.raises(ValueError, match="expected a module if and only if .* got Pyramid with 'resnet18'"):
            RetinaNet(tiny_config(), backbone=Pyramid(32))
        with pytest.raises(ValueError, match="fpn_channels 32, got 16"):
            RetinaNet(tiny_config(backbone="custom"), backbone=Pyramid(16))
        with pytest.raises(ValueError, match="fpn_channels 32, got no such attribute"):
            RetinaNet(tiny_config(backbone="custom"), backbone=nn.Identity())
        three = {"fpn_levels": (3, 4, 5), "anchor_sizes": ((8.0,), (16.0,), (32.0,))}
        model = RetinaNet(tiny_config(backbone="custom", **three), backbone=Pyramid(32))
        with pytest.raises(ValueError, match=r"backbone: expected a map for each .* fpn_levels \(3, 4, 5\), got 2"):
            model(IMAGES, TARGETS)

    @pytest.mark.parametrize(
        ("backbone", "frozen"),
        [
            ("mobilenet_v2", range(7)),
            ("mobilenet_v3_large", range(7)),
            ("mobilenet_v3_small", range(4)),
        ],
    )
    def test_frozen_stages_of_mobilenets(self, backbone: str, frozen: range) -> None:
        with torch.device("meta"):
            body = RetinaNet(tiny_config(backbone=backbone, trainable_backbone_layers=3)).body
        trained = {int(name.split(".")[0]) for name, p in body.named_parameters() if p.requires_grad}
        assert trained and trained.isdisjoint(frozen) and frozen.stop in trained

    def test_norm_layers_and_their_epsilon(self) -> None:
        with torch.device("meta"):
            bodies = {
                norm: RetinaNet(tiny_config(backbone_norm=norm, compat={"backbone_norm_eps": 0.25})).body
                for norm in ("frozen", "eval", "batch", "sync")
            }
        for norm, kind in (("frozen", FrozenBatchNorm2d), ("eval", nn.BatchNorm2d), ("sync", nn.SyncBatchNorm)):
            assert type(bodies[norm].bn1) is kind and bodies[norm].bn1.eps == 0.25
        for backbone, eps in (("resnet18", 1e-5), ("mobilenet_v2", 1e-5), ("mobilenet_v3_small", 1e-3)):
            with torch.device("meta"):
                modules = RetinaNet(tiny_config(backbone=backbone)).body.modules()
            assert {m.eps for m in modules if isinstance(m, nn.BatchNorm2d)} == {eps}

    def test_synchronised_norm_in_one_process_is_batch_norm(self) -> None:
        models = [RetinaNet(tiny_config(backbone_norm=norm)) for norm in ("batch", "sync")]
        models[1].load_state_dict(models[0].state_dict())
        expected, got = (model(IMAGES, TARGETS) for model in models)
        for name in expected:
            torch.testing.assert_close(got[name], expected[name])

    def test_stride_in_1x1_moves_the_stride_to_the_first_convolution(self) -> None:
        torch.manual_seed(0)
        fields = {"backbone": "resnet50", "fpn_levels": (2, 3, 4, 5), "anchor_sizes": ((8.0,),) * 4}
        ours = build_backbone(tiny_config(**fields, compat={"stride_in_1x1": True}, backbone_norm="eval")).eval()
        theirs = resnet50(weights=None).eval()
        theirs.load_state_dict(ours.body.state_dict(), strict=False)
        x = torch.rand(1, 3, 64, 96)
        with torch.no_grad():
            maps = ours.body(x)
            x = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(x))))
            for i, layer in enumerate((theirs.layer1, theirs.layer2, theirs.layer3, theirs.layer4)):
                # A 1x1 convolution with stride 2 reads every other pixel. The rest of the block works on its result.
                block = layer[0]
                y = block.relu(block.bn1(block.conv1(x if i == 0 else x[:, :, ::2, ::2])))
                block.conv2.stride = (1, 1)
                y = block.bn3(block.conv3(block.relu(block.bn2(block.conv2(y)))))
                x = layer[1:](block.relu(y + block.downsample(x)))
                torch.testing.assert_close(maps[str(i)], x, rtol=1e-3, atol=1e-3)


class TestPyramid:
    @pytest.mark.parametrize("relu", (True, False))
    def test_p7_is_computed_from_p6_with_or_without_relu(self, relu: bool) -> None:
        torch.manual_seed(0)
        top = TopLevels(8, 4, 7, "p5", relu)
        (p5, p6, p7), names = top([torch.randn(1, 4, 8, 8)], [], ["0"])
        assert names == ["0", "p6", "p7"] and (p6 < 0).any()
        assert torch.equal(p6, top.p6(p5)) and torch.equal(p7, top.p7(p6.relu() if relu else p6))

    def test_p7_relu_of_the_configuration_reaches_the_pyramid(self) -> None:
        fields = {"fpn_levels": (5, 6, 7), "anchor_sizes": ((32.0,),) * 3}
        with torch.device("meta"):
            assert not RetinaNet(tiny_config(**fields, compat={"p7_relu": False})).backbone.fpn.extra_blocks.relu
            assert RetinaNet(tiny_config(**fields)).backbone.fpn.extra_blocks.relu


class TestAnchors:
    SIZES = (100, 168), (50, 84), (25, 42), (13, 21), (7, 11)
    IMAGE = (800, 1344)

    def boxes(self, profile: str) -> Tensor:
        config = RetinaNetConfig(
            compat=CompatConfig(anchor_profile=profile),
            anchor_sizes=tuple(tuple(float(4 * 2**n * 2 ** (i / 3)) for i in range(3)) for n in range(3, 8)),
        )
        return anchor_grid(config, base_anchors(config), self.IMAGE, self.SIZES).boxes()

    def test_profiles_are_the_anchor_grids_of_the_projects(self) -> None:
        by_size = {
            "detectron2": ops.AnchorGrid.detectron2(self.SIZES),
            "odtk": ops.AnchorGrid.odtk(self.SIZES, aspect_ratios=(0.5, 1.0, 2.0)),
        }
        for profile, grid in by_size.items():
            slots = grid.boxes().reshape(-1, 3, 3, 4).transpose(1, 2).reshape(-1, 4)
            torch.testing.assert_close(self.boxes(profile), slots, rtol=1e-6, atol=1e-5)
        assert torch.equal(self.boxes("mmdet"), ops.AnchorGrid.mmdet(self.SIZES).boxes())
        assert torch.equal(self.boxes("yhenon"), ops.AnchorGrid.mmdet(self.SIZES, centre_offset=0.5).boxes())
        rounded = ops.AnchorGrid.torchvision(self.SIZES, self.IMAGE, ANCHOR_SIZES)
        assert torch.equal(self.boxes("torchvision"), rounded.boxes())

    def test_order_of_slots_is_the_same_in_every_profile(self) -> None:
        expected = self.boxes("mmdet").reshape(-1, 9, 4)[0]
        for profile in ANCHOR_PROFILES:
            cell = self.boxes(profile).reshape(-1, 9, 4)[0]
            centred = cell - (cell[:, :2] + cell[:, 2:]).repeat(1, 2) / 2
            torch.testing.assert_close(centred, expected, rtol=0, atol=0.51 if profile == "torchvision" else 1e-4)


class TestBoxes:
    def detections(self, **fields: object) -> ops.Detections:
        torch.manual_seed(0)
        model = RetinaNet(tiny_config(head_depth=0, score_threshold=0.0, topk=50, **fields)).eval()
        with torch.no_grad():
            model.head.regression_head.bbox_reg.weight.normal_(std=0.1)
            return model.detections(torch.rand(1, 3, 64, 96), torch.tensor([[40, 60]]))

    def test_clip_after_nms_changes_which_boxes_nms_keeps(self) -> None:
        # These boxes reach beyond the image, and their IoU is lower than that of their parts inside the image.
        before, after = self.detections(), self.detections(compat={"clip_after_nms": True})
        assert before.boxes.amax((0, 1)).tolist() == after.boxes.amax((0, 1)).tolist() == [60, 40, 60, 40]
        assert before.anchor_index.tolist() != after.anchor_index.tolist()
        kept_by_both = set(before.anchor_index[0].tolist()) & set(after.anchor_index[0].tolist()) - {-1}
        for anchor in kept_by_both:
            a, b = (detections.boxes[detections.anchor_index == anchor][0] for detections in (before, after))
            assert torch.equal(a, b)

    def test_bounds_and_offset_reach_the_decoder(self) -> None:
        plain = self.detections(nms_threshold=1.0)
        width = plain.boxes[..., 2] - plain.boxes[..., 0]
        for fields in (
            {"compat": {"min_log_ratio": -1e-3}},
            {"max_log_ratio": 1e-3},
            {"compat": {"box_offset": 1.0}},
        ):
            other = self.detections(nms_threshold=1.0, **fields)
            assert torch.equal(other.anchor_index, plain.anchor_index)
            change = (other.boxes[..., 2] - other.boxes[..., 0]) - width
            assert (change > 0).any() if "min_log_ratio" in fields.get("compat", ()) else (change < 0).any()

    def test_offset_lengthens_the_anchors(self) -> None:
        plain, legacy = (base_anchors(tiny_config(compat={"box_offset": offset})) for offset in (0.0, 1.0))
        assert torch.equal(legacy, plain + torch.tensor([0.0, 0, 1, 1]))

    def test_offset_reaches_the_loss(self) -> None:
        torch.manual_seed(0)
        models = [RetinaNet(tiny_config(compat={"box_offset": offset})).eval() for offset in (0.0, 1.0)]
        models[1].load_state_dict(models[0].state_dict())
        for model in models:
            model.training = True
        plain, legacy = (model(IMAGES, TARGETS) for model in models)
        assert plain["bbox_regression"] != legacy["bbox_regression"]


def test_moving_average_of_the_normaliser_is_saved() -> None:
    torch.manual_seed(0)
    model = RetinaNet(tiny_config(loss_normaliser="ema"))
    model(IMAGES, TARGETS)
    assert model.state_dict()["normaliser.average"] >= 1
    again = RetinaNet(model.config)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.normaliser.average, model.normaliser.average)
