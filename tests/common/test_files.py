"""Atomic writing: links and special files stay what they are, and long names fit."""

import errno
import os
import threading
from pathlib import Path

import pytest

from retinanet.common.files import replacing, replacing_folder, write_json


def test_a_link_stays_and_its_target_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    target, link, dangling = tmp_path / "elsewhere" / "a.json", tmp_path / "link.json", tmp_path / "dangling.json"
    target.write_text("old")
    link.symlink_to(target)
    dangling.symlink_to(tmp_path / "elsewhere" / "new.json")
    write_json(link, [1])
    write_json(dangling, [2])
    assert link.is_symlink() and target.read_text() == "[\n  1\n]\n"
    assert dangling.is_symlink() and (tmp_path / "elsewhere" / "new.json").read_text() == "[\n  2\n]\n"


def test_a_link_to_a_folder_stays(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "old").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with replacing_folder(tmp_path / "link") as folder:
        (folder / "new").write_text("")
    assert (tmp_path / "link").is_symlink() and [entry.name for entry in (tmp_path / "real").iterdir()] == ["new"]


def test_a_pipe_receives_the_content(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    received: list[str] = []
    reader = threading.Thread(target=lambda: received.append(pipe.read_text()), daemon=True)
    reader.start()
    write_json(pipe, {"a": 1})
    reader.join(timeout=10)
    assert received == ['{\n  "a": 1\n}\n'] and pipe.is_fifo()


def test_an_open_file_is_written_and_not_replaced(tmp_path: Path) -> None:
    with (tmp_path / "out").open("w+") as file:
        write_json(Path(f"/dev/fd/{file.fileno()}"), [])
        assert file.read() == "[]\n"


def test_a_name_of_the_greatest_length(tmp_path: Path) -> None:
    path = tmp_path / ("a" * 250 + ".json")
    write_json(path, [])
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_an_error_without_a_file_name_gets_that_of_the_output(tmp_path: Path) -> None:
    """A full disk makes `write` raise an error that names no file."""
    with pytest.raises(OSError) as caught, replacing(tmp_path / "a.bin"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.filename == str(tmp_path / "a.bin") and not list(tmp_path.iterdir())


def test_an_error_of_another_kind_is_not_changed(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"^encoder error$"), replacing(tmp_path / "a.bin"):
        raise OSError("encoder error")


def test_an_output_that_is_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(IsADirectoryError) as caught, replacing(tmp_path / "a"):
        pass
    assert caught.value.filename == str(tmp_path / "a") and list(tmp_path.iterdir()) == [tmp_path / "a"]
