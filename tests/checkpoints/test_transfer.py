"""Transfer of weights to a model of other classes: what is copied, what is skipped, and what the report says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cli_cases import data, make_data, one_error, run, train_arguments  # noqa: F401  fixtures
from synthetic import tiny_config

from retinanet import RetinaNet, load_model, save_model
from retinanet.checkpoints import model_file
from retinanet.checkpoints.model_file import CheckpointError
from retinanet.checkpoints.transfer import transfer_weights

CLS = "head.classification_head.cls_logits"


def saved(tmp_path: Path, seed: int = 0, **fields: object) -> tuple[Path, RetinaNet]:
    torch.manual_seed(seed)
    model = RetinaNet(tiny_config(**fields))
    save_model(tmp_path / "start.safetensors", model)
    return tmp_path / "start.safetensors", model


def test_rows_of_classes_of_the_same_name(tmp_path: Path) -> None:
    path, source = saved(tmp_path, class_names=("car", "dog", "cat"), category_ids=())
    torch.manual_seed(1)
    target = RetinaNet(tiny_config(class_names=("cat", "bird", "dog", "tree"), category_ids=()))
    fresh = {name: value.clone() for name, value in target.state_dict().items()}
    report = transfer_weights(path, target)
    slots = target.config.anchors_per_cell
    for part in ("weight", "bias"):
        ours, before = (state[f"{CLS}.{part}"].unflatten(0, (slots, 4)) for state in (target.state_dict(), fresh))
        theirs = source.state_dict()[f"{CLS}.{part}"].unflatten(0, (slots, 3))
        assert torch.equal(ours[:, 0], theirs[:, 2]) and torch.equal(ours[:, 2], theirs[:, 1])
        assert torch.equal(ours[:, (1, 3)], before[:, (1, 3)])
    for name, value in target.state_dict().items():
        assert name.startswith(CLS) or torch.equal(value, source.state_dict()[name])
    assert report.adapted == dict.fromkeys((f"{CLS}.weight", f"{CLS}.bias"), "copied 2 of 4 classes: cat, dog")
    assert len(report.loaded) == len(fresh) - 2 and not report.skipped and not report.unused
    assert str(report).splitlines() == [
        f"{len(fresh) - 2} tensors loaded",
        f"adapted: {CLS}.weight, {CLS}.bias: copied 2 of 4 classes: cat, dog",
    ]


def test_the_same_classes_are_loaded_whole(tmp_path: Path) -> None:
    path, source = saved(tmp_path)
    target = RetinaNet(source.config)
    assert str(transfer_weights(path, target)) == f"{len(source.state_dict())} tensors loaded"
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in target.state_dict().items())


def test_the_report_names_what_does_not_fit(tmp_path: Path) -> None:
    path, _ = saved(tmp_path, loss_normaliser="ema")
    torch.manual_seed(1)
    fields = {
        "class_names": ("a", "b"),
        "aspect_ratios": (0.5, 2.0),
        "backbone_norm": "frozen",
        "image_mean": (0, 0, 0),
    }
    target = RetinaNet(tiny_config(**fields, head_depth=2))
    fresh = {name: value.clone() for name, value in target.state_dict().items()}
    report = transfer_weights(path, target)
    assert report.skipped[f"{CLS}.weight"] == "2 anchors per cell in the file and 4 in the model"
    shape = "its shape is [8, 32, 3, 3] in the file and [16, 32, 3, 3] in the model"
    assert report.skipped["head.regression_head.bbox_reg.weight"] == shape
    assert report.skipped["head.regression_head.conv.1.0.weight"] == "not in the file"
    assert all(torch.equal(target.state_dict()[name], fresh[name]) for name in report.skipped)
    assert "normaliser.average" in report.unused and report.differing == ["aspect_ratios", "image_mean"]
    text = str(report)
    assert shape in text and "trained with other values of aspect_ratios, image_mean" in text
    target = RetinaNet(tiny_config(class_names=("x", "y")))
    assert (
        transfer_weights(path, target).skipped[f"{CLS}.bias"] == "the file and the model have no class name in common"
    )


def test_rows_of_different_anchors_are_not_taken_for_classes(tmp_path: Path) -> None:
    three = {"class_names": ("a", "b", "c"), "category_ids": (), "aspect_ratios": (1.0,)}
    one = {"class_names": ("a",), "category_ids": (), "aspect_ratios": (0.5, 1.0, 2.0)}
    path, source = saved(tmp_path, **three)
    torch.manual_seed(1)
    target = RetinaNet(tiny_config(**one))
    rows = f"{CLS}.weight"
    assert source.state_dict()[rows].shape == target.state_dict()[rows].shape
    fresh = target.state_dict()[rows].clone()
    report = transfer_weights(path, target)
    assert "anchors per cell in the file" in report.skipped[rows]
    assert torch.equal(target.state_dict()[rows], fresh)


def test_pyramid_of_other_levels(tmp_path: Path) -> None:
    path, source = saved(tmp_path)
    assert source.config.fpn_levels == (3, 4)
    target = RetinaNet(tiny_config(fpn_levels=(4, 5)))
    report = transfer_weights(path, target)
    reason = "the pyramid begins at level 3 in the file and at 4 in the model"
    fpn = [name for name in target.state_dict() if name.startswith("backbone.fpn.")]
    assert fpn and all(report.skipped[name] == reason for name in fpn)
    assert report.differing == ["fpn_levels"]


def test_unusable_files(tmp_path: Path) -> None:
    path, _ = saved(tmp_path)
    other = {"backbone": "mobilenet_v2", "fpn_channels": 8, "head_norm": "none", "head_depth": 0}
    with pytest.raises(
        CheckpointError,
        match="start.safetensors: backbone: expected weights that fit the model's mobilenet_v2, got those of resnet18",
    ):
        transfer_weights(path, RetinaNet(tiny_config(**other)))
    with pytest.raises(CheckpointError, match="none.safetensors: no such file"):
        transfer_weights(tmp_path / "none.safetensors", RetinaNet(tiny_config()))


def test_training_reads_the_file_of_weights_once(
    data: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert run(*train_arguments(data, tmp_path / "first", "--epochs", 1)) == 0
    path, opened = tmp_path / "first" / "last.safetensors", []
    read = model_file._read_safetensors
    monkeypatch.setattr(model_file, "_read_safetensors", lambda path: (opened.append(path), read(path))[1])
    assert run(*train_arguments(data, tmp_path / "second", "--epochs", 1, "--weights", path)) == 0
    assert opened == [path]


def test_training_from_a_model_of_other_classes(
    data: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert run(*train_arguments(data, first, "--epochs", 1)) == 0
    two = make_data(tmp_path / "two", names=("square", "circle"))
    options = ["--batch-size", 2, "--device", "cpu", "--threads", 1, "--epochs", 1, "--lr", 1e-9]
    capsys.readouterr()
    weights = ("--weights", first / "last.safetensors")
    assert run("train", "--train", two, "--val", two, "--output", second, *weights, *options) == 0
    assert "copied 1 of 2 classes: square" in capsys.readouterr().out
    before, after = (load_model(folder / "last.safetensors") for folder in (first, second))
    # Network and anchors are those of the file; no option states them.
    fields = ("backbone", "fpn_levels", "anchor_sizes", "min_size", "head_depth")
    assert all(getattr(before.config, f) == getattr(after.config, f) for f in fields)
    assert after.config.class_names == ("square", "circle") and after.config.category_ids == (2, 7)
    weight = "head.regression_head.bbox_reg.weight"
    torch.testing.assert_close(after.state_dict()[weight], before.state_dict()[weight], rtol=0, atol=1e-6)
    both = ("--weights", first / "last.safetensors", "--backbone-weights", "x.pth")
    assert run(*train_arguments(data, tmp_path / "third", *both)) == 2
    capsys.readouterr()
    assert run(*train_arguments(data, tmp_path / "third", "--weights", data)) == 3
    assert "not a safetensors file" in one_error(capsys) and not (tmp_path / "third").exists()
