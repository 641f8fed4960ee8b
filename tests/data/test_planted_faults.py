"""A folder with planted faults: `retinanet check` reports each by its entry, and `--fix` leaves a set that trains."""

import contextlib
import io
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from cli_cases import make_data, run, train_arguments
from PIL import Image

from retinanet.data import open_dataset

ERROR, MENDED, NOTE = "errors", "mended", "notes"


@dataclass
class Fault:
    """A fault, and the finding that it must give.

    Attributes:
        section: Section of the report.
        where: The entry, after the name of the json.
        reason: Part of the reason.
        image: Entry to add to `images`.
        annotation: Entry to add to `annotations`, or changes of a good one.
        category: Entry to add to `categories`.
    """

    section: str
    where: str
    reason: str
    image: dict[str, Any] | None = None
    annotation: Any = field(default=None)
    category: dict[str, Any] | None = None


def image_fault(section: str, identity: Any, name: Any, reason: str, shown: str | None = None, **more: Any) -> Fault:
    return Fault(section, f"image {identity} ({shown or name})", reason, {"id": identity, "file_name": name, **more})


def box_fault(section: str, identity: int, reason: str, **changes: Any) -> Fault:
    return Fault(section, f"annotation {identity}", reason, annotation={"id": identity, **changes})


LONG = "x" * 300 + ".png"
FAULTS = {
    "missing image": image_fault(ERROR, 101, "missing.png", "no such file"),
    "text instead of an image": image_fault(ERROR, 102, "text.png", "not an image in a format that Pillow reads"),
    "JPEG that is cut short": image_fault(ERROR, 103, "short.jpg", "cannot be decoded as an image"),
    "PNG that is cut short": image_fault(ERROR, 104, "short.png", "cannot be decoded as an image"),
    "empty file": image_fault(ERROR, 105, "empty.png", "not an image in a format that Pillow reads"),
    "deep image": image_fault(ERROR, 106, "deep.png", "expected 8 bits per channel, got pixel mode I;16"),
    "folder instead of an image": image_fault(ERROR, 107, "folder.png", "expected an image, got a folder"),
    "name that is too long": image_fault(ERROR, 108, LONG, "cannot be read", f"{LONG[:47]} ... {LONG[-47:]}"),
    "name with a NUL": image_fault(ERROR, 109, "a\0.png", "cannot be decoded as an image (embedded null", "a\\x00.png"),
    "empty name": image_fault(ERROR, 110, "", "file_name must be a string, got ''", ""),
    "number as name": image_fault(ERROR, 111, 7, "file_name must be a string, got 7"),
    "text as image id": image_fault(ERROR, "112", "2.png", "image id must be an integer, got '112'"),
    "image id used twice": image_fault(ERROR, 1, "2.png", "image id 1 is already used by 1.png"),
    "exchanged width and height": image_fault(
        ERROR, 114, "turned.png", "the annotations say 48 x 64 pixels", width=48, height=64
    ),
    "file of two images": image_fault(ERROR, 115, "1.png", "is also that of"),
    "image that vanishes": Fault(ERROR, "line.png", "leaves less than one pixel", {"id": 116, "file_name": "line.png"}),
    "name that fits two files": image_fault(ERROR, 117, "TWIN.png", "the name fits several files"),
    "backslashes": image_fault(MENDED, 118, "sub\\back.png", "back.png fits"),
    "letter case": image_fault(MENDED, 119, "CASE.PNG", "case.png fits"),
    "path on another machine": image_fault(MENDED, 120, "C:\\photos\\moved.png", "moved.png fits"),
    "box without width": box_fault(MENDED, 201, "bbox [5, 5, 0, 5] has width or height 0", bbox=[5, 5, 0, 5]),
    "box without height": box_fault(MENDED, 202, "bbox [5, 5, 5, 0] has width or height 0", bbox=[5, 5, 5, 0]),
    "negative width": box_fault(ERROR, 203, "has a negative width or height", bbox=[5, 5, -5, 5]),
    "overhang": box_fault(MENDED, 204, "reaches 6 pixels out of its image of 64 x 48", bbox=[50, 5, 20, 5]),
    "box outside": box_fault(MENDED, 205, "lies outside its image of 64 x 48 pixels", bbox=[70, 5, 5, 5]),
    "sliver inside": box_fault(MENDED, 206, "has less than 1 pixel in its image", bbox=[63.5, 5, 5, 5]),
    "not a number": box_fault(ERROR, 207, "has a coordinate that is not finite", bbox=[5, 5, math.nan, 5]),
    "infinity": box_fault(ERROR, 208, "has a coordinate that is not finite", bbox=[-math.inf, 5, 5, 5]),
    "huge coordinate": box_fault(ERROR, 209, "has a coordinate that is not finite", bbox=[5, 5, 10**400, 5]),
    "three numbers": box_fault(ERROR, 210, "bbox must be four numbers", bbox=[5, 5, 5]),
    "text as number": box_fault(ERROR, 211, "bbox must be four numbers", bbox=[5, 5, 5, "5"]),
    "no box": box_fault(ERROR, 212, "bbox must be four numbers [x, y, width, height], got None", bbox=...),
    "polygon without box": box_fault(
        MENDED, 213, "has no bbox, only a segmentation", bbox=..., segmentation=[[5, 6, 25, 6, 15, 16]]
    ),
    "mask without box": box_fault(
        MENDED,
        214,
        "has no bbox, only a segmentation",
        bbox=...,
        segmentation={"size": [48, 64], "counts": [240, 96, 2736]},
    ),
    "damaged polygon": box_fault(
        ERROR, 215, "its segmentation is no list of polygons", bbox=..., segmentation=[[5, 6]]
    ),
    "damaged mask": box_fault(
        ERROR, 216, "no run-length encoded mask", bbox=..., segmentation={"size": [48, 0], "counts": [1]}
    ),
    "unknown class": box_fault(ERROR, 217, "category_id 99 is not the id of any category", category_id=99),
    "no class": box_fault(ERROR, 218, "category_id None is not the id of any category", category_id=...),
    "unknown image": box_fault(ERROR, 219, "image_id 99 is not the id of any image", image_id=99),
    "wrong crowd": box_fault(ERROR, 220, "iscrowd must be 0 or 1, got 2", iscrowd=2),
    "annotation id used twice": box_fault(MENDED, 3, "annotation id 3 is used more than once", bbox=[1, 1, 9, 9]),
    "text as annotation id": box_fault(ERROR, "221", "annotation id must be an integer, got '221'"),
    "list as annotation": Fault(ERROR, "annotations[0]", "expected an object, got a list", annotation=[1]),
    "text as class id": Fault(
        ERROR, "categories[2]", "id must be an integer, got '8'", category={"id": "8", "name": "ring"}
    ),
    "class name used twice": Fault(
        ERROR, "categories[3]", "category name 'square' of id 9 is already used", category={"id": 9, "name": "square"}
    ),
    "class without name": Fault(ERROR, "categories[4]", "name must be a string, got None", category={"id": 10}),
    "class without boxes": Fault(NOTE, "class disc", "has no box"),
    "image that equals another": Fault(NOTE, "copy.png", "equals ", {"id": 130, "file_name": "copy.png"}),
    "box that equals another": Fault(NOTE, "4.png", "occurs more than once", annotation={"id": 230}),
}


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a COCO json with all faults."""
    folder = tmp_path_factory.mktemp("planted")
    path = make_data(folder, names=("square", "disc"))
    content = json.loads(path.read_text())
    good = {entry["id"]: entry for entry in content["annotations"]}
    for fault in FAULTS.values():
        if fault.image is not None:
            content["images"].append(fault.image)
        if isinstance(fault.annotation, dict):
            # The images 1 and 2 have errors, so a clean copy leaves them out.
            entry = good[2 if fault.section == ERROR else 4] | fault.annotation
            content["annotations"].append({key: value for key, value in entry.items() if value is not ...})
        elif fault.annotation is not None:
            content["annotations"].insert(0, fault.annotation)
        if fault.category is not None:
            content["categories"].append(fault.category)
    path.write_bytes(json.dumps(content).encode("utf-8-sig"))
    write_images(folder)
    return path


def write_images(folder: Path) -> None:
    (folder / "sub").mkdir()
    for number, name in enumerate(["sub/back.png", "case.png", "moved.png", "turned.png", "twin.png", "Twin.png"]):
        Image.new("RGB", (64, 48), (number, 60, 90)).save(folder / name)
    (folder / "text.png").write_text("no image")
    (folder / "empty.png").touch()
    (folder / "folder.png").mkdir()
    (folder / "copy.png").write_bytes((folder / "1.png").read_bytes())
    Image.new("I;16", (8, 8), 40000).save(folder / "deep.png")
    Image.new("RGB", (2000, 1)).save(folder / "line.png")
    noise = Image.effect_noise((64, 48), 90)
    for name in ("short.jpg", "short.png"):
        noise.save(folder / name)
        (folder / name).write_bytes((folder / name).read_bytes()[:900])


@pytest.fixture(scope="module")
def checked(planted: Path) -> tuple[int, str, dict[str, Any], Path]:
    """Return the exit code, the text and the JSON of `retinanet check`, and the folder of the clean copy."""
    fixed, report = planted.parent / "fixed", planted.parent / "report.json"
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        code = run("check", planted, "--fix", fixed, "--json", report)
    (content,) = json.loads(report.read_text())
    return code, text.getvalue(), content, fixed


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_is_reported_once(planted: Path, checked, name: str) -> None:
    fault = FAULTS[name]
    _, text, report, _ = checked
    found = [
        entry
        for entry in report[fault.section]
        if entry["where"] in (f"{planted}: {fault.where}", f"{planted}: {planted.parent / fault.where}")
        and fault.reason in entry["reason"]
    ]
    assert len(found) == 1
    assert f"    {found[0]['where']}: {found[0]['reason']}\n" in text


def test_nothing_else_is_reported(checked) -> None:
    code, text, report, _ = checked
    assert len(FAULTS) >= 40
    assert sum(len(report[section]) for section in (ERROR, MENDED, NOTE)) == len(FAULTS)
    assert code == 3 and "  3 boxes outside their image left out:\n" not in text
    assert "  2 boxes outside their image left out:\n" in text


def test_the_clean_copy_is_clean(checked, capsys: pytest.CaptureFixture[str]) -> None:
    fixed = checked[3]
    assert run("check", fixed / "annotations.json", "--strict") == 0
    assert "no errors" in capsys.readouterr().out
    dataset = open_dataset(fixed / "annotations.json", strict=True)
    # Four of the six images of the start, those whose names were mended, and the copy.
    assert len(dataset) == 8 and dataset.class_names == ("square", "disc")
    assert {"1.png", "2.png"}.isdisjoint(path.name for path in dataset.paths)
    # Four of the six boxes of the start, and those that were mended or are worth a look only.
    assert len(dataset.boxes) == 4 + 5
    # The images with errors are 1, 2 and line.png, and the boxes are those of 1 and 2.
    copied = "a clean copy, 8 images, 9 boxes; left out because of errors: 3 images that can be read, with 2 good boxes"
    assert f"{fixed}/annotations.json: {copied}\n" in checked[1]


def test_the_clean_copy_trains(checked, tmp_path: Path) -> None:
    assert run(*train_arguments(checked[3] / "annotations.json", tmp_path / "run", "--epochs", 1, "--strict")) == 0
    assert (tmp_path / "run" / "best.safetensors").is_file()
