"""Finding images by names that were written on another machine or file system."""

from pathlib import Path

import pytest
from dataset_cases import coco, folder, opened, refusal, write_image  # noqa: F401  fixture

from retinanet.data.locate import ImageFinder
from retinanet.data.problems import Kind


@pytest.mark.parametrize(
    ("stated", "found", "kind"),
    [
        ("a.png", "a.png", None),
        ("sub\\a.png", "sub/a.png", Kind.BACKSLASH),
        ("SUB/a.png", None, None),
        ("sub/A.png", "sub/a.png", Kind.LETTER_CASE),
        ("sub\\A.png", "sub/a.png", Kind.LETTER_CASE),
        ("D:\\photos\\a.png", "a.png", Kind.OTHER_FOLDER),
        ("/elsewhere/A.png", "a.png", Kind.OTHER_FOLDER),
        ("images/a.png", "a.png", Kind.OTHER_FOLDER),
        ("images/sub/a.png", "sub/a.png", Kind.OTHER_FOLDER),
        # The image of this name beside it is another one.
        ("other/a.png", None, None),
        (".hidden.png", ".hidden.png", None),
        (".HIDDEN.png", None, None),
        ("a.jpg", None, None),
        ("x" * 300, None, None),
        ("a\0.png", None, None),
        ("\ud800", None, None),
    ],
)
def test_find(tmp_path: Path, stated: str, found: str | None, kind: Kind | None) -> None:
    images = tmp_path / "images"
    (images / "sub").mkdir(parents=True)
    for name in ("a.png", "sub/a.png", ".hidden.png"):
        (images / name).touch()
    result = ImageFinder(images).find(stated)
    assert result.kind is kind
    assert result.path == images / (stated if found is None else found)


def test_several_files_fit(tmp_path: Path) -> None:
    for name in ("a.png", "a.PNG"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=r"^the name fits several files \(a\.PNG, a\.png\)"):
        ImageFinder(tmp_path).find("A.png")


def test_names_in_a_coco_json(folder: Path) -> None:
    (folder / "sub").mkdir()
    write_image(folder / "sub" / "c.JPG")
    images = [{"id": 1, "file_name": "sub\\c.JPG"}, {"id": 2, "file_name": "A.png"}]
    content = coco(images=images, annotations=[])
    dataset = opened(folder, content)
    assert dataset.paths == [folder / "sub" / "c.JPG", folder / "a.png"]
    assert dataset.summary().endswith(
        "mended: 1 file name with backslashes read with slashes, 1 file name in another case matched"
    )
    lines = refusal(folder, content, strict=True).splitlines()
    assert lines[0] == f"{folder}/ann.json: image 1 (sub\\c.JPG): no file sub\\c.JPG; {folder}/sub/c.JPG fits"


def test_one_file_cannot_be_two_images(folder: Path) -> None:
    images = [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "A.PNG"}]
    reason = f"the file {folder}/a.png is also that of {folder}/ann.json: image 1 (a.png); merge the two entries"
    assert refusal(folder, coco(images=images, annotations=[])) == f"{folder}/ann.json: image 2 (A.PNG): {reason}"
