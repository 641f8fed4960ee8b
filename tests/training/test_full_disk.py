"""A run folder without room, or one that can no longer be written, is named in one line, and the last save stays."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from synthetic import rectangles, tiny_config

from retinanet.checkpoints.model_file import load_model, load_state
from retinanet.common import files
from retinanet.common.errors import UsageError
from retinanet.common.files import check_output_folder, reserve
from retinanet.data import DetectionDataset
from retinanet.model.network import RetinaNet
from retinanet.training.options import TrainOptions
from retinanet.training.run import train

OPTIONS = TrainOptions(epochs=2, batch_size=2, optimizer="adamw", lr=1e-3, log_every=1, device="cpu")
#: Smaller than any file of weights in these tests.
SMALL = 100_000


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DetectionDataset:
    return rectangles(tmp_path_factory.mktemp("disk"), 4, size=64)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let no file grow beyond a size in bytes, which has the effect of a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def new_model() -> RetinaNet:
    torch.manual_seed(0)
    return RetinaNet(tiny_config(backbone="mobilenet_v3_small"))


class FullDisk:
    """A progress bar from whose second step on the disk is full."""

    def __init__(self) -> None:
        self.steps = 0

    def __call__(self, **_: Any) -> FullDisk:
        return self

    def update(self) -> None:
        self.steps += 1
        if self.steps == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL, resource.RLIM_INFINITY))

    def set_postfix_str(self, *_: Any, **__: Any) -> None:
        pass

    write = set_postfix_str

    def close(self) -> None:
        pass


def test_a_full_disk_is_named_before_training(data: DetectionDataset, tmp_path: Path) -> None:
    message = r"run: no room for the files of this run: saving them takes \d+ MB more, [\d,]+ MB are free \(File too"
    with largest_file(SMALL), pytest.raises(UsageError, match=message) as error:
        train(new_model(), data, None, OPTIONS, tmp_path / "run", progress=None)
    assert error.value.exit_code == 2 and "\n" not in str(error.value)
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


def test_a_disk_that_fills_up_leaves_the_last_save(data: DetectionDataset, tmp_path: Path) -> None:
    with largest_file(resource.RLIM_INFINITY), pytest.raises(UsageError) as error:
        train(new_model(), data, None, OPTIONS, tmp_path, progress=FullDisk())
    assert str(error.value) == (
        f"{tmp_path}/last.safetensors: cannot be written (File too large); last.pt still holds the state before the "
        f"first step; when the folder can be written again, continue with `retinanet train --resume {tmp_path}`"
    )
    assert not list(tmp_path.glob(".*.tmp"))
    load_model(tmp_path / "last.safetensors")
    assert train(new_model(), data, None, OPTIONS, tmp_path, resume=True, progress=None).epochs == 2


def test_a_state_that_cannot_be_written_leaves_the_last_one(
    data: DetectionDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(new_model(), data, None, OPTIONS, tmp_path, progress=None)
    with largest_file(SMALL), pytest.raises(OSError, match="File too large") as error:
        from retinanet.checkpoints.model_file import save_state

        save_state(tmp_path / "last.pt", load_state(tmp_path / "last.pt"))
    assert error.value.filename == str(tmp_path / "last.pt")
    assert load_state(tmp_path / "last.pt")["progress"]["epoch"] == 2


def test_metrics_that_cannot_be_written_are_named(
    data: DetectionDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_file = Path.open

    def full(path: Path, *args: Any, **options: Any) -> Any:
        if path.name == "metrics.jsonl":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return open_file(path, *args, **options)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(
        UsageError, match=r"metrics.jsonl: cannot be written \(No space left on device\); last.pt still"
    ):
        train(new_model(), data, None, OPTIONS, tmp_path, progress=None)


def test_a_folder_on_a_read_only_file_system(
    data: DetectionDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(tmp_path / ".lock"))

    monkeypatch.setattr("filelock.FileLock.acquire", read_only)
    with pytest.raises(UsageError, match=r"the run folder cannot be locked \(Read-only file system\)"):
        train(new_model(), data, None, OPTIONS, tmp_path, progress=None)


def test_a_read_only_file_system_is_named_before_the_data_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files.os, "access", lambda *_: False)
    monkeypatch.setattr(files.os, "statvfs", lambda _: SimpleNamespace(f_flag=os.ST_RDONLY))
    with pytest.raises(UsageError, match="run: the output folder lies on a read-only file system"):
        check_output_folder(tmp_path / "run")


def test_reserving_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reserve(tmp_path, [1000, 0, 5])
    assert not list(tmp_path.iterdir())
    with largest_file(1000), pytest.raises(OSError, match="File too large") as error:
        reserve(tmp_path, [1000, 1001])
    assert error.value.filename == str(tmp_path) and not list(tmp_path.iterdir())

    def unsupported(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(files.os, "posix_fallocate", unsupported)
    reserve(tmp_path, [1000])
