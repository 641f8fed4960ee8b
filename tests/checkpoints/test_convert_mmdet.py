"""MMDetection's layout: converted models give the detections of its computation, stated in plain PyTorch."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import convert_cases as cases
import pytest
import torch
from convert_cases import BOUND, CHANNELS, DEPTH, Heads, Original, State, random_state
from torch import Tensor

from retinanet.checkpoints.convert import convert_checkpoint
from retinanet.common.errors import DataError
from retinanet.model.config import RetinaNetConfig

CLASSES = 3
# mmdet drops boxes without area before it applies the limit, and the converted model keeps them. With this high limit
# both give the same detections.
LIMIT = 1000
FIELDS = {"min_size": None, "max_detections": LIMIT}
SLOTS = list(range(9))
NAMES = cases.torchvision_names("backbone.")
LATERAL, SMOOTH = ([f"neck.{kind}_convs.{i}.conv" for i in range(3)] for kind in ("lateral", "fpn"))
P6, P7 = "neck.fpn_convs.3.conv", "neck.fpn_convs.4.conv"
INPUT = {  # Order of the channels; mean and standard deviation for pixels in 0..255.
    "pytorch": (slice(None), (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
    "caffe": ([2, 1, 0], (103.53, 116.28, 123.675), (1.0, 1.0, 1.0)),
}


def shapes(depth: int, classes: int = CLASSES) -> dict[str, list[int]]:
    layers = cases.pyramid_shapes(depth, LATERAL, SMOOTH, P6, P7)
    for head in ("cls", "reg"):
        layers |= {f"bbox_head.{head}_convs.{i}.conv": (CHANNELS, CHANNELS, 3) for i in range(DEPTH)}
    layers |= {"bbox_head.retina_cls": (9 * classes, CHANNELS, 3), "bbox_head.retina_reg": (36, CHANNELS, 3)}
    return cases.resnet_shapes(NAMES, depth, counters=True) | cases.conv_shapes(layers)


def batch_of(image: Tensor, style: str) -> Tensor:
    order, mean, std = INPUT[style]
    return cases.normalised(image[order] * 255, 32, mean, std)


def heads(state: State, depth: int, style: str, batch: Tensor) -> Heads:
    maps = cases.resnet(state, NAMES, depth, batch, stride_in_1x1=style == "caffe")
    levels = cases.pyramid(state, maps, LATERAL, SMOOTH, P6, P7, relu=False)
    hidden = {kind: [f"bbox_head.{kind}_convs.{i}.conv" for i in range(DEPTH)] for kind in ("cls", "reg")}
    return Heads(*(cases.tower(state, levels, hidden[kind], f"bbox_head.retina_{kind}") for kind in hidden))


def base_anchors() -> list[Tensor]:
    """Return three scales of each of three ratios."""
    return cases.base_anchors(
        [
            [
                (stride * 4 * 2 ** (octave / 3) / ratio**0.5, stride * 4 * 2 ** (octave / 3) * ratio**0.5)
                for ratio in (0.5, 1.0, 2.0)
                for octave in range(3)
            ]
            for stride in (8, 16, 32, 64, 128)
        ]
    )


def original(state: State, depth: int, style: str, image: Tensor) -> Original:
    """Return the results of mmdet; boxes are clipped, and those without area dropped, before NMS."""
    outputs = heads(cases.doubled(state), depth, style, batch_of(image, style))
    anchors = cases.grid(base_anchors(), outputs.logits, 0.0)
    boxes = cases.clip(cases.decode(anchors, cases.rows(outputs.deltas, 4), -BOUND, BOUND), image)
    kept = cases.with_area(cases.candidates(boxes, outputs.logits, CLASSES, 1000))
    return Original(outputs, boxes, tuple(image.shape[-2:]), cases.suppressed(kept, LIMIT))


def random_checkpoint(depth: int, style: str, image: Tensor, classes: int = CLASSES) -> State:
    state = random_state(shapes(depth, classes))
    state["backbone.conv1.weight"] /= 58 / INPUT[style][2][0]
    outputs = heads(state, depth, style, batch_of(image, style))
    cases.spread(state, "bbox_head.retina_cls", "bbox_head.retina_reg", outputs)
    return state


@pytest.mark.parametrize(("depth", "style"), [(18, "pytorch"), (50, "caffe")])
def test_converted_models_give_the_same_detections(tmp_path: Path, depth: int, style: str) -> None:
    torch.manual_seed(depth)
    image = torch.rand(3, 90, 70, dtype=torch.float64)
    state = random_checkpoint(depth, style, image.float())
    # Log ratios of two slots exceed the bound in both directions.
    state["bbox_head.retina_reg.bias"][[2, 3, 6, 7]] = torch.tensor([-6.0, 6.0, 6.0, -6.0])
    torch.save({"state_dict": state, "meta": {"CLASSES": ("ant", "bee", "cat")}}, tmp_path / "model.pth")
    model, report = convert_checkpoint(tmp_path / "model.pth", "mmdet", style=style, fields=FIELDS)
    counters = {name for name in state if name.endswith("num_batches_tracked")}
    # A model with frozen statistics has no counters.
    assert set(report.unused) == (counters if style == "caffe" else set())
    assert set(report.mapped) | set(report.unused) == set(state)
    assert report.config.class_names == ("ant", "bee", "cat")

    expected = original(state, depth, style, image)
    log_ratios = cases.rows(expected.heads.deltas, 4)[:, 2:]
    assert (log_ratios < -BOUND).any() and (log_ratios > BOUND).any()
    cases.assert_converted(model, image, expected, SLOTS, least=60, area=True)


def config_of(path: Path, meta: dict[str, Any], state: State, **options: Any) -> tuple[RetinaNetConfig, str]:
    """Write and convert a checkpoint, and return the configuration and the notes."""
    torch.save({"meta": meta, "state_dict": state}, path)
    report = convert_checkpoint(path, "mmdet", **options)[1]
    return report.config, " ".join(report.notes)


def test_style_and_classes_are_those_of_the_file(tmp_path: Path) -> None:
    path, state = tmp_path / "model.pth", random_state(shapes(18))
    state["ema_backbone_conv1_weight"] = torch.zeros(64, 3, 7, 7)
    text = "model = dict(\n    backbone=dict(type='ResNet', style='caffe'))"
    config, notes = config_of(path, {"cfg": text, "dataset_meta": {"classes": ["a", "b", "c"]}}, state)
    assert config.image_std == pytest.approx((1 / 255,) * 3) and config.backbone_norm == "frozen"
    assert "caffe style, as the configuration in the file" in notes
    assert config.class_names == ("a", "b", "c") and config.category_ids == (0, 1, 2)
    config, notes = config_of(path, {"config": text.replace("caffe", "pytorch")}, state)
    assert config == config_of(path, {"cfg": text}, state, style="pytorch")[0]
    assert config.image_std == RetinaNetConfig().image_std and config.backbone_norm == "eval"
    config, notes = config_of(path, {"CLASSES": "not three"}, state, class_names=["x", "y", "z"])
    assert config.class_names == ("x", "y", "z") and "assuming pytorch style" in notes


CONFIGURATION = """
model = dict(
    type='RetinaNet',
    data_preprocessor=dict(mean=[100.0, 110.0, 120.0], std=[51.0, 1.0, 25.5], bgr_to_rgb={rgb}),
    backbone=dict(type='ResNet', style='{style}', init_cfg=dict(type='Pretrained')),
    neck=dict(type='FPN', add_extra_convs='on_input', relu_before_extra_convs=True, num_outs=5),
    bbox_head=dict(
        type='RetinaHead',
        anchor_generator=dict(
            type='AnchorGenerator', octave_base_scale=8, scales_per_octave=1,
            ratios=[0.25, 0.5, 1.0, 2.0, 4.0, 5, 6, 7, 8],
            strides=[8, 16, 32, 64, 128]),
        bbox_coder=dict(type='DeltaXYWHBBoxCoder', target_means=[0.0, 0.0, 0.0, 0.0], target_stds=[0.1, 0.1, 0.2, 0.2]),
        loss_cls=dict(type='FocalLoss', use_sigmoid=True, gamma=1.5, alpha=0.5),
        loss_bbox=dict(type='SmoothL1Loss', beta=0.11)),
    train_cfg=dict(assigner=dict(type='MaxIoUAssigner', pos_iou_thr=0.6, neg_iou_thr=0.3)),
    test_cfg=dict(nms_pre=500, score_thr=0.1, nms=dict(type='nms', iou_threshold=0.6), max_per_img=50))
