"""Class names and thresholds that a file states beside its state dict, and names that wrappers have changed."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from convert_cases import State, small_state

from retinanet.checkpoints.convert import convert_checkpoint
from retinanet.checkpoints.convert.stated import _labels, stated_beside
from retinanet.cli.main import main
from retinanet.common.errors import DataError


@pytest.fixture(scope="module")
def state() -> State:
    """Return the state dict of a small network of yhenon's project."""
    return small_state()


def convert(path: Path, content: Any, **options: Any) -> Any:
    torch.save(content, path)
    return convert_checkpoint(path, "yhenon", **options)


def test_a_lightning_file(tmp_path: Path, state: State, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["first", "second"]
    content = {
        "epoch": 3,
        "pytorch-lightning_version": "2.6.1",
        "state_dict": {f"model.{key}": value for key, value in state.items()} | {"loss.weight": torch.ones(2)},
        "optimizer_states": [{"state": {}, "param_groups": [{"names": ["x"]}]}],
        "callbacks": {"ModelCheckpoint": {"dirpath": "runs"}},
        "hparams_name": "kwargs",
        "hyper_parameters": {
            "label_dict": {name: k for k, name in enumerate(names)},
            "data": Path("data"),
            "lr": 0.01,
            "config": {
                "retinanet": {"score_thresh": 0.1, "nms_thresh": 0.25},
                "frcnn": {"nms_thresh": 0.7},
                "detections_per_img": 40,
            },
        },
    }
    model, report = convert(tmp_path / "a.ckpt", content)
    config = model.config
    assert config.class_names == tuple(names)
    assert (config.score_threshold, config.nms_threshold, config.max_detections) == (0.1, 0.25, 40)
    assert report.unused["loss.weight"] == "not a tensor of the network"
    assert main(["convert", str(tmp_path / "a.ckpt"), str(tmp_path / "a.safetensors"), "--from", "yhenon"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for line in (
        "  scores above 0.1, NMS at IoU 0.25, at most 40 detections",
        "  note: class names are taken from hyper_parameters.label_dict",
        "  note: score_threshold 0.1 is taken from hyper_parameters.config.retinanet.score_thresh",
        "  note: nms_threshold 0.25 is taken from hyper_parameters.config.retinanet.nms_thresh",
        "  note: max_detections 40 is taken from hyper_parameters.config.detections_per_img",
    ):
        assert line in lines, lines


def test_what_the_caller_gives_is_not_taken_from_the_file(tmp_path: Path, state: State) -> None:
    content = {"model": state, "class_names": ["x"] * 1, "args": argparse.Namespace(nms_thresh=0.25, score_thresh=0.2)}
    names = ["first", "second"]
    model, report = convert(tmp_path / "a.pt", content, class_names=names, fields={"nms_threshold": 0.6})
    assert model.config.class_names == tuple(names)
    assert (model.config.nms_threshold, model.config.score_threshold) == (0.6, 0.2)
    assert [note for note in report.notes if "taken" in note] == ["score_threshold 0.2 is taken from args.score_thresh"]


def test_without_names_the_report_says_that_classes_are_numbered(tmp_path: Path, state: State) -> None:
    model, report = convert(tmp_path / "a.pt", state)
    assert model.config.class_names[0] == "class 0"
    assert any(note.startswith("the classes are numbered, because no class names") for note in report.notes)


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"class_names": ["a", "b", "c"]}, ("a", "b", "c")),
        ({"CLASSES": ("a", "b", "c")}, None),
        ({"hyper_parameters": {"Classes": ("a", "b", "c")}}, ("a", "b", "c")),
        ({"label_dict": {"b": 1, "a": 0, "c": 2}}, ("a", "b", "c")),
        ({"numeric_to_label_dict": {2: "c", 0: "a", 1: "b"}}, ("a", "b", "c")),
        ({"id2label": {"0": "a", "1": "b", "2": "c"}}, ("a", "b", "c")),
        ({"label2id": {"cat": 1, "dog": 2}}, ("background", "cat", "dog")),
        ({"hyper_parameters": {"classes": ["x", "y", "z"]}, "names": ["a", "b", "c"]}, ("a", "b", "c")),
        ({"names": ["a", "b", "c"], "hyper_parameters": {"label_dict": {"a": 0, "b": 1, "c": 2}}}, ("a", "b", "c")),
    ],
)
def test_forms_of_class_names(entry: dict[str, Any], expected: tuple[str, ...] | None) -> None:
    if expected is None:
        entry, expected = {name.lower(): value for name, value in entry.items()}, ("a", "b", "c")
    stated = stated_beside(entry, 3)
    assert stated.class_names == expected and len(stated.notes) == 1 and "are taken from" in stated.notes[0]


