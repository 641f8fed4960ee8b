"""Reading other projects' checkpoints: what is read, and that no code from a file is run."""

from __future__ import annotations

import argparse
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from convert_cases import small_state
from safetensors.torch import save_file
from torch import nn

from retinanet import RetinaNet, RetinaNetConfig, save_model
from retinanet.checkpoints.convert.read import read_checkpoint
from retinanet.common.errors import DataError


@pytest.fixture(scope="module")
def state_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "model.pt"
    torch.save(small_state(), path)
    return path


class Trap:
    """An object whose unpickling creates a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


class Reduced:
    """An object that is pickled as the given parts."""

    def __init__(self, *parts: Any) -> None:
        self.parts = parts

    def __reduce__(self) -> Any:
        return self.parts


@pytest.mark.parametrize("where", ["value", "state", "beside"])
def test_no_code_from_a_file_runs(tmp_path: Path, where: str) -> None:
    trap = Trap(tmp_path / "trap")
    content = {"value": {"a": trap}, "state": trap, "beside": {"model": {}, "more": trap}}[where]
    torch.save(content, tmp_path / "model.pth")
    torch.save(content, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    for protocol in range(2, 6):
        (tmp_path / f"{protocol}.pkl").write_bytes(pickle.dumps(content, protocol))
    for name in ("model.pth", "old.pth", "2.pkl", "3.pkl", "4.pkl", "5.pkl"):
        with pytest.raises(
            DataError, match=r": expected only tensors, numbers and text, got a posix.mkdir, which is not read"
        ):
            read_checkpoint(tmp_path / name)
    assert not (tmp_path / "trap").exists()
    pickle.loads((tmp_path / "5.pkl").read_bytes())
    assert (tmp_path / "trap").exists(), "the trap works"


def test_arrays_of_objects_are_refused(tmp_path: Path) -> None:
    """NumPy takes the bytes of such arrays as addresses, and the process crashes when it reads an element."""
    reconstruct, frombuffer = np.empty(0).__reduce__()[0], np.empty(1).__reduce_ex__(5)[0]
    disguised = Reduced(np.dtype, ("V8",), (3, "|", None, ("f0",), {"f0": (np.dtype("O"), 0)}, 8, 1, 0))
    for array in (
        Reduced(np.ndarray, ((1,), "O", b"A" * 8)),
        Reduced(reconstruct, (np.ndarray, (0,), b"b"), (1, (1,), np.dtype("O"), False, b"A" * 8)),
        Reduced(reconstruct, (np.ndarray, (0,), b"b"), (1, (1,), disguised, False, b"A" * 8)),
        Reduced(frombuffer, (b"A" * 8, disguised, (1,), "C")),
    ):
        torch.save({"a": array}, tmp_path / "model.pth")
        (tmp_path / "model.pkl").write_bytes(pickle.dumps({"a": array}))
        for name in ("model.pth", "model.pkl"):
            with pytest.raises(DataError, match=f"{name}: a: expected an array of numbers, got one of "):
                read_checkpoint(tmp_path / name)


def test_pickled_modules_are_refused(tmp_path: Path) -> None:
    torch.save(nn.Conv2d(1, 1, 1), tmp_path / "model.pt")
    with pytest.raises(DataError, match=r"got a torch.nn.*Conv2d, .* save model.state_dict\(\) to a new file"):
        read_checkpoint(tmp_path / "model.pt")


@pytest.mark.parametrize("protocol", range(2, 6))
def test_pickles_of_arrays(tmp_path: Path, protocol: int) -> None:
    arrays = {
        "c": np.arange(6, dtype=np.float32).reshape(2, 3),
        "f": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "half": np.ones((), np.float16),
        "empty": np.zeros((0, 4), np.float32),
        "swapped": np.arange(3, dtype=">f4"),
        "count": np.int64(7),
    }
    content = pickle.dumps({"model": arrays, "__author__": "x", "raw": b"\xff"}, protocol)
    for name, data in (("new.pkl", content), ("old.pkl", content.replace(b"numpy._core", b"numpy.core"))):
        if protocol > 3 and name == "old.pkl":
            continue  # These protocols write the length of a name before it, and NumPy 1's names are shorter.
        (tmp_path / name).write_bytes(data)
        state, extras = read_checkpoint(tmp_path / name)
        assert all(np.array_equal(state[key].numpy(), value) for key, value in arrays.items())
        assert state["f"].dtype == state["half"].dtype == torch.float32 and state["count"].dtype == torch.int64
        assert extras == {"__author__": "x", "raw": b"\xff"}


def test_files_of_torch_save(tmp_path: Path) -> None:
    state = {"module.model.a": torch.ones(2, dtype=torch.float16), "module.model.b": torch.tensor(3)}
    rest = {"args": argparse.Namespace(lr=0.1), "loss": np.float32(2.5), "array": np.ones(3), "epoch": 4}
    torch.save({"model": state, **rest}, tmp_path / "new.pth")
    torch.save({"state_dict": state, **rest}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    save_file(state, tmp_path / "model.safetensors")
    for name in ("new.pth", "old.pth", "model.safetensors"):
        content = read_checkpoint(tmp_path / name)
        assert list(content.state) == ["model.a", "model.b"]
        assert torch.equal(content.state["model.a"], torch.ones(2)) and content.state["model.b"] == 3
        assert name == "model.safetensors" or content.extras["args"].lr == 0.1


def test_damaged_and_other_files(tmp_path: Path, state_file: Path) -> None:
    whole = state_file.read_bytes()
    pickled = pickle.dumps({"model": {"a": np.zeros(100)}})
    frombuffer = np.empty(1).__reduce_ex__(5)[0]
    for name, data in (
        ("empty", b""),
        ("junk", b"junk"),
        ("cut.pt", whole[: len(whole) // 2]),
        ("cut.pkl", pickled[:60]),
        ("short.pkl", pickle.dumps({"a": Reduced(frombuffer, (bytes(8), np.dtype("f4"), (3,), "C"))})),
        ("zip.pt", b"PK\x05\x06" + bytes(18)),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match=f"^{tmp_path / name}: not a checkpoint, or cut short: .*$"):
            read_checkpoint(tmp_path / name)
    with pytest.raises(DataError, match="expected a file, got a folder"):
        read_checkpoint(tmp_path)
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    with pytest.raises(DataError, match="expected a state dict, got list"):
        read_checkpoint(tmp_path / "list.pt")
    # The length of the header is a multiple of 8. Its lowest byte is that of a pickle, 0x80, in one file of 32.
    for length in range(0, 256, 8):
        save_file({"a": torch.ones(2)}, tmp_path / "theirs.safetensors", metadata={"by": "x" * length})
        assert list(read_checkpoint(tmp_path / "theirs.safetensors").state) == ["a"]
    config = RetinaNetConfig(class_names=("a",), backbone="resnet18", fpn_channels=8, head_depth=1)
    save_model(tmp_path / "ours.safetensors", RetinaNet(config))
    with pytest.raises(DataError, match="ours.safetensors: expected a checkpoint of another project, got a model file"):
        read_checkpoint(tmp_path / "ours.safetensors")