optimizer = dict(type='SGD', lr=1e-3)
hook = make_hook(3)
"""


def test_configuration_in_the_file(tmp_path: Path) -> None:
    path, state = tmp_path / "model.pth", random_state(shapes(18))
    text = CONFIGURATION.format(style="pytorch", rgb=True)
    config, notes = config_of(path, {"cfg": text}, state)
    assert config.compat.p7_relu and config.box_weights == (10, 10, 5, 5)
    assert config.anchor_sizes == ((64,), (128,), (256,), (512,), (1024,)) and len(config.aspect_ratios) == 9
    assert (config.fg_iou_threshold, config.bg_iou_threshold) == (0.6, 0.3)
    assert (config.focal_gamma, config.focal_alpha, config.box_loss, config.smooth_l1_beta) == (
        1.5,
        0.5,
        "smooth_l1",
        0.11,
    )
    assert (config.topk, config.score_threshold, config.nms_threshold, config.max_detections) == (500, 0.1, 0.6, 50)
    assert config.image_mean == pytest.approx((100 / 255, 110 / 255, 120 / 255))
    assert config.image_std == pytest.approx((0.2, 1 / 255, 0.1))
    assert config_of(path, {"cfg": text}, state, fields={"topk": 7})[0].topk == 7
    config, notes = config_of(path, {"cfg": text.replace("SmoothL1Loss", "IoULoss")}, state)
    assert config.box_loss == "l1" and "IoULoss of the configuration in the file is not supported" in notes
    # The same channels in reverse order; the input channels of the first convolution are reversed with them.
    config, notes = config_of(path, {"cfg": CONFIGURATION.format(style="caffe", rgb=False)}, state)
    assert config.image_mean == pytest.approx((120 / 255, 110 / 255, 100 / 255)) and "caffe style" in notes
    # Version 2 states the normalisation, and early versions also the thresholds, beside the model.
    text = "model = dict(neck=dict())\nimg_norm_cfg = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375])"
    config, notes = config_of(path, {"cfg": f"{text}\ntest_cfg = dict(score_thr=0.2)"}, state)
    assert config.image_mean == RetinaNetConfig().image_mean and config.score_threshold == 0.2
    assert "assuming pytorch style" in notes
    for nothing in ("not Python (", "optimizer = dict(type='SGD')", "model = 3"):
        assert "configuration in the file cannot be read" in config_of(path, {"cfg": nothing}, state)[1]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("'pytorch'", "'tensorflow'", "backbone.style: expected pytorch or caffe, got 'tensorflow'"),
        ("type='ResNet'", "type='Res2Net'", "backbone.type: expected 'ResNet', got 'Res2Net'"),
        ("'on_input'", "'on_output'", "neck.add_extra_convs: expected True or 'on_input', got 'on_output'"),
        (
            "'AnchorGenerator'",
            "'YOLOAnchorGenerator'",
            "anchor_generator.type: expected 'AnchorGenerator', got",
        ),
        ("32, 64, 128]", "32, 64, 100]", r"anchor_generator.strides: expected \[8, .* got \[8, 16, 32, 64, 100\]"),
        (
            "scales_per_octave=1",
            "scales_per_octave=0",
            r"octave_base_scale: expected a base scale above 0 .* got \[8, 0\]",
        ),
        ("scales_per_octave=1", "scales=['a']", r"anchor_generator.scales: expected numbers, got \['a'\]"),
        ("target_means=[0.0", "target_means=[0.5", r"target_means: expected \[0, 0, 0, 0\], got \[0.5"),
        ("target_stds=[0.1", "target_stds=[0.0", "target_stds: expected 4 numbers above 0, got"),
        ("dict(type='SmoothL1Loss', beta=0.11)", "3", "bbox_head.loss_bbox: expected a dict, got 3"),
        ("type='nms'", "type='soft_nms'", "test_cfg.nms.type: expected 'nms', got 'soft_nms'"),
        ("bgr_to_rgb=True", "bgr_to_rgb=False", "bgr_to_rgb: expected True for the pytorch style, got False"),
        ("std=[51.0", "std=[0.0", "data_preprocessor: expected 3 numbers as mean and 3 numbers above 0 as std"),
        ("nms_pre=500", "nms_pre=-1", "topk: expected an integer of at least 1, got -1"),
    ],
)
def test_configurations_that_are_not_supported(tmp_path: Path, old: str, new: str, message: str) -> None:
    text = CONFIGURATION.format(style="pytorch", rgb=True)
    assert text.count(old) == 1
    with pytest.raises(DataError, match=f"model.pth: .*{message}"):
        config_of(tmp_path / "model.pth", {"cfg": text.replace(old, new)}, random_state(shapes(18)))


def test_version_in_the_file(tmp_path: Path) -> None:
    path, state = tmp_path / "model.pth", random_state(shapes(18))
    assert "assuming mmdet 2 or 3: the file does not state a version" in config_of(path, {}, state)[1]
    for version in ("2.28.2", "3.3.0"):
        assert "assuming mmdet" not in config_of(path, {"mmdet_version": version}, state)[1]
    with pytest.raises(DataError, match=r"model.pth: meta: expected mmdet_version 2 or 3, got 1\.2\.0\+abc, whose"):
        config_of(path, {"mmdet_version": "1.2.0+abc"}, state)


def test_training_log_beside_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = type("HistoryBuffer", (), {"__module__": "mmengine.logging.history_buffer"})
    for name in ("mmengine", "mmengine.logging", buffer.__module__):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setattr(sys.modules[buffer.__module__], "HistoryBuffer", buffer, raising=False)
    torch.save({"state_dict": {}, "message_hub": {"loss": buffer()}}, tmp_path / "model.pth")
    with pytest.raises(DataError, match=r"HistoryBuffer, .* save the checkpoint's 'meta' and 'state_dict' to a new"):
        convert_checkpoint(tmp_path / "model.pth", "mmdet")


def test_p6_from_p5_is_an_error(tmp_path: Path) -> None:
    """The shape of P6 does not tell which map it is from: `add_extra_convs='on_output'` or `'on_lateral'`."""
    state = random_state(shapes(18))
    state["neck.fpn_convs.3.conv.weight"] = torch.zeros(CHANNELS, CHANNELS, 3, 3)
    torch.save({"state_dict": state}, tmp_path / "model.pth")
    with pytest.raises(Exception, match=r"neck.fpn_convs.3.conv.weight: expected shape \[32, 512, 3, 3\], got"):
        convert_checkpoint(tmp_path / "model.pth", "mmdet")
