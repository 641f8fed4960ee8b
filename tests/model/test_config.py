"""The configuration: round trip, torchvision's defaults, `compat`, and one clear message for each wrong field."""

from __future__ import annotations

import dataclasses
import json
import math
import re

import pytest

from retinanet.model.compat import CompatConfig, merge_fields
from retinanet.model.config import ConfigError, RetinaNetConfig


def test_config_round_trip() -> None:
    config = RetinaNetConfig(
        class_names=["a", "b"],
        category_ids=[7, 3],
        fpn_levels=[3, 4],
        anchor_sizes=[[10.5], [20]],
        min_size=None,
    )
    assert config.class_names == ("a", "b") and config.anchor_sizes == ((10.5,), (20,))
    assert RetinaNetConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    default = RetinaNetConfig.from_dict(json.loads(json.dumps(RetinaNetConfig().to_dict())))
    assert default == RetinaNetConfig()
    assert default.num_classes == 91 and default.class_names[1] == "person" and default.class_names[90] == "toothbrush"
    assert default.category_ids == tuple(range(91))
    assert default.anchor_sizes[0] == (32, 40, 50) and default.anchor_sizes[4] == (512, 645, 812)


def test_a_single_value_stands_for_a_list_of_one() -> None:
    single = RetinaNetConfig.from_dict(
        {
            "class_names": "tree",
            "category_ids": 4,
            "fpn_levels": 3,
            "anchor_sizes": 16,
            "aspect_ratios": 1,
            "min_size": 64,
        }
    )
    assert single == RetinaNetConfig(
        class_names=("tree",),
        category_ids=(4,),
        fpn_levels=(3,),
        anchor_sizes=((16,),),
        aspect_ratios=(1,),
        min_size=(64,),
    )
    assert RetinaNetConfig(fpn_levels=(3, 4), anchor_sizes=[16, [32]]).anchor_sizes == ((16,), (32,))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"class_names": []}, "class_names: expected at least one name"),
        ({"class_names": ["a", "a"]}, "class_names: expected different names, got 'a' twice"),
        (
            {"class_names": ["a"], "category_ids": [1, 2]},
            "category_ids: expected 1 ids, one per class, got 2",
        ),
        ({"class_names": ["a", "b"], "category_ids": [1, 1]}, "category_ids: expected different integers"),
        ({"backbone": "vgg16"}, "backbone: expected one of resnet18, .* got 'vgg16'"),
        ({"backbone_norm": "group"}, "backbone_norm: expected one of frozen, eval, batch, sync, got 'group'"),
        (
            {"backbone_norm_eps": -1e-5},
            "compat.backbone_norm_eps: expected a number of at least 0, or none",
        ),
        (
            {"backbone": "resnet18", "stride_in_1x1": True},
            "stride_in_1x1: expected a backbone of resnet50, .* resnet18",
        ),
        ({"p7_relu": 1}, "p7_relu: expected true or false, got 1"),
        ({"head_norm_bias": "no"}, "head_norm_bias: expected true or false, got 'no'"),
        ({"anchor_profile": "keras"}, "anchor_profile: expected one of torchvision, .* got 'keras'"),
        ({"min_log_ratio": 1}, "min_log_ratio: expected a number of at most 0, or none, got 1"),
        ({"box_offset": 2}, "box_offset: expected a number in 0..1, got 2"),
        ({"label_smoothing": 1.5}, "label_smoothing: expected a number in 0..1"),
        ({"loss_normaliser": "image"}, "loss_normaliser: expected one of per_image, batch, ema"),
        ({"loss_ema_decay": 2}, "loss_ema_decay: expected a number in 0..1"),
        (
            {"trainable_backbone_layers": 6},
            r"trainable_backbone_layers: expected an integer in 0\.\.5, got 6",
        ),
        ({"fpn_levels": [3, 5]}, r"fpn_levels: expected consecutive levels"),
        ({"fpn_levels": [6, 7]}, r"fpn_levels: expected a first level in 2\.\.5"),
        ({"anchor_sizes": [[32]]}, "anchor_sizes: expected 5 entries, one per level"),
        ({"anchor_sizes": [[1], [2], [3], [4], [5, 6]]}, "anchor_sizes: expected equally many"),
        ({"anchor_sizes": [[1], [2], [3], [4], [0]]}, "anchor_sizes: expected equally many sizes above 0"),
        ({"aspect_ratios": []}, "aspect_ratios: expected one or more numbers above 0"),
        ({"box_weights": [1, 1]}, "box_weights: expected 4 numbers above 0"),
        (
            {"head_norm": "group", "head_norm_groups": 7},
            "head_norm_groups: expected a divisor of fpn_channels 256",
        ),
        ({"prior_probability": 1}, "prior_probability: expected a number"),
        ({"bg_iou_threshold": 0.6}, "bg_iou_threshold: expected at most fg_iou_threshold 0.5, got 0.6"),
        ({"score_threshold": math.nan}, "score_threshold: expected a number"),
        ({"focal_gamma": math.inf}, "focal_gamma: expected a number of at least 0, got inf"),
        ({"image_mean": [0, 0, math.inf]}, "image_mean: expected 3 numbers"),
        ({"topk": 0}, "topk: expected an integer of at least 1, got 0"),
        ({"box_loss": "l2"}, "box_loss: expected one of l1, smooth_l1"),
        ({"min_size": []}, "min_size: expected integers of at least 1, or none"),
        ({"image_std": [1, 1]}, "image_std: expected 3 numbers above 0"),
        ({"colour": 1}, "colour: no such field in the configuration"),
        ({"compat": {"colour": 1}}, "colour: no such field in the configuration's compat"),
        ({"compat": {"box_offset": 2}}, "compat.box_offset: expected a number in 0..1, got 2"),
    ],
)
def test_wrong_fields_are_named(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RetinaNetConfig.from_dict(fields)


def test_fields_must_be_an_object() -> None:
    with pytest.raises(ConfigError, match="configuration: expected an object with fields, got list"):
        RetinaNetConfig.from_dict([])
    with pytest.raises(ConfigError, match="compat: expected an object with fields, got str"):
        RetinaNetConfig.from_dict({"compat": "odtk"})


COMPAT_VALUES = {
    "stride_in_1x1": True,
    "p7_relu": False,
    "head_norm_bias": True,
    "backbone_norm_eps": 1e-3,
    "anchor_profile": "odtk",
    "box_offset": 1.0,
    "min_log_ratio": -4.0,
    "clip_after_nms": True,
    "loss_ema_decay": 0.5,
}


def test_top_level_fields_of_compat_are_read_from_older_files() -> None:
    assert COMPAT_VALUES.keys() == {field.name for field in dataclasses.fields(CompatConfig)}
    config = RetinaNetConfig.from_dict({"topk": 5, **COMPAT_VALUES})
    assert config == RetinaNetConfig(topk=5, compat=CompatConfig(**COMPAT_VALUES))
    assert config.to_dict()["compat"] == COMPAT_VALUES


@pytest.mark.parametrize("name", COMPAT_VALUES)
def test_a_field_of_compat_in_the_constructor_is_refused_with_its_place(name: str) -> None:
    value = COMPAT_VALUES[name]
    message = re.escape(f"{name}: is a field of compat; write compat=CompatConfig({name}={value!r})")
    with pytest.raises(ConfigError, match=message):
        RetinaNetConfig(**{name: value})
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(RetinaNetConfig(), **{name: value})


def test_merging_keeps_fields_of_compat_that_only_one_part_has() -> None:
    model = RetinaNetConfig(backbone="resnet50", compat=CompatConfig(anchor_profile="mmdet", p7_relu=False)).to_dict()
    merged = RetinaNetConfig.from_dict(merge_fields(model, {"topk": 7, "p7_relu": True}, {"compat": {"box_offset": 1}}))
    assert merged.topk == 7
    assert merged.compat == CompatConfig(anchor_profile="mmdet", p7_relu=True, box_offset=1)


def test_every_simple_field_has_a_rule() -> None:
    cross_checked = {
        "class_names",
        "category_ids",
        "fpn_levels",
        "anchor_sizes",
        "anchor_shapes",
        "class_weights",
        "compat",
    }
    for record, without in ((RetinaNetConfig, cross_checked), (CompatConfig, set())):
        assert {field.name for field in dataclasses.fields(record) if not field.metadata} == without