@pytest.mark.parametrize(
    "entry",
    [
        {"class_names": ["a", "b"]},
        {"class_names": ["a", "b", "c", "d"]},
        {"label_dict": {"a": 5, "b": 6, "c": 7}},
        {"class_names": ["a", "b", "c"], "names": ["c", "b", "a"]},
    ],
)
def test_class_names_that_do_not_fit_are_not_taken(entry: dict[str, Any]) -> None:
    stated = stated_beside(entry, 3)
    assert stated.class_names is None and len(stated.notes) == 1
    assert stated.notes[0].startswith("class names are not taken from ")


@pytest.mark.parametrize(
    "value", [80, "names.txt", ["a", 1, "c"], ["a", "a", "b"], {"a": 0.5}, {"a": 0, "b": 0}, [], {}]
)
def test_entries_that_are_no_class_names(value: object) -> None:
    assert stated_beside({"class_names": value}, 3) == (None, {}, [])


def test_thresholds_that_disagree_or_are_none() -> None:
    stated = stated_beside({"hyper_parameters": {"a": {"nms_thresh": 0.5}, "b": {"nms_thresh": 0.6}}}, 3)
    assert stated.fields == {}
    assert stated.notes == [
        "nms_threshold is not taken from the file, whose entries disagree: hyper_parameters.a.nms_thresh 0.5, "
        "hyper_parameters.b.nms_thresh 0.6"
    ]
    odd = {
        "nms_thresh": 5,
        "score_thresh": True,
        "topk_candidates": 10.5,
        "detections_per_img": 0,
        "fg_iou_thresh": "x",
    }
    assert stated_beside({"hyper_parameters": odd}, 3) == (None, {}, [])


@pytest.mark.parametrize(
    "rename",
    [
        lambda key: f"_orig_mod.{key}",
        lambda key: f"module._orig_mod.{key}",
        lambda key: f"model._orig_mod.module.{key}",
        lambda key: key.replace("fpn.", "fpn._orig_mod.").replace("Model.", "Model.module."),
        lambda key: f"trainer.network.{key}",
    ],
)
def test_names_that_wrappers_have_changed(tmp_path: Path, state: State, rename: Any) -> None:
    expected, _ = convert(tmp_path / "plain.pt", state)
    model, report = convert(tmp_path / "wrapped.pt", {rename(key): value for key, value in state.items()})
    assert not [reason for reason in report.unused.values() if "network" in reason]
    for name, value in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)


def test_two_networks_in_one_file(tmp_path: Path, state: State) -> None:
    both = {f"{prefix}.{key}": value for prefix in ("student", "teacher") for key, value in state.items()}
    with pytest.raises(
        DataError, match=r"expected one network, got 2, with the prefixes 'student\.', 'teacher\.'; save"
    ):
        convert(tmp_path / "a.pt", both)


def test_two_entries_of_one_name(tmp_path: Path, state: State) -> None:
    name = next(iter(state))
    with pytest.raises(DataError, match=rf"_orig_mod\.{name}: expected one entry for {name}, got this one and {name}$"):
        convert(tmp_path / "a.pt", state | {f"_orig_mod.{name}": state[name]})


def test_a_number_of_many_digits_is_no_label() -> None:
    assert _labels({"1" * 5000: "cat"}) is None
    assert _labels({"1": "cat"}) == {1: "cat"}
