"""Names of a folder: each is given out once, on any file system."""

from pathlib import Path

from retinanet.common.names import FreeNames


def test_names_that_a_file_system_may_not_tell_apart() -> None:
    names = FreeNames(Path("none"))
    wanted = ("a", "a_2", "A", "a", "b", "\u00e4", "a\u0308")
    assert [names.take(stem, suffix=".png") for stem in wanted] == [
        *("a.png", "a_2.png", "A_3.png", "a_4.png", "b.png", "\u00e4.png", "a\u0308_2.png")
    ]


def test_long_names_are_shortened(tmp_path: Path) -> None:
    names = FreeNames(tmp_path)
    taken = [names.take("\u00e4" * 200 + last, "_end", ".png", room=20) for last in "xyz"]
    assert len(set(taken)) == 3 and all(225 < len(name.encode()) <= 235 for name in taken)
    assert [name[-8:] for name in taken] == ["_end.png", "nd_2.png", "nd_3.png"]
