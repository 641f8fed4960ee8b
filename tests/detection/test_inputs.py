"""What is read of a folder: nothing is left out in silence."""

import os
from pathlib import Path

import pytest

from retinanet.detection.inputs import find_inputs


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_files_of_a_folder(tmp_path: Path) -> None:
    touch(tmp_path, "b.JPG", "a.jfif", "c.gif", "d.PnG", "clip.MOV", "notes.txt", "README", "._a.jfif", "sub/e.png")
    touch(tmp_path, "a.jfw", "b.jgw", "c.wld", "z.jgw", "a.raw", "a.pgw")
    inputs = find_inputs([tmp_path])
    assert [path.name for path in inputs.files] == ["a.jfif", "b.JPG", "c.gif", "clip.MOV", "d.PnG"]
    assert inputs.folders == [tmp_path] and inputs.problems == []
    assert inputs.notes == [
        f"{tmp_path}: 5 files not read, because the suffix is none of a picture or a video: README, a.pgw, a.raw, "
        "notes.txt, z.jgw",
        f"{tmp_path}: 1 hidden file not read: ._a.jfif",
        f"{tmp_path}: 1 sub-folder not entered (--recursive enters sub-folders): sub",
    ]


def test_sub_folders(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "one/b.png", "one/two/c.png", ".cache/d.png", "found/e.png", "one/notes.txt")
    (tmp_path / "loop").symlink_to(tmp_path)
    inputs = find_inputs([tmp_path], recursive=True, excluded=tmp_path / "one" / ".." / "found")
    assert [str(path.relative_to(tmp_path)) for path in inputs.files] == ["a.png", "one/b.png", "one/two/c.png"]
    assert inputs.notes == [
        f"{tmp_path}: 1 file not read, because the suffix is none of a picture or a video: one/notes.txt",
        f"{tmp_path}: 3 sub-folders not entered: .cache, found, loop",
    ]


def test_a_file_that_is_named_is_taken_whatever_its_name(tmp_path: Path) -> None:
    touch(tmp_path, ".hidden", "photo.heic", "a.png")
    arguments = [tmp_path / ".hidden", tmp_path / "photo.heic", tmp_path / "a.png", tmp_path / "a.png"]
    inputs = find_inputs(arguments)
    assert inputs.files == arguments[:3] and not inputs.notes and not inputs.problems


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("none.png", "no such file or folder"),
        ("x" * 300, "cannot be read (File name too long)"),
        ("a\0b", "no such file or folder"),
    ],
)
def test_what_does_not_exist_is_a_problem_of_its_own(tmp_path: Path, name: str, reason: str) -> None:
    touch(tmp_path, "a.png")
    inputs = find_inputs([tmp_path / name, tmp_path / "a.png"])
    (problem,) = inputs.problems
    assert problem.endswith(f": {reason}") and problem.isprintable() and inputs.files == [tmp_path / "a.png"]


def test_a_folder_without_pictures_is_a_problem(tmp_path: Path) -> None:
    touch(tmp_path, "empty/notes.txt", "full/a.png")
    inputs = find_inputs([tmp_path / "absent.png", tmp_path / "empty", tmp_path / "full"])
    absent, problem = inputs.problems
    assert absent == f"{tmp_path}/absent.png: no such file or folder"
    assert problem.startswith(f"{tmp_path}/empty: expected pictures or videos in this folder (.png, ")
    assert inputs.files == [tmp_path / "full" / "a.png"] and "notes.txt" in inputs.notes[0]


def test_pipes_and_broken_links_are_problems(tmp_path: Path) -> None:
    touch(tmp_path, "a.png")
    os.mkfifo(tmp_path / "b.png")
    (tmp_path / "c.png").symlink_to(tmp_path / "absent.png")
    reason = "expected a picture or a video, got a broken link, a pipe or a device"
    inputs = find_inputs([tmp_path, tmp_path / "b.png", "/dev/null"])
    assert inputs.files == [tmp_path / "a.png"]
    paths = (tmp_path / "b.png", tmp_path / "c.png", tmp_path / "b.png", "/dev/null")
    assert inputs.problems == [f"{path}: {reason}" for path in paths]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everywhere")
def test_a_folder_that_may_not_be_read(tmp_path: Path) -> None:
    touch(tmp_path, "locked/a.png", "b.png")
    (tmp_path / "locked").chmod(0)
    inputs = find_inputs([tmp_path], recursive=True)
    assert inputs.problems == [f"{tmp_path}/locked: cannot be read (Permission denied)"]
    assert inputs.files == [tmp_path / "b.png"]
