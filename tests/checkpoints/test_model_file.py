"""Model files and training states: they read back as written, and damaged files give one clear line."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from synthetic import CLASS_NAMES, tiny_config

from retinanet.checkpoints.model_file import CheckpointError, load_model, load_state, save_model, save_state
from retinanet.checkpoints.transfer import transfer_weights
from retinanet.common.errors import DataError
from retinanet.model.network import RetinaNet
from retinanet.model.thresholds import ScoreThresholds


@pytest.fixture
def model() -> RetinaNet:
    torch.manual_seed(0)
    return RetinaNet(tiny_config())


def test_round_trip(tmp_path, model: RetinaNet) -> None:
    path = tmp_path / "model.safetensors"
    save_model(path, model)
    loaded = load_model(path, class_names=CLASS_NAMES)
    assert loaded.config == model.config
    assert not loaded.training
    expected = model.state_dict()
    assert list(loaded.state_dict()) == list(expected)
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())
    image = [torch.rand(3, 64, 64)]
    with torch.no_grad():
        for got, want in zip(loaded(image), model.eval()(image), strict=True):
            assert all(torch.equal(got[key], want[key]) for key in want)
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    before = path.read_bytes()
    save_model(path, loaded)
    assert path.read_bytes() == before


def test_score_thresholds_travel_with_the_model(tmp_path, model: RetinaNet) -> None:
    path = tmp_path / "model.safetensors"
    assert model.score_threshold is None
    model.score_thresholds = ScoreThresholds(0.3125, (0.25, None))
    save_model(path, model)
    loaded = load_model(path)
    assert loaded.score_thresholds == model.score_thresholds == copy.deepcopy(model).score_thresholds
    assert loaded.score_threshold == 0.3125

    tensors = load_file(path)
    for content, message in (
        ({"overall": 0.5}, "expected an object with overall and by_class"),
        ({"overall": 1.5, "by_class": [None, None]}, r"overall: expected a number in 0\.\.1, got 1\.5"),
        ({"overall": float("nan"), "by_class": [None, None]}, r"overall: expected a number in 0\.\.1, got nan"),
        ({"overall": 0.5, "by_class": [0.5]}, r"by_class: expected 2 values, got \[0\.5\]"),
        ({"overall": 0.5, "by_class": [0.5, "x"]}, r"by_class\[1\]: expected a number in 0\.\.1, got 'x'"),
    ):
        description = {"version": 1, "config": model.config.to_dict(), "score_thresholds": content}
        save_file(tensors, path, metadata={"retinanet": json.dumps(description)})
        with pytest.raises(CheckpointError, match=f"^{path}: score_thresholds: {message}"):
            load_model(path)


@pytest.mark.parametrize("compiled", ["model", "backbone"])
def test_a_compiled_model_gives_the_same_file(tmp_path, model: RetinaNet, compiled: str) -> None:
    save_model(tmp_path / "plain.safetensors", model)
    if compiled == "model":
        wrapped = torch.compile(model)
    else:
        wrapped, model.backbone = model, torch.compile(model.backbone)
    assert any("_orig_mod." in name for name in wrapped.state_dict())
    save_model(tmp_path / "compiled.safetensors", wrapped)
    assert (tmp_path / "compiled.safetensors").read_bytes() == (tmp_path / "plain.safetensors").read_bytes()


def test_names_that_wrappers_have_changed_are_read(tmp_path, model: RetinaNet) -> None:
    path = tmp_path / "model.safetensors"
    save_model(path, model)
    tensors, metadata = load_file(path), {"retinanet": json.dumps({"version": 1, "config": model.config.to_dict()})}
    wrapped = {name.replace("body.", "_orig_mod.body.module."): value for name, value in tensors.items()}
    assert wrapped.keys() != tensors.keys()
    save_file(wrapped, path, metadata=metadata)
    state = model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in load_model(path).state_dict().items())
    other = RetinaNet(tiny_config(class_names=("red",), category_ids=(3,)))
    other.head = torch.compile(other.head)
    report = transfer_weights(path, other)
    assert not report.unused and len(report.loaded) == len(state) - 2


def test_a_failed_save_leaves_the_old_file(tmp_path, model: RetinaNet, monkeypatch) -> None:
    path = tmp_path / "model.safetensors"
    save_model(path, model)
    before = path.read_bytes()

    def fail(target: Path, content: bytes) -> None:
        with target.open("wb") as file:
            file.write(content[:4])
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OSError, match="disk full"):
        save_model(path, model)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_unusable_files(tmp_path, model: RetinaNet) -> None:
    good = tmp_path / "good.safetensors"
    save_model(good, model)
    content = good.read_bytes()

    def check(name: str, message: str, data: bytes | None = None) -> None:
        path = tmp_path / name
        if data is not None:
            path.write_bytes(data)
        with pytest.raises(CheckpointError, match=message) as caught:
            load_model(path)
        assert isinstance(caught.value, DataError)
        assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)

    check("missing.safetensors", "no such file")
    (tmp_path / "folder").mkdir()
    check("folder", "expected a file, got a folder")
    check("empty.safetensors", "not a safetensors file, or cut short", b"")
    check("cut.safetensors", "not a safetensors file, or cut short", content[: len(content) // 2])
    check("header.safetensors", "not a safetensors file, or cut short", content[:100])
    torch.save(model.state_dict(), tmp_path / "pickle.safetensors")
    check("pickle.safetensors", "not a safetensors file")
    save_file({"x": torch.zeros(1)}, tmp_path / "other_project.safetensors")
    check("other_project.safetensors", "not a checkpoint of this project")

    tensors = load_file(good)
    description = {"version": 1, "config": model.config.to_dict()}

    def variant(name: str, changed_tensors: dict[str, torch.Tensor], **changes: object) -> None:
        save_file(changed_tensors, tmp_path / name, metadata={"retinanet": json.dumps({**description, **changes})})

    variant("version.safetensors", tensors, version=2)
    check("version.safetensors", "expected format version 1, got 2")
    variant("config.safetensors", tensors, config={"backbone": "vgg"})
    check("config.safetensors", "backbone: expected one of")
    variant("none.safetensors", tensors, config=None)
    check("none.safetensors", "configuration: expected an object with fields, got NoneType")
    variant("lacking.safetensors", {k: v for k, v in tensors.items() if "bbox_reg.bias" not in k})
    check("lacking.safetensors", "weights do not fit the configuration: .*bbox_reg.bias")
    variant("shape.safetensors", {**tensors, "head.regression_head.bbox_reg.bias": torch.zeros(1)})
    check("shape.safetensors", "weights do not fit the configuration: .*bbox_reg.bias")


def test_other_classes(tmp_path, model: RetinaNet) -> None:
    path = tmp_path / "model.safetensors"
    save_model(path, model)
    with pytest.raises(CheckpointError, match="classes differ: expected green; got red, blue"):
        load_model(path, class_names=["green"])
    with pytest.raises(CheckpointError, match="classes differ: expected blue, red; got red, blue"):
        load_model(path, class_names=["blue", "red"])


def test_state_round_trip_and_unusable_states(tmp_path) -> None:
    path = tmp_path / "last.pt"
    state = {"a": torch.arange(3), "b": [1, 2.5, "x", None], "c": {"d": torch.get_rng_state()}}
    save_state(path, state)
    loaded = load_state(path)
    assert loaded["b"] == state["b"] and torch.equal(loaded["a"], state["a"])
    assert torch.equal(loaded["c"]["d"], state["c"]["d"])

    content = path.read_bytes()
    for name, data, message in (
        ("cut.pt", content[: len(content) // 2], "not a training state, or cut short"),
        ("empty.pt", b"", "not a training state, or cut short"),
        ("junk.pt", b"junk", "not a training state, or cut short"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(CheckpointError, match=message):
            load_state(tmp_path / name)
    with pytest.raises(CheckpointError, match="missing.pt: no such file"):
        load_state(tmp_path / "missing.pt")
    torch.save([1], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match="not a training state: expected a dict, got list"):
        load_state(tmp_path / "list.pt")


class _Evil:
    def __reduce__(self):
        return (print, ("code from a file ran",))


def test_no_code_from_a_state_runs(tmp_path, capsys) -> None:
    torch.save({"a": _Evil()}, tmp_path / "evil.pt")
    with pytest.raises(CheckpointError, match="not a training state"):
        load_state(tmp_path / "evil.pt")
    assert "ran" not in capsys.readouterr().out
